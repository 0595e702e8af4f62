// What the host functions of the pointwise steps tell their vector bodies.
#pragma once

#include "cpu/image.h"
#include "cpu/isa_list.h"
#include "cpu/rows.h"

namespace fastfuse {

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
  Images images;
  const void *bias, *scale;
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
