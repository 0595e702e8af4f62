// tap_sum forward: along x first, then along y.
//
// A block owns a tile of the output. For each level it upsamples the taps of a kernel row along x
// and sums them, to lines in shared memory: one for each kernel row and source row. Then each
// thread adds these to its run of output rows, which stay in registers until all levels are in.
// Runs start at multiples of all ratios: weights are constants, and borders are where runs end.
//
// At a ratio of 2 the outer kernel rows are two target rows, one source row, apart: they add up
// before they are upsampled, UP(a)(y - 1) + UP(b)(y + 1) = UP(a + b one row down)(y - 1), except
// where one of them falls outside.
#pragma once

#include <type_traits>

#include "cuda/elements.h"
#include "cuda/tap_sum.h"

namespace fastfuse::cuda {

constexpr int kTapsAlong = 3;  // of the kernel, along an axis
constexpr int kRun = 8;        // targets of one thread along an axis

// 16 bytes of the output.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Target t, counted from a multiple of Ratio, reads the sources lower(t) and lower(t) + 1; t >= -1.
template <int Ratio>
__device__ constexpr int lower(int target) {
  return (2 * target + 1 + Ratio) / (2 * Ratio) - 1;
}

// What a source weighs in a target.
template <int Ratio>
__device__ constexpr float share(int source, int target) {
  const float upper = (2 * target + 1 + Ratio) % (2 * Ratio) / (2.0f * Ratio);
  if (source == lower<Ratio>(target)) return 1 - upper;
  return source == lower<Ratio>(target) + 1 ? upper : 0;
}

template <int V>
__device__ __forceinline__ void add(float scale, const float (&values)[V], float (&total)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) total[i] += scale * values[i];
}

// Adds to `totals` what the targets First + Shift, First + Shift + 1, ... read of the sources that
// `load` gives. The first total, or the last, may read nothing.
template <int Ratio, int First, int Shift, int Count, int V, class Load>
__device__ __forceinline__ void upsample(Load load, float scale, bool skip_first, bool skip_last,
                                         float (&totals)[Count][V]) {
  constexpr int kBegin = lower<Ratio>(First + Shift);
  constexpr int kEnd = lower<Ratio>(First + Shift + Count - 1) + 2;
#pragma unroll
  for (int source = kBegin; source < kEnd; ++source) {
    float values[V];
    load(source, values);
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const float weight = share<Ratio>(source, First + Shift + i);
      if (weight == 0 || (i == 0 && skip_first) || (i == Count - 1 && skip_last)) continue;
      add(scale * weight, values, totals[i]);
    }
  }
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int clamped(int index, int size) {
  return min(max(index, 0), size - 1);
}

// ---- lines of a tile in shared memory --------------------------------------------------------

constexpr int kTileColumns = 8, kTileRows = 32, kTileChannels = 32;
constexpr int kQuad = 4;  // channels of a thread
constexpr int kQuads = kTileChannels / kQuad;
constexpr int kTapSumThreads = kQuads * kTileColumns * (kTileRows / kRun);
constexpr int kSegment = 4;  // columns of a line that a thread sums at once

// Longer than its values: threads that write to neighbouring lines use other banks.
constexpr int kLine = kTileColumns * kTileChannels + 4;

// Where a block's tile and a thread's outputs are.
struct TapSumPlace {
  int image, tile_channel, tile_y, tile_x;
  int quad, column, run;  // of the thread, in the tile

  __device__ int channel() const { return tile_channel + quad * kQuad; }
  __device__ int y() const { return tile_y + run * kRun; }
  __device__ int x() const { return tile_x + column; }
};

// One level's taps, from a tile's channels on.
template <class S>
struct TapsOfTile {
  const S* taps;
  int channels, height, width;
  int64_t row_stride;
  int pixel_stride;

  __device__ TapsOfTile(const TapSumLevel& level, const void* taps, int channels,
                        const TapSumPlace& place)
      : taps(static_cast<const S*>(taps) + place.image * level.strides.image +
             place.tile_channel),
        channels(channels),
        height(level.height),
        width(level.width),
        row_stride(level.strides.row),
        pixel_stride(static_cast<int>(level.strides.pixel)) {}

  // The taps of a kernel row in a source row, or in the one next to it.
  __device__ const S* row(int ky, int source) const {
    return taps + clamped(source, height) * row_stride + ky * kTapsAlong * channels;
  }
};

// Which rows of taps the lines of a tile are: by kernel row, from the source row above the tile on.
template <int Ratio>
struct LinesOf {
  static constexpr int kRows = kTileRows / Ratio + 2;
  static constexpr int kCount = kTapsAlong * kRows;

  template <class S>
  __device__ static const S* row(const TapsOfTile<S>& level, int line, int first_source) {
    return level.row(line / kRows, first_source + line % kRows);
  }
};

// The sums of the outer kernel rows, the middle one, then what the output's first row reads of the
// lowest kernel row, and its last row of the uppermost one.
template <>
struct LinesOf<2> {
  static constexpr int kRows = kTileRows / 2 + 2;
  static constexpr int kOuter = 0, kMiddle = kRows - 1;
  static constexpr int kFirst = kMiddle + kRows, kLast = kFirst + 2;
  static constexpr int kCount = kLast + 2;

  template <class S>  // of all but the sums
  __device__ static const S* row(const TapsOfTile<S>& level, int line, int first_source) {
    if (line < kFirst) return level.row(1, first_source + line - kMiddle);
    return line < kLast ? level.row(2, line - kFirst)
                        : level.row(0, level.height - 2 + line - kLast);
  }
};

template <int V>
__device__ __forceinline__ void store_channels(const float (&values)[V], float* to) {
#pragma unroll
  for (int i = 0; i < V; i += kQuad) {
    const float quad[kQuad] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
    store<kQuad>(quad, to + i);
  }
}

// ---- along x ---------------------------------------------------------------------------------

// Sums along x what the taps in a row give, or in two rows, to a segment of a line: the columns
// from First on of the run that starts at x.
template <int Ratio, int First, bool IsPair, int V, class S>
__device__ __forceinline__ void make_segment(const TapsOfTile<S>& level, const S* row,
                                             const S* other_row, int x, float* to) {
  constexpr int kBegin = lower<Ratio>(First - 1), kEnd = lower<Ratio>(First + kSegment) + 2;
  int offsets[kEnd - kBegin];  // of the source columns
#pragma unroll
  for (int i = 0; i < kEnd - kBegin; ++i)
    offsets[i] = clamped(x / Ratio + kBegin + i, level.width) * level.pixel_stride;
  float totals[kSegment][V] = {};
  const bool is_first = First == 0 && x == 0;
  const bool is_last = First > 0 && x + kRun == level.width * Ratio;
  int tap = 0;
  const auto load_taps = [&](int source, float(&values)[V]) {
    const int offset = tap + offsets[source - kBegin];
    load<V>(row + offset, values);
    if constexpr (IsPair) {
      float others[V];
      load<V>(other_row + offset, others);
      add(1, others, values);
    }
  };
  // Not unrolled: to load all pairs at once takes too many registers.
#pragma unroll 1
  for (int kx = 0; kx < kTapsAlong; ++kx, tap += level.channels) {
    if (kx == 0) {
      upsample<Ratio, First, -1>(load_taps, 1, is_first, false, totals);
    } else if (kx == 1) {
      upsample<Ratio, First, 0>(load_taps, 1, false, false, totals);
    } else {
      upsample<Ratio, First, 1>(load_taps, 1, false, is_last, totals);
    }
  }
#pragma unroll
  for (int i = 0; i < kSegment; ++i) store_channels(totals[i], to + i * kTileChannels);
}

template <int Ratio, int First, int V, class S>
__device__ __forceinline__ void make_segment(const TapsOfTile<S>& level, int line,
                                             int first_source, int x, float* to) {
  using Lines = LinesOf<Ratio>;
  if constexpr (Ratio == 2) {
    if (line < Lines::kMiddle) {
      const int source = first_source + line;
      make_segment<2, First, true, V>(level, level.row(0, source), level.row(2, source + 1), x, to);
      return;
    }
  }
  const S* row = Lines::row(level, line, first_source);
  make_segment<Ratio, First, false, V>(level, row, row, x, to);
}

// The lines of a tile, by all threads.
template <int Ratio, class S>
__device__ __forceinline__ void make_lines(const TapsOfTile<S>& level, const TapSumPlace& place,
                                           float* lines) {
  constexpr int V = kVector<S>;
  constexpr int kVectors = kTileChannels / V, kRuns = kTileColumns / kRun;
  constexpr int kLines = LinesOf<Ratio>::kCount;
  constexpr int kItems = kRun / kSegment * kRuns * kLines * kVectors;
  const int first_source = place.tile_y / Ratio - 1;
  for (int item = threadIdx.x; item < kItems; item += kTapSumThreads) {
    const int channel = item % kVectors * V;
    const int line = item / kVectors % kLines;
    const int run = item / (kVectors * kLines) % kRuns;
    const bool is_second = item >= kItems / 2;  // segment of the run
    const int x = place.tile_x + run * kRun;
    if (place.tile_channel + channel >= level.channels || x >= level.width * Ratio) continue;
    TapsOfTile<S> of_vector = level;
    of_vector.taps += channel;
    float* to = lines + line * kLine + (run * kRun + is_second * kSegment) * kTileChannels + channel;
    if (is_second) {
      make_segment<Ratio, kSegment, V>(of_vector, line, first_source, x, to);
    } else {
      make_segment<Ratio, 0, V>(of_vector, line, first_source, x, to);
    }
  }
}

// ---- along y ---------------------------------------------------------------------------------

// Adds the lines of a level to a run of output rows.
template <int Ratio>
__device__ __forceinline__ void add_lines(const float* lines, const TapSumPlace& place, int height,
                                          float scale, float (&totals)[kRun][kQuad]) {
  using Lines = LinesOf<Ratio>;
  const bool is_first = place.y() == 0, is_last = place.y() + kRun == height;
  const float* column = lines + place.column * kTileChannels + place.quad * kQuad;
  const float* run = column + (place.run * (kRun / Ratio) + 1) * kLine;
  const auto add_row = [&](auto shift, int first_line, bool skip_first, bool skip_last) {
    upsample<Ratio, 0, decltype(shift)::value>(
        [&](int source, float(&values)[kQuad]) {
          load<kQuad>(run + (first_line + source) * kLine, values);
        },
        scale, skip_first, skip_last, totals);
  };
  if constexpr (Ratio == 2) {
    add_row(std::integral_constant<int, -1>(), Lines::kOuter, is_first, is_last);
    add_row(std::integral_constant<int, 0>(), Lines::kMiddle, false, false);
    const auto add_line = [&](int line, float weight, float(&total)[kQuad]) {
      float values[kQuad];
      load<kQuad>(column + line * kLine, values);
      add(scale * weight, values, total);
    };
    if (is_first) {
      add_line(Lines::kFirst, 0.75f, totals[0]);
      add_line(Lines::kFirst + 1, 0.25f, totals[0]);
    }
    if (is_last) {
      add_line(Lines::kLast, 0.25f, totals[kRun - 1]);
      add_line(Lines::kLast + 1, 0.75f, totals[kRun - 1]);
    }
  } else {
    add_row(std::integral_constant<int, -1>(), 0, is_first, false);
    add_row(std::integral_constant<int, 0>(), Lines::kRows, false, false);
    add_row(std::integral_constant<int, 1>(), 2 * Lines::kRows, false, is_last);
  }
}

// ---- of a level ------------------------------------------------------------------------------

// A level of the output's size: every value of the taps is read by one output.
template <class S>
__device__ __forceinline__ void add_level_of_same_size(const TapsOfTile<S>& level,
                                                       const TapSumPlace& place, float scale,
                                                       float (&totals)[kRun][kQuad]) {
#pragma unroll 1
  for (int tap = 0; tap < kTapsAlong * kTapsAlong; ++tap) {
    const int ky = tap / kTapsAlong, kx = tap % kTapsAlong, x = place.x() + kx - 1;
    if (x < 0 || x >= level.width) continue;
    const S* from = level.taps + place.quad * kQuad + tap * level.channels + x * level.pixel_stride;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int y = place.y() + i + ky - 1;
      if (y < 0 || y >= level.height) continue;
      float values[kQuad];
      load<kQuad>(from + y * level.row_stride, values);
      add(scale, values, totals[i]);
    }
  }
}

template <int Ratio, class S>
__device__ __forceinline__ void add_level(const TapsOfTile<S>& level, const TapSumPlace& place,
                                          bool is_inside, float scale, float* lines,
                                          float (&totals)[kRun][kQuad]) {
  if constexpr (Ratio == 1) {
    if (is_inside) add_level_of_same_size(level, place, scale, totals);
  } else {
    __syncthreads();  // the lines of the level before are read
    make_lines<Ratio>(level, place, lines);
    __syncthreads();
    if (is_inside) add_lines<Ratio>(lines, place, level.height * Ratio, scale, totals);
  }
}

template <class S>
__device__ __forceinline__ void add_level(const TapsOfTile<S>& level, const TapSumPlace& place,
                                          bool is_inside, int ratio, float scale, float* lines,
                                          float (&totals)[kRun][kQuad]) {
  switch (ratio) {
    case 1: return add_level<1>(level, place, is_inside, scale, lines, totals);
    case 2: return add_level<2>(level, place, is_inside, scale, lines, totals);
    case 4: return add_level<4>(level, place, is_inside, scale, lines, totals);
    default: return add_level<8>(level, place, is_inside, scale, lines, totals);
  }
}

// ---- the kernel ------------------------------------------------------------------------------

struct TapSumPointers {
  void* out;
  const void* taps[kMaxLevels];
  const float *scales, *offsets, *bias;
};

// The bias and the offsets of the taps that fall inside.
__device__ __forceinline__ void add_constants(const float* bias, const float* offsets,
                                              const TapSumSizes& sizes, const TapSumPlace& place,
                                              float (&totals)[kRun][kQuad]) {
  const int channel = place.channel();
  if (bias != nullptr) {
    float values[kQuad];
    load<kQuad>(bias + channel, values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) add(1, values, totals[i]);
  }
  if (offsets == nullptr) return;
#pragma unroll 1
  for (int ky = 0; ky < kTapsAlong; ++ky) {
    float sum[kQuad] = {};
    for (int kx = 0; kx < kTapsAlong; ++kx) {
      const int x = place.x() + kx - 1;
      if (x < 0 || x >= sizes.width) continue;
      float offset[kQuad];
      load<kQuad>(offsets + (ky * kTapsAlong + kx) * sizes.channels + channel, offset);
      add(1, offset, sum);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int y = place.y() + i + ky - 1;
      if (y >= 0 && y < sizes.height) add(1, sum, totals[i]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTapSumThreads, 2)
    tap_sum_kernel(const __grid_constant__ TapSumPointers pointers,
                   const __grid_constant__ TapSumSizes sizes) {
  float* lines = dynamic_shared<float>();
  const int channel_tiles = ceil_div(sizes.channels, kTileChannels);
  const int thread = threadIdx.x;
  const TapSumPlace place = {
      static_cast<int>(blockIdx.z),
      static_cast<int>(blockIdx.x) % channel_tiles * kTileChannels,
      static_cast<int>(blockIdx.y) * kTileRows,
      static_cast<int>(blockIdx.x) / channel_tiles * kTileColumns,
      thread % kQuads,
      thread / kQuads % kTileColumns,
      thread / (kQuads * kTileColumns),
  };
  const bool is_inside = place.channel() < sizes.channels &&
                         place.x() < sizes.width && place.y() < sizes.height;

  float totals[kRun][kQuad] = {};
  if (is_inside) add_constants(pointers.bias, pointers.offsets, sizes, place, totals);

#pragma unroll 1
  for (int i = 0; i < sizes.num_levels; ++i) {
    const TapSumLevel level = sizes.levels[i];
    const void* taps = pointers.taps[i];
    const float scale = pointers.scales == nullptr ? 1 : pointers.scales[1 + i];
    if (level.dtype == sizes.dtype) {
      add_level(TapsOfTile<T>(level, taps, sizes.channels, place), place, is_inside,
                sizes.height / level.height, scale, lines, totals);
    } else {
      add_level(TapsOfTile<float>(level, taps, sizes.channels, place), place, is_inside,
                sizes.height / level.height, scale, lines, totals);
    }
  }

  if (!is_inside) return;
  T* out = static_cast<T*>(pointers.out) + place.image * sizes.out.image +
           place.y() * sizes.out.row + place.x() * sizes.out.pixel + place.channel();
  const float base = pointers.scales == nullptr ? 1 : pointers.scales[0];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (sizes.accumulate) {
      float there[kQuad];
      load<kQuad>(out + i * sizes.out.row, there);
      add(base, there, totals[i]);
    }
    store<kQuad>(totals[i], out + i * sizes.out.row);
  }
}

}  // namespace fastfuse::cuda
