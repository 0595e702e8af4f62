// What the host functions of depthwise_conv2d tell its vector bodies.
#pragma once

#include <cstdint>

#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// Channels are processed a group at a time, a group being one or two vectors. A dilated convolution
// is `phases` independent ones, each of every dilation-th row; rows of a phase are cut into tiles,
// and so are columns, into parts at least as wide as the kernel reaches, so that the rows a result
// needs stay in the first-level cache. A tile depends on no other.
struct DepthwiseTiles {
  int64_t batch, channels, height, width;
  int64_t kernel_size, dilation;
  int64_t group_channels, groups;
  int64_t phases, row_tiles, column_tiles;  // per group and image
  int64_t column_unit;                      // what tiles are multiples of

  int64_t tiles() const { return batch * phases * row_tiles * column_tiles; }  // of a group
};

// out = conv(x, weight) + bias + addend, with the kernel turned by 180 degrees on demand. Weight is
// dense (C, k, k) and bias (C), both in the storage type; no bias and no addend where null.
struct DepthwiseForward {
  DepthwiseTiles tiles;
  Image x, addend, out;
  const void* weight;
  const void* bias;
  bool flip;
};

// Sums over part `p` of a group's tiles, those from p * tiles / parts on, are at
// sums[(group * parts + p) * (k * k + 1) * group_channels]: a vector per tap, then that of the
// bias.
struct DepthwiseWeightGradient {
  DepthwiseTiles tiles;
  Image x, grad_output;
  int64_t parts;
  void* sums;
  void* grad_weight;  // (C, k, k)
  void* grad_bias;    // (C)
};

// Bodies do the units [begin, end) with scratch memory of their own: forward a tile of a group,
// groups outermost, `sum` a part of a group, and `reduce` a group.
struct DepthwiseKernels {
  struct Kernel {
    int64_t lanes;  // channels of a vector
    int64_t (*scratch)(const DepthwiseTiles&);
    void (*forward[2])(const DepthwiseForward&, int64_t begin, int64_t end, void* scratch);
    void (*sum[2])(const DepthwiseWeightGradient&, int64_t begin, int64_t end, void* scratch);
    void (*reduce)(const DepthwiseWeightGradient&, int64_t begin, int64_t end);
  };
  Kernel kernels[kNumDtypes];  // bodies by channels_last
};

FASTFUSE_DECLARE_KERNELS(DepthwiseKernels, depthwise_kernels)

}  // namespace fastfuse
