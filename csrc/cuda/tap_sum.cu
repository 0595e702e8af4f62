// Launches of tap_sum and its adjoint.
#include <algorithm>

#include "cuda/tap_sum.h"
#include "cuda/tap_sum_backward_kernels.cuh"
#include "cuda/tap_sum_kernels.cuh"

namespace fastfuse::cuda {
namespace {

// Lines that the levels need at most.
int lines_of(const TapSumSizes& sizes) {
  int lines = 0;
  for (int i = 0; i < sizes.num_levels; ++i) {
    const int ratio = sizes.levels[i].ratio;
    if (ratio > 1) lines = std::max(lines, kTapsAlong * lines_of_kernel_row(ratio));
  }
  return lines;
}

template <class T>
int launch_forward(const TapSumPointers& pointers, const TapSumSizes& sizes, cudaStream_t stream) {
  const dim3 grid(ceil_div(sizes.channels, kTileChannels), ceil_div(sizes.width, kTileColumns),
                  ceil_div(sizes.height, kTileRows) * sizes.batch);
  const size_t shared = sizeof(float) * kLine * lines_of(sizes);
  return launch(tap_sum_kernel<T>, grid, dim3(kTapSumThreads), shared, stream, pointers, sizes);
}

template <class T, int Ratio>
int launch_backward(const TapSumBackwardSizes& sizes, void* grad_taps, const void* grad_output,
                    const float* scale, cudaStream_t stream) {
  using Tile = BackwardTile<Ratio>;
  const dim3 grid(ceil_div(sizes.channels, kTileChannels),
                  ceil_div(sizes.width / Ratio, Tile::kColumns),
                  ceil_div(sizes.height / Ratio, Tile::kRows) * sizes.batch);
  return launch(tap_sum_backward_kernel<T, Ratio>, grid, dim3(Tile::kThreads), Tile::kSharedBytes,
                stream, sizes, static_cast<T*>(grad_taps), static_cast<const T*>(grad_output),
                scale);
}

template <class T>
int launch_backward(const TapSumBackwardSizes& sizes, void* grad_taps, const void* grad_output,
                    const float* scale, cudaStream_t stream) {
  switch (sizes.grad_taps.ratio) {
    case 2:
      return launch_backward<T, 2>(sizes, grad_taps, grad_output, scale, stream);
    case 4:
      return launch_backward<T, 4>(sizes, grad_taps, grad_output, scale, stream);
    default:
      return launch_backward<T, 8>(sizes, grad_taps, grad_output, scale, stream);
  }
}

}  // namespace
}  // namespace fastfuse::cuda

using namespace fastfuse::cuda;

int fastfuse_tap_sum(const TapSumSizes* sizes, void* out, const void* const* taps,
                     const float* scales, const float* offsets, const float* bias,
                     cudaStream_t stream) {
  TapSumPointers pointers = {out, {}, scales, offsets, bias};
  std::copy_n(taps, sizes->num_levels, pointers.taps);
  switch (sizes->dtype) {
    case kFloat32:
      return launch_forward<float>(pointers, *sizes, stream);
    case kBFloat16:
      return launch_forward<__nv_bfloat16>(pointers, *sizes, stream);
    default:
      return launch_forward<__half>(pointers, *sizes, stream);
  }
}

int fastfuse_tap_sum_backward(const TapSumBackwardSizes* sizes, void* grad_taps,
                              const void* grad_output, const float* scale, cudaStream_t stream) {
  switch (sizes->dtype) {
    case kFloat32:
      return launch_backward<float>(*sizes, grad_taps, grad_output, scale, stream);
    case kBFloat16:
      return launch_backward<__nv_bfloat16>(*sizes, grad_taps, grad_output, scale, stream);
    default:
      return launch_backward<__half>(*sizes, grad_taps, grad_output, scale, stream);
  }
}
