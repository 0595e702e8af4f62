// An example for the tests of the proof: a product of matrices by tensor cores, [M, K] times
// [K, N]; M and N are multiples of 16, K of 16 too.
#include "cuda/mma.h"

namespace fastfuse::cuda {

// A block of one warp: 16 x 16 results.
template <class T>
__global__ void __launch_bounds__(32)
    matrix_product(const T* a, const T* b, float* product, int N, int K) {
  __shared__ __align__(16) T of_a[16][16 + 8];  // padded: rows lie in different banks
  __shared__ __align__(16) T of_b[16][16 + 8];
  const int lane = threadIdx.x, row = lane % 16, half = lane / 16 * 8;
  const int top = blockIdx.y * 16, left = blockIdx.x * 16;
  float sums[2][4] = {};
  for (int k = 0; k < K; k += 16) {
    copy_async<16>(&of_a[row][half], &a[(top + row) * K + k + half]);
    copy_async<16>(&of_b[row][half], &b[(k + row) * N + left + half]);
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
    uint32_t operand_a[4], operands_b[4];
    load_matrices(operand_a, &of_a[row][half]);
    load_transposed_matrices(operands_b, &of_b[row][half]);
    mma_16816<T>(sums[0], operand_a, {operands_b[0], operands_b[1]});
    mma_16816<T>(sums[1], operand_a, {operands_b[2], operands_b[3]});
    __syncwarp();
  }
  for (int side = 0; side < 2; ++side)
    for (int i = 0; i < 4; ++i)
      product[(top + lane / 4 + i / 2 * 8) * N + left + side * 8 + lane % 4 * 2 + i % 2] =
          sums[side][i];
}

}  // namespace fastfuse::cuda

FASTFUSE_API int fastfuse_matrix_product(int dtype, const void* a, const void* b, float* product,
                                         int M, int N, int K, cudaStream_t stream) {
  using namespace fastfuse::cuda;
  const dim3 grid(N / 16, M / 16);
  if (dtype == kBFloat16)
    return launch(matrix_product<__nv_bfloat16>, grid, 32, 0, stream,
                  static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b),
                  product, N, K);
  return launch(matrix_product<__half>, grid, 32, 0, stream, static_cast<const __half*>(a),
                static_cast<const __half*>(b), product, N, K);
}
