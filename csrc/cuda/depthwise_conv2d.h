// The CUDA kernels of depthwise_conv2d, as C calls them.
//
// They take channels_last images of float32, bfloat16 or float16 with
//   - kernel_size 3, 5 or 7, any dilation, none of the sizes 0;
//   - up to 2^30 rows of a batch, and neighbours in a kernel up to 2^26 elements apart along x;
//   - channels, and the strides of images, rows and pixels, multiples of 16 bytes;
//   - tensors that start at multiples of 16 bytes.
#pragma once

#include "cuda/runtime.h"

namespace fastfuse::cuda {

struct DepthwiseSizes {
  int32_t dtype, bias_dtype;  // a bias is of float32 or of the images' dtype
  int32_t batch, channels, height, width;
  int32_t kernel_size, dilation;
  int32_t flip;         // whether the kernel is turned by 180 degrees
  ImageStrides x, out;  // out: grad_output of backward_weight
  ImageStrides addend;  // of the forward op
};

}  // namespace fastfuse::cuda

// out = conv(x, weight) + bias + addend, of stride 1 and the same size. The weight is dense (C, k,
// k) of the images' dtype; bias and addend may be null.
FASTFUSE_API int fastfuse_depthwise_conv2d(const fastfuse::cuda::DepthwiseSizes* sizes, void* out,
                                           const void* x, const void* weight, const void* bias,
                                           const void* addend, cudaStream_t stream);

// How many partial sums backward_weight wants room for: partials is (chunks, k * k + 1, C).
FASTFUSE_API int32_t fastfuse_depthwise_conv2d_chunks(const fastfuse::cuda::DepthwiseSizes* sizes);

// grad_weight (C, k, k) and grad_bias (C), of the images' dtype, are dense.
FASTFUSE_API int fastfuse_depthwise_conv2d_backward_weight(
    const fastfuse::cuda::DepthwiseSizes* sizes, float* partials, void* grad_weight,
    void* grad_bias, const void* grad_output, const void* x, cudaStream_t stream);
