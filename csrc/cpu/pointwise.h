// What the host functions of the pointwise steps tell their vector bodies.
#pragma once

#include <cstdint>

#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// A matrix with unit stride along channels; null where there is none.
struct Rows {
  void* data;
  int64_t stride;
};

// Vectors are in the accumulation type. A sum over rows is made of sums over blocks of kRowBlock
// rows, whichever threads do them: block b's are at sums[b * (number of sums) * channels].
constexpr int64_t kRowBlock = 128;

struct LayerNorm {
  int64_t rows, channels;
  Rows x, skip, out;
  const void *weight, *bias;
  double eps;
  bool gelu;
};

struct LayerNormBackward {
  LayerNorm forward;  // without skip and out
  Rows grad_output, grad_x;
  void* sums;  // of the gradients of weight and bias
};

struct BiasGelu {
  int64_t rows, channels;
  Rows hidden, out, grad;  // grad: backward only, in and out
  const void* bias;
  void* sums;  // of grad
};

struct BiasRelu {
  int64_t rows, channels;
  Rows product, skip, out;  // skip: added before; there may be none
  const void* bias;
};

struct Residual {
  int64_t rows, channels;
  Rows x, product, out;  // backward: x is the gradient, and there is no product
  const void *bias, *scale, *keep;
  int64_t pixels, first;
  void* sums;
};

// Forward bodies do the rows [begin, end), backward ones the blocks, with scratch memory for one
// row in the accumulation type.
struct PointwiseKernels {
  struct Kernel {
    void (*layer_norm)(const LayerNorm&, int64_t begin, int64_t end, void* scratch);
    void (*layer_norm_backward)(const LayerNormBackward&, int64_t begin, int64_t end,
                                void* scratch);
    void (*bias_gelu)(const BiasGelu&, int64_t begin, int64_t end);
    void (*bias_gelu_backward)(const BiasGelu&, int64_t begin, int64_t end);
    void (*bias_relu)(const BiasRelu&, int64_t begin, int64_t end);
    void (*residual)(const Residual&, int64_t begin, int64_t end);
    void (*residual_backward)(const Residual&, int64_t begin, int64_t end);
  };
  Kernel kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(PointwiseKernels, pointwise_kernels)

}  // namespace fastfuse
