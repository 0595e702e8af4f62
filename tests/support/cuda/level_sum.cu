// An example for the tests of the proof: a call as the package's launchers make it, of a struct of
// sizes and a list of levels; blocks have two dimensions.
#include "cuda/runtime.h"

namespace fastfuse::cuda {

constexpr int kMaxLevels = 8, kBlockX = 16, kBlockY = 4;

struct LevelSumSizes {
  int64_t height, width;
  int32_t num_levels;
  float scale;
};

struct Levels {
  const float* levels[kMaxLevels];
};

__global__ void __launch_bounds__(kBlockX* kBlockY)
    level_sum(const __grid_constant__ Levels levels, float* out, LevelSumSizes sizes) {
  const int64_t x = blockIdx.x * kBlockX + threadIdx.x, y = blockIdx.y * kBlockY + threadIdx.y;
  if (x >= sizes.width || y >= sizes.height) return;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < sizes.num_levels; ++i) sum += levels.levels[i][y * sizes.width + x];
  out[y * sizes.width + x] = sizes.scale * sum;
}

}  // namespace fastfuse::cuda

FASTFUSE_API int fastfuse_level_sum(const fastfuse::cuda::LevelSumSizes* sizes, float* out,
                                    const void* const* levels, cudaStream_t stream) {
  using namespace fastfuse::cuda;
  Levels all{};
  for (int i = 0; i < sizes->num_levels; ++i) all.levels[i] = static_cast<const float*>(levels[i]);
  const dim3 grid((sizes->width + kBlockX - 1) / kBlockX, (sizes->height + kBlockY - 1) / kBlockY);
  return launch(level_sum, grid, dim3(kBlockX, kBlockY), 0, stream, all, out, *sizes);
}
