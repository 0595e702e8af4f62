// tap_sum forward: along x first, then along y.
//
// A block owns a tile of the output. For each level it upsamples the taps of a kernel row along x
// and sums them, to lines in shared memory: one for each kernel row and source row. Then each
// thread adds these to its run of output rows, which stay in registers until all levels are in.
// Runs start at multiples of all ratios: weights are constants, and borders are where runs end.
//
// At a ratio of 2 the outer taps of an axis are two targets, one source, apart. They add up before
// they are upsampled, UP(a)(x - 1) + UP(b)(x + 1) = UP(a + b one source on)(x - 1), except where
// one of them falls outside: there the other is alone.
#pragma once

#include "cuda/elements.h"
#include "cuda/tap_sum.h"

namespace fastfuse::cuda {

constexpr int kTapsAlong = 3;  // of the kernel, along an axis
constexpr int kRun = 8;        // targets of a thread along an axis
constexpr int kQuad = 4;       // channels of a thread

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int clamped(int index, int size) { return min(max(index, 0), size - 1); }

// ---- along an axis ---------------------------------------------------------------------------

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

using Quads = float[kRun][kQuad];

__device__ __forceinline__ void add(float scale, const float (&values)[kQuad],
                                    float (&total)[kQuad]) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) total[i] += scale * values[i];
}

// Adds to the totals from Begin to End what target i + Shift reads, for total i, of the sources
// that `load` gives. The first of all totals, or the last, may read nothing.
template <int Ratio, int Shift, int Begin = 0, int End = kRun, class Load>
__device__ __forceinline__ void upsample(const Load& load, float scale, bool skip_first,
                                         bool skip_last, Quads& totals) {
#pragma unroll
  for (int source = lower<Ratio>(Begin + Shift); source < lower<Ratio>(End - 1 + Shift) + 2;
       ++source) {
    float values[kQuad];
    load(source, values);
#pragma unroll
    for (int i = Begin; i < End; ++i) {
      const float weight = share<Ratio>(source, i + Shift);
      if (weight == 0 || (i == 0 && skip_first) || (i == kRun - 1 && skip_last)) continue;
      add(scale * weight, values, totals[i]);
    }
  }
}

// Adds to the totals what all taps give; `load` gives the values of a tap at a source.
template <int Ratio, class Load>
__device__ __forceinline__ void add_taps(const Load& load, float scale, bool is_first, bool is_last,
                                         Quads& totals) {
  const auto of = [&load](int tap) {
    return [&load, tap](int source, float (&values)[kQuad]) { load(tap, source, values); };
  };
  if constexpr (Ratio == 2) {
    const auto of_outer = [&load](int source, float (&values)[kQuad]) {
      float others[kQuad];
      load(0, source, values);
      load(2, source + 1, others);
      add(1, others, values);
    };
    upsample<2, -1>(of_outer, scale, is_first, is_last, totals);
    upsample<2, 0>(of(1), scale, false, false, totals);
    if (is_first) upsample<2, 1, 0, 1>(of(2), scale, false, false, totals);
    if (is_last) upsample<2, -1, kRun - 1>(of(0), scale, false, false, totals);
  } else {
    upsample<Ratio, -1>(of(0), scale, is_first, false, totals);
    upsample<Ratio, 0>(of(1), scale, false, false, totals);
    upsample<Ratio, 1>(of(2), scale, false, is_last, totals);
  }
}

struct TapSumPointers {
  void* out;
  const void* taps[kMaxLevels];
  const float *scales, *offsets, *bias;
};

// ---- tiles -----------------------------------------------------------------------------------

constexpr int kTileColumns = 8, kTileRows = 32, kTileChannels = 32;
constexpr int kTapSumThreads = kTileChannels / kQuad * kTileColumns * (kTileRows / kRun);

// A block's tile, and a thread's outputs.
struct TapSumPlace {
  int image, tile_y, tile_x, tile_channel;
  int y, x, channel;  // in the tile

  bool has_channels, is_inside;  // of the image

  __device__ explicit TapSumPlace(const TapSumSizes& sizes) {
    constexpr int kQuads = kTileChannels / kQuad;
    const int row_tiles = ceil_div(sizes.height, kTileRows), thread = threadIdx.x;
    image = blockIdx.z / row_tiles;
    tile_y = blockIdx.z % row_tiles * kTileRows;
    tile_x = blockIdx.y * kTileColumns;
    tile_channel = blockIdx.x * kTileChannels;
    channel = thread % kQuads * kQuad;
    x = thread / kQuads % kTileColumns;
    y = thread / (kQuads * kTileColumns) * kRun;
    has_channels = tile_channel + channel < sizes.channels;
    is_inside = has_channels && tile_y + y < sizes.height;
  }
};

// One level's taps, from a tile's channels on. Offsets are bytes, and those within an image fit 32
// bits: that takes few instructions and registers.
template <class S, int Ratio>
struct TapsOfTile {
  const char* start;
  int height, width;
  unsigned row_bytes, pixel_bytes, tap_bytes;

  __device__ TapsOfTile(const TapSumLevel& level, const void* taps, const TapSumSizes& sizes,
                        const TapSumPlace& place)
      : start(static_cast<const char*>(taps) +
              (place.image * level.strides.image + place.tile_channel) * sizeof(S)),
        height(sizes.height / Ratio),
        width(sizes.width / Ratio),
        row_bytes(static_cast<unsigned>(level.strides.row * sizeof(S))),
        pixel_bytes(static_cast<unsigned>(level.strides.pixel * sizeof(S))),
        tap_bytes(static_cast<unsigned>(sizes.channels * sizeof(S))) {}

  __device__ void load(unsigned offset, float (&values)[kQuad]) const {
    cuda::load<kQuad>(reinterpret_cast<const S*>(start + offset), values);
  }
  // Of a source row and a kernel row, clamped.
  __device__ unsigned row(int source, int ky) const {
    return clamped(source, height) * row_bytes + ky * kTapsAlong * tap_bytes;
  }
  __device__ unsigned column(int source) const { return clamped(source, width) * pixel_bytes; }
};

// ---- lines in shared memory ------------------------------------------------------------------

// Longer than its values: threads that write to neighbouring lines use other banks.
constexpr int kLine = kTileColumns * kTileChannels + 4;

// Of a kernel row, from the one of the source row above the tile on.
__host__ __device__ constexpr int lines_of_kernel_row(int ratio) { return kTileRows / ratio + 2; }

// The lines of a tile, by all threads: a thread sums a quad of a line's columns.
template <class S, int Ratio>
__device__ __forceinline__ void make_lines(const TapsOfTile<S, Ratio>& level,
                                           const TapSumPlace& place, float* lines) {
  static_assert(kTileColumns == kRun, "along x a thread has all of the tile");
  constexpr int kQuads = kTileChannels / kQuad, kLines = lines_of_kernel_row(Ratio);
  const int x = place.tile_x;
  for (int i = threadIdx.x / kQuads; i < kTapsAlong * kLines; i += kTapSumThreads / kQuads) {
    const unsigned row =
        level.row(place.tile_y / Ratio - 1 + i % kLines, i / kLines) + place.channel * sizeof(S);
    Quads totals = {};
    add_taps<Ratio>(
        [&](int tap, int source, float (&values)[kQuad]) {
          level.load(row + tap * level.tap_bytes + level.column(x / Ratio + source), values);
        },
        1, x == 0, x + kRun == level.width * Ratio, totals);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      store<kQuad>(totals[j], lines + i * kLine + j * kTileChannels + place.channel);
  }
}

// Adds the lines of a level to a run of output rows.
template <int Ratio>
__device__ __forceinline__ void add_lines(const float* lines, const TapSumPlace& place, int height,
                                          float scale, Quads& totals) {
  const float* run =
      lines + (place.y / Ratio + 1) * kLine + place.x * kTileChannels + place.channel;
  const int y = place.tile_y + place.y;
  add_taps<Ratio>(
      [&](int tap, int source, float (&values)[kQuad]) {
        load<kQuad>(run + (tap * lines_of_kernel_row(Ratio) + source) * kLine, values);
      },
      scale, y == 0, y + kRun == height, totals);
}

// ---- levels ----------------------------------------------------------------------------------

// A level of the output's size: every value of the taps is read by one output.
template <class S>
__device__ __forceinline__ void add_level_of_same_size(const TapsOfTile<S, 1>& level,
                                                       const TapSumPlace& place, float scale,
                                                       Quads& totals) {
#pragma unroll 1
  for (int tap = 0; tap < kTapsAlong * kTapsAlong; ++tap) {
    const int x = place.tile_x + place.x + tap % kTapsAlong - 1;
    const int y = place.tile_y + place.y + tap / kTapsAlong - 1;
    if (x < 0 || x >= level.width) continue;
    const unsigned offset = place.channel * sizeof(S) + tap * level.tap_bytes + level.column(x);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (y + i < 0 || y + i >= level.height) continue;
      float values[kQuad];
      level.load(offset + level.row(y + i, 0), values);
      add(scale, values, totals[i]);
    }
  }
}

// Level i, of taps of type S.
template <class S, int Ratio>
__device__ __forceinline__ void add_level(int i, const TapSumPointers& pointers,
                                          const TapSumSizes& sizes, const TapSumPlace& place,
                                          Quads& totals) {
  const TapsOfTile<S, Ratio> level(sizes.levels[i], pointers.taps[i], sizes, place);
  float* lines = dynamic_shared<float>();
  if constexpr (Ratio > 1) {
    __syncthreads();  // the lines of the level before are read
    if (place.has_channels) make_lines(level, place, lines);
    __syncthreads();
  }
  if (!place.is_inside) return;
  const float scale = pointers.scales == nullptr ? 1 : pointers.scales[1 + i];
  if constexpr (Ratio == 1) {
    add_level_of_same_size(level, place, scale, totals);
  } else {
    add_lines<Ratio>(lines, place, sizes.height, scale, totals);
  }
}

template <class S>
__device__ __forceinline__ void add_level(int i, const TapSumPointers& pointers,
                                          const TapSumSizes& sizes, const TapSumPlace& place,
                                          Quads& totals) {
  switch (sizes.levels[i].ratio) {
    case 1:
      return add_level<S, 1>(i, pointers, sizes, place, totals);
    case 2:
      return add_level<S, 2>(i, pointers, sizes, place, totals);
    case 4:
      return add_level<S, 4>(i, pointers, sizes, place, totals);
    case 8:
      return add_level<S, 8>(i, pointers, sizes, place, totals);
  }
}

// ---- the kernel ------------------------------------------------------------------------------

// The bias and the offsets of the taps that fall inside.
__device__ __forceinline__ void add_constants(const float* bias, const float* offsets,
                                              const TapSumSizes& sizes, const TapSumPlace& place,
                                              Quads& totals) {
  const int channel = place.tile_channel + place.channel;
  if (bias != nullptr) {
    float values[kQuad];
    load<kQuad>(bias + channel, values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) add(1, values, totals[i]);
  }
  if (offsets == nullptr) return;
#pragma unroll 1
  for (int tap = 0; tap < kTapsAlong * kTapsAlong; ++tap) {
    const int x = place.tile_x + place.x + tap % kTapsAlong - 1;
    const int y = place.tile_y + place.y + tap / kTapsAlong - 1;
    if (x < 0 || x >= sizes.width) continue;
    float values[kQuad];
    load<kQuad>(offsets + tap * sizes.channels + channel, values);
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (y + i >= 0 && y + i < sizes.height) add(1, values, totals[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kTapSumThreads, 2)
    tap_sum_kernel(const __grid_constant__ TapSumPointers pointers,
                   const __grid_constant__ TapSumSizes sizes) {
  const TapSumPlace place(sizes);
  const int y = place.tile_y + place.y, x = place.tile_x + place.x;
  const int channel = place.tile_channel + place.channel;

  Quads totals = {};
  if (place.is_inside) add_constants(pointers.bias, pointers.offsets, sizes, place, totals);

#pragma unroll 1
  for (int i = 0; i < sizes.num_levels; ++i) {
    TapSumPlace of_level = place;
    // Hides that all levels share it: what they would share ahead of the loop takes registers.
    asm volatile("" : "+r"(of_level.tile_y), "+r"(of_level.tile_x), "+r"(of_level.y));
    if (sizes.levels[i].dtype == sizes.dtype) {
      add_level<T>(i, pointers, sizes, of_level, totals);
    } else {
      add_level<float>(i, pointers, sizes, of_level, totals);
    }
  }

  if (!place.is_inside) return;
  T* out = static_cast<T*>(pointers.out) + place.image * sizes.out.image +
           (y * static_cast<unsigned>(sizes.out.row) + x * static_cast<unsigned>(sizes.out.pixel) +
            channel);
  if (sizes.accumulate) {
    const float base = pointers.scales == nullptr ? 1 : pointers.scales[0];
    const T* there = out;
#pragma unroll
    for (int i = 0; i < kRun; ++i, there += sizes.out.row) {
      float values[kQuad];
      load<kQuad>(there, values);
      add(base, values, totals[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i, out += sizes.out.row) store<kQuad>(totals[i], out);
}

}  // namespace fastfuse::cuda
