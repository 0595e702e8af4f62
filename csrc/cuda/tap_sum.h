// tap_sum in CUDA: levels of taps are upsampled, shifted and summed, and the adjoint of that.
//
// Both cover kernels of 3 x 3 with a padding of 1 and without align_corners, where
// - dtypes are float32, bfloat16 and float16; a level's taps have the output's dtype or float32,
// - channels are contiguous, and their number, all strides and addresses, those of vectors as well,
//   multiples of 4 elements,
// - the output's sides are the same multiple of a level's: 1, 2, 4 or 8 forward, and then they are
//   multiples of 8; 2, 4 or 8 backward, where gradients of taps and output have one dtype,
// - offsets within an image of a level, or of the output, are below 2^32 bytes,
// - there are up to 8 levels, 524280 columns, and batch * ceil(height / 32) <= 65535 forward,
//   batch * ceil(height / ratio / 4) <= 65535 backward.
#pragma once

#include "cuda/runtime.h"

namespace fastfuse::cuda {

constexpr int kMaxLevels = 8;

// The taps of a level: (N, 9 * C, height / ratio, width / ratio), their channels tap-major.
struct TapSumLevel {
  ImageStrides strides;
  int32_t ratio;
  int32_t dtype;  // the output's or float32
};

struct TapSumSizes {
  ImageStrides out;
  int32_t dtype, batch, channels, height, width;
  int32_t accumulate, num_levels, unused;
  TapSumLevel levels[kMaxLevels];
};

// grad_taps is a level in the dtype of grad_output.
struct TapSumBackwardSizes {
  ImageStrides grad_output;
  int32_t dtype, batch, channels, height, width, unused;
  TapSumLevel grad_taps;
};

}  // namespace fastfuse::cuda

// out = (accumulate ? scales[0] * out : 0) + bias + sum_i scales[1 + i] * tap_sum(taps[i]), with
// the offsets (9 * C,), which are not scaled, added wherever their tap falls inside. Scales,
// offsets and bias are float32 on the device, null for 1, 0 and 0; taps is a list on the host.
FASTFUSE_API int fastfuse_tap_sum(const fastfuse::cuda::TapSumSizes* sizes, void* out,
                                  const void* const* taps, const float* scales,
                                  const float* offsets, const float* bias, cudaStream_t stream);

// grad_taps = scale * the adjoint of tap_sum, of grad_output.
FASTFUSE_API int fastfuse_tap_sum_backward(const fastfuse::cuda::TapSumBackwardSizes* sizes,
                                           void* grad_taps, const void* grad_output,
                                           const float* scale, cudaStream_t stream);
