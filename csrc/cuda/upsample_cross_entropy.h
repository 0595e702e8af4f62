// The CUDA kernels of upsample_cross_entropy, as C calls them.
//
// They take logits of float32, bfloat16 or float16 with
//   - a target 2, 4 or 8 times as high and as wide, without align_corners;
//   - at most 1024 classes;
//   - any strides, of rows and columns below 2^27.
// Threads of forward lie along classes or along columns, whichever are innermost in memory, those
// of backward along classes. Gradients of the loss are below 2^25.
#pragma once

#include "cuda/runtime.h"

namespace fastfuse::cuda {

// In elements.
struct LogitsStrides {
  int64_t image, channel, row, column;
};

struct CrossEntropySizes {
  int32_t dtype, batch, classes, in_height, in_width;
  int32_t ratio;              // of the target's sides
  int32_t classes_innermost;  // in the logits of forward, in their gradient in backward
  float label_smoothing;
  int64_t ignore_index;
  LogitsStrides logits;
  LogitsStrides grad_logits;                  // backward's
  int64_t grad_image, grad_row, grad_column;  // strides of backward's grad
};

}  // namespace fastfuse::cuda

// The target is a dense (N, H, W). The weight (C,) may be null; so is its sum then, or without
// smoothing. Loss and log-sum-exp are dense (N, H, W), at multiples of 16 bytes.
FASTFUSE_API int fastfuse_upsample_cross_entropy(const fastfuse::cuda::CrossEntropySizes* sizes,
                                                 float* loss, float* logsumexp, const void* logits,
                                                 const int64_t* target, const float* weight,
                                                 const float* weight_sum, cudaStream_t stream);

// The grad (N, H, W) has any strides.
FASTFUSE_API int fastfuse_upsample_cross_entropy_backward(
    const fastfuse::cuda::CrossEntropySizes* sizes, void* grad_logits, const float* grad,
    const void* logits, const int64_t* target, const float* weight, const float* weight_sum,
    const float* logsumexp, cudaStream_t stream);
