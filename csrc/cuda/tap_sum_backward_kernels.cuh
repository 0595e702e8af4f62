// The adjoint of tap_sum: along y first, then along x.
//
// A block owns a tile of source pixels of one level. Its threads walk down the gradient's columns
// and gather, for each kernel row, what a source row is read with: each value of the gradient is
// loaded once for the three kernel rows. These sums are lines in shared memory, which other threads
// gather along x in the same way: each value is loaded once for the three taps of a kernel row.
#pragma once

#include "cuda/tap_sum_kernels.cuh"

namespace fastfuse::cuda {

// Interval s are the Ratio targets between the centers of the sources s and s + 1, which read both.
template <int Ratio>
struct BackwardTile {
  static constexpr int kRows = 4, kColumns = 32 / Ratio;  // of sources
  // Columns of the gradient: from one left of the interval before the tile to one right of its
  // last.
  static constexpr int kTargets = (kColumns + 1) * Ratio + 2;
  static constexpr int kThreads = ceil_div(kTargets * kTileChannels / kQuad, 32) * 32;
  static constexpr int kLine = kTargets * kTileChannels;
  static constexpr size_t kSharedBytes = sizeof(float) * kTapsAlong * kRows * kLine;
};

// What target i of interval s reads of source s + 1.
template <int Ratio>
__device__ constexpr float share_of_next(int i) {
  return (2 * i + 1) / (2.0f * Ratio);
}

// Where a block's tile is, and a quad of channels of a thread.
struct BackwardPlace {
  int image, y, x, channel, quad;

  template <int Ratio>
  __device__ static BackwardPlace of(const TapSumBackwardSizes& sizes) {
    using Tile = BackwardTile<Ratio>;
    const int row_tiles = ceil_div(sizes.height / Ratio, Tile::kRows);
    const int quad = threadIdx.x % (kTileChannels / kQuad) * kQuad;
    return {static_cast<int>(blockIdx.z) / row_tiles,
            static_cast<int>(blockIdx.z) % row_tiles * Tile::kRows,
            static_cast<int>(blockIdx.y) * Tile::kColumns,
            static_cast<int>(blockIdx.x) * kTileChannels + quad, quad};
  }
};

// Sums along y for the tile's source rows and all kernel rows, at one column of the gradient, times
// `scale`.
template <int Ratio, class T>
__device__ __forceinline__ void gather_rows(const T* column, int64_t row_stride, bool is_there,
                                            int first_source, int in_height, float scale,
                                            float* line) {
  using Tile = BackwardTile<Ratio>;
  const unsigned height = in_height * Ratio;
  int y = (first_source - 1) * Ratio + Ratio / 2 - 1;
  const T* at = column + y * row_stride;
  const auto load_row = [&](float (&values)[kQuad]) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) values[i] = 0;
    if (is_there && static_cast<unsigned>(y) < height) load<kQuad>(at, values);
    ++y;
    at += row_stride;
  };
  // Rows of an interval, and the one above and the one below, which are the next one's as well.
  float rows[Ratio + 2][kQuad];
  load_row(rows[Ratio]);
  load_row(rows[Ratio + 1]);
  float sums[kTapsAlong][kQuad] = {}, sums_of_next[kTapsAlong][kQuad];
  // Not where that would spill.
#pragma unroll(Ratio == 2 && sizeof(T) == 2 ? Tile::kRows + 1 : 1)
  for (int interval = -1; interval < Tile::kRows; ++interval) {
    const bool is_above = first_source + interval < 0;
    const bool is_last = first_source + interval == in_height - 1;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      rows[0][i] = rows[Ratio][i];
      rows[1][i] = rows[Ratio + 1][i];
    }
#pragma unroll
    for (int i = 0; i < Ratio; ++i) load_row(rows[i + 2]);
#pragma unroll
    for (int ky = 0; ky < kTapsAlong; ++ky) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sums_of_next[ky][i] = 0;
#pragma unroll
      for (int i = 0; i < Ratio; ++i) {  // target i, of the output row ky - 1 above it
        // Outside: this row of the gradient is there, its target is not.
        if (ky == 0 && i == Ratio / 2 - 1 && is_above) continue;
        if (ky == 2 && i == Ratio / 2 && is_last) continue;
        add(scale * (1 - share_of_next<Ratio>(i)), rows[i + 2 - ky], sums[ky]);
        add(scale * share_of_next<Ratio>(i), rows[i + 2 - ky], sums_of_next[ky]);
      }
      if (is_above) add(1, sums[ky], sums_of_next[ky]);
      if (is_last) add(1, sums_of_next[ky], sums[ky]);
      if (interval >= 0) store<kQuad>(sums[ky], line + (interval * kTapsAlong + ky) * Tile::kLine);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sums[ky][i] = sums_of_next[ky][i];
    }
  }
}

// Sums along x for the taps of a kernel row at a source pixel, from its first target in a line on.
template <int Ratio>
__device__ __forceinline__ void gather_columns(const float* line, bool is_first, bool is_last,
                                               float (&sums)[kTapsAlong][kQuad]) {
#pragma unroll
  for (int column = 0; column < 2 * Ratio + 2; ++column) {
    float values[kQuad];
    load<kQuad>(line + column * kTileChannels, values);
#pragma unroll
    for (int kx = 0; kx < kTapsAlong; ++kx) {
      const int i =
          column - 2 + kx;  // target, of the interval before the source and the one behind
      if (i < 0 || i >= 2 * Ratio) continue;
      if (kx == 0 && i == Ratio / 2 - 1 && is_first) continue;  // outside
      if (kx == 2 && i == Ratio + Ratio / 2 && is_last) continue;
      const float share =
          i < Ratio ? share_of_next<Ratio>(i) : share_of_next<Ratio>(2 * Ratio - 1 - i);
      add((i < Ratio ? is_first : is_last) ? 1 : share, values, sums[kx]);
    }
  }
}

template <class T, int Ratio>
__global__ void __launch_bounds__(BackwardTile<Ratio>::kThreads, Ratio == 8 ? 2 : 3)
    tap_sum_backward_kernel(const TapSumBackwardSizes sizes, T* grad_taps, const T* grad_output,
                            const float* scale_pointer) {
  using Tile = BackwardTile<Ratio>;
  constexpr int kQuads = kTileChannels / kQuad;
  float* lines = dynamic_shared<float>();
  const auto place = BackwardPlace::of<Ratio>(sizes);
  const ImageStrides& strides = sizes.grad_taps.strides;
  const int in_height = sizes.height / Ratio, in_width = sizes.width / Ratio;
  const bool has_channels = place.channel < sizes.channels;

  const float scale = scale_pointer == nullptr ? 1 : *scale_pointer;
  const int target = threadIdx.x / kQuads;
  const int x = place.x * Ratio - Ratio / 2 - 1 + target;
  if (target < Tile::kTargets) {
    gather_rows<Ratio>(grad_output + place.image * sizes.grad_output.image +
                           x * sizes.grad_output.pixel + place.channel,
                       sizes.grad_output.row, has_channels && x >= 0 && x < sizes.width, place.y,
                       in_height, scale, lines + target * kTileChannels + place.quad);
  }
  __syncthreads();

  constexpr int kGroups = Tile::kThreads / (kQuads * Tile::kColumns);
  const int column = threadIdx.x / kQuads % Tile::kColumns, in_x = place.x + column;
  const int group = threadIdx.x / (kQuads * Tile::kColumns);
  if (!has_channels || in_x >= in_width || group >= kGroups) return;
  T* taps = grad_taps + place.image * strides.image + place.y * strides.row + in_x * strides.pixel +
            place.channel;
  for (int line = group; line < Tile::kRows * kTapsAlong; line += kGroups) {
    const int row = line / kTapsAlong, ky = line % kTapsAlong;
    if (place.y + row >= in_height) break;
    float sums[kTapsAlong][kQuad] = {};
    gather_columns<Ratio>(lines + line * Tile::kLine + column * Ratio * kTileChannels + place.quad,
                          in_x == 0, in_x == in_width - 1, sums);
    T* to = taps + row * strides.row + ky * kTapsAlong * sizes.channels;
#pragma unroll
    for (int kx = 0; kx < kTapsAlong; ++kx) store<kQuad>(sums[kx], to + kx * sizes.channels);
  }
}

}  // namespace fastfuse::cuda
