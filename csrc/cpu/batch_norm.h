// What the host functions of batch norms tell their vector bodies.
#pragma once

#include "cpu/image.h"
#include "cpu/isa_list.h"
#include "cpu/rows.h"

namespace fastfuse {

// Vectors are in the accumulation type, of a value for each channel.
struct RowMoments {
  int64_t rows, channels;
  Rows x;
  void* moments;  // of each block of kRowBlock rows, means and sums of squares less them
};

// out = ReLU(skip + keep * (x * scale + offset))
struct NormRelu {
  int64_t rows, channels;
  Rows x, skip, out;  // there may be no skip
  const void *scale, *offset;
  Images images;
};

// grad = grad_output where ReLU let something through, else 0; and over rows the sums of
// keep * grad and of keep * grad * (x - mean)
struct NormReluBackward {
  NormRelu forward;  // its out: written, where there is one
  const void* mean;
  Rows result;  // of forward, where there was a skip
  Rows grad_output, grad;
  void* sums;
};

// grad_x = keep * grad * scale [+ (x - mean) * slope + offset, where there is a slope]
struct NormBackward {
  int64_t rows, channels;
  Rows x, grad, grad_x;
  const void *mean, *scale, *slope, *offset;
  Images images;
};

// Bodies do the rows [begin, end), or the blocks where there are sums.
struct BatchNormKernels {
  struct Kernel {
    void (*row_moments)(const RowMoments&, int64_t begin, int64_t end);
    void (*norm_relu)(const NormRelu&, int64_t begin, int64_t end);
    void (*norm_relu_backward)(const NormReluBackward&, int64_t begin, int64_t end);
    void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end);
  };
  Kernel kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(BatchNormKernels, batch_norm_kernels)

}  // namespace fastfuse
