// What the host functions of tap_sum tell its vector bodies.
#pragma once

#include <cstdint>

#include "cpu/bilinear.h"
#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// channels_last bodies make so many results of neighbours at once, from what they share: columns of
// the output forward, taps along an axis backward.
constexpr int kPair = 2, kTaps = 3;

// The terms of groups of results along one axis: those of group g are the entries
// begin[g] <= e < begin[g + 1], what stands at offset[e], times weight[e * results + r] for result
// r of the group, 0 where it does not count. Taps that fall outside have no entry.
struct TapTable {
  const int32_t* begin;
  const int64_t* offset;
  const void* weight;  // of the compute type
};

// One level's taps: (N, k * k * C, h, w), its channels tap-major.
struct TapLevel {
  Image taps;
  int64_t tap_stride;  // elements from a tap to the next
  double scale;
  // Forward: with channels_last `axis` is y and `terms` go along x in pairs of columns, else the
  // other way round, one by one. Backward, channels_last: along x, in groups of kTaps kx.
  Sampling axis;
  TapTable terms;  // offsets in elements; contiguous ones have the scale in the weights
  AdjointSampling adjoint_y, adjoint_x;  // backward
  int64_t ring_rows;  // backward, channels_last: rows of the gradient that one source row reads
};

// Forward writes `out` from every level; backward reads `out`, a gradient, and writes levels[0].
struct TapSum {
  int64_t batch, channels, kernel_size, padding;
  int64_t height, width;  // of the upsampled map
  Image out;
  const TapLevel* levels;
  int64_t num_levels;
  bool accumulate;  // what stands in `out`, times base_scale, is the first term
  double base_scale;
  const void* offsets;  // (k * k * C,) of the compute type, or null
  const void* bias;     // (C,) of the compute type, or null
  int64_t ring_bytes;   // of a tile's rows, with channels_last
  bool stream;          // write past the caches: what is written is large and of whole lines
};

// A body does the units [begin, end); a unit's result does not depend on who does it.
struct TapSumKernel {
  void (*body)(const TapSum&, int64_t begin, int64_t end, void* scratch);
  int64_t (*units)(const TapSum&);
  int64_t (*scratch)(const TapSum&);  // bytes
};

struct TapSumKernels {
  TapSumKernel forward[2][kNumDtypes];  // [channels_last][dtype]
  TapSumKernel backward[2][kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(TapSumKernels, tap_sum_kernels)

}  // namespace fastfuse
