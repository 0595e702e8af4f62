// An example for the tests of the proof: what threads tell each other.
#include "cuda/elements.h"

namespace fastfuse::cuda {

constexpr int kBlock = 96, kWarps = kBlock / 32;

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Of each row: the sum, how many are negative, whether any is zero, the prefix sums of each warp.
__global__ void __launch_bounds__(kBlock) warp_sums(const float* input, int length, float* sums,
                                                    int* counts, int* zeros, float* prefixes) {
  __shared__ float of_warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float x = threadIdx.x < length ? input[blockIdx.x * length + threadIdx.x] : 1.0f;
  float prefix = x;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float other = __shfl_up_sync(~0u, prefix, lanes);
    if (lane >= lanes) prefix += other;
  }
  const float total = __shfl_sync(~0u, prefix, 31);
  const float sum = warp_sum(threadIdx.x < length ? x : 0.0f);
  if (lane == 0) of_warps[warp] = sum;
  const int negative = __syncthreads_count(x < 0);
  const int zero = __syncthreads_or(x == 0.0f);
  const bool all = __all_sync(~0u, x < total + 1e9f);
  const unsigned lanes = __ballot_sync(~0u, x >= 0);
  if (threadIdx.x < length)
    prefixes[blockIdx.x * length + threadIdx.x] = prefix + (all ? 0 : __popc(lanes));
  if (threadIdx.x == 0) {
    float whole = 0;
    for (const float part : of_warps) whole += part;
    sums[blockIdx.x] = whole;
    counts[blockIdx.x] = negative;
    zeros[blockIdx.x] = zero;
  }
}

}  // namespace fastfuse::cuda

FASTFUSE_API int fastfuse_warp_sums(const float* input, int rows, int length, float* sums,
                                    int* counts, int* zeros, float* prefixes, cudaStream_t stream) {
  using namespace fastfuse::cuda;
  return launch(warp_sums, rows, kBlock, 0, stream, input, length, sums, counts, zeros, prefixes);
}
