// What the host functions of tap_sum tell its vector bodies.
#pragma once

#include <cstdint>

#include "cpu/bilinear.h"
#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// channels_last bodies make so many results at once along x, from what these share: columns of the
// output forward, taps of a kernel row backward.
constexpr int kColumnsAtOnce = 2, kTapsAtOnce = 3;

// The terms of groups of results along one axis: those of group g are the entries
// begin[g] <= e < begin[g + 1], what stands at offset[e], times weight[e * results + r] for result
// r of the group, 0 where it does not count. Taps that fall outside have no entry.
struct TapTable {
  const int32_t* begin;
  const int64_t* offset;  // in elements
  const void* weight;     // of the compute type
};

// The taps of one level: (N, k * k * C, h, w), their channels tap-major.
struct Taps {
  Image image;
  int64_t stride;  // elements from a tap to the next
  double scale;
};

// What both directions know.
struct TapSum {
  int64_t batch, channels, kernel_size, padding;
  int64_t height, width;  // of the upsampled map
  Image out;              // the sum, or its gradient
  int64_t ring_bytes;     // of a tile's rows, with channels_last
  bool stream;            // write past the caches: what is written is large and of whole lines
};

// A level's taps go along one axis first, by a table, and along the other one then. With
// channels_last the first axis is x, and groups are kColumnsAtOnce columns; else it is y, groups
// are single rows and their weights have the scale.
struct TapSumLevel {
  Taps taps;
  TapTable first;
  Sampling second;
};

// out = (accumulate ? base_scale * out : 0) + bias + what the levels and offsets add.
struct TapSumForward : TapSum {
  const TapSumLevel* levels;
  int64_t num_levels;
  bool accumulate;
  double base_scale;
  const void* offsets;  // (k * k * C,) of the compute type, or null
  const void* bias;     // (C,) of the compute type, or null
};

// Reads `out` and writes the taps of one level.
struct TapSumBackward : TapSum {
  Taps taps;
  AdjointSampling y, x;
  // With channels_last: what goes along x, for each source column in groups of kTapsAtOnce, and the
  // rows of the gradient that one source row reads, at most.
  TapTable columns;
  int64_t ring_rows;
};

// A body does the units [begin, end); a unit's result does not depend on who does it.
template <class Op>
struct TapSumKernel {
  void (*body)(const Op&, int64_t begin, int64_t end, void* scratch);
  int64_t (*units)(const Op&);
  int64_t (*scratch)(const Op&);  // bytes
};

struct TapSumKernels {
  TapSumKernel<TapSumForward> forward[2][kNumDtypes];  // [channels_last][dtype]
  TapSumKernel<TapSumBackward> backward[2][kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(TapSumKernels, tap_sum_kernels)

}  // namespace fastfuse
