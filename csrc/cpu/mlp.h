// What the host functions of the MLP of blocks tell their vector bodies.
#pragma once

#include "cpu/image.h"
#include "cpu/isa_list.h"
#include "cpu/rows.h"

namespace fastfuse {

// out = x + keep[image] * scale * (W2 GELU(W1 n + b1) + b2), n = LN(inputs), or the inputs where
// there is no norm. Weights are in the accumulation type, without gaps.
struct Mlp {
  int64_t rows, channels, hidden;
  int64_t tile_bytes;         // of a tile's pixels, that should stay in the second-level cache
  Rows x, inputs, out, kept;  // kept: W1 n; there may be none
  Images images;
  const void *norm_weight, *norm_bias;  // or null
  double eps;
  const void *fc1_weight, *fc1_bias;  // (hidden, channels)
  const void *fc2_weight, *fc2_bias;  // (channels, hidden)
  const void* scale;                  // or null
};

struct MlpBackward {
  Mlp forward;  // without x and out; with kept the hidden tensor is not computed again
  Rows grad, grad_inputs;
  const void* fc1_transposed;  // (channels, hidden)
  const void* fc2_transposed;  // (hidden, channels), times the scale
  bool of_parameters;
};

// What parameters get, summed over the pixels of a part: where it lies among the part's values.
// Sums of tiles are added, so that no sum is long.
struct MlpSums {
  int64_t stride;              // of the matrices' rows, of which there are `hidden`
  int64_t fc1, fc2;            // sums of hidden gradient x input, and of activation x gradient
  int64_t fc1_bias, fc2_bias;  // hidden and channels
  int64_t norm_weight, norm_bias;
  int64_t values;
};

// to[c][r] = scale[r] from[r][c] of `rows` rows; there may be no scale. A unit is a panel of c.
struct Transposition {
  void* to;
  const void *from, *scale;
  int64_t rows, columns, stride;  // of from
};

// A unit is a panel of pixels.
struct MlpKernels {
  struct Kernel {
    void (*forward)(const Mlp&, int64_t begin, int64_t end, void* scratch);
    void (*backward)(const MlpBackward&, int64_t begin, int64_t end, void* sums, void* scratch);
    void (*transpose)(const Transposition&, int64_t begin, int64_t end);
    int64_t (*forward_bytes)(const Mlp&, int64_t panels);  // of scratch memory for so many
    int64_t (*backward_bytes)(const Mlp&, int64_t panels);
    MlpSums (*sums)(const Mlp&, bool of_matrices);
    int64_t panel;  // pixels
  } kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(MlpKernels, mlp_kernels)

}  // namespace fastfuse
