// Kernels that are wrong, each in one way, and some that only look so: an example for the tests of
// the emulator.
#include "cuda/mma.h"

namespace fastfuse::cuda {

constexpr int kThreads = 64;

enum Fault : int {
  kNone,
  kDifferentBarriers,
  kBarrierAndShuffle,
  kBlocksWriteTheSame,
  kBlockReadsOthers,
  kWarpWithoutOrder,
  kWarpInOrder,
  kBeyondShared,
  kUnwrittenShared,
  kUnwrittenGlobal,
  kOutsideOfMask,
  kMisaligned,
  kNullPointer,
  kCopyNotCommitted,
  kCopySeenByOthers,
  kSharedOfBlockBefore,
  kReadByTwoThenWritten,
  kRowOfMatrix,
};

__global__ void __launch_bounds__(kThreads) faulty(Fault fault, const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads + 4];
  const int thread = threadIdx.x, index = blockIdx.x * kThreads + thread;
  float value = in[index];
  switch (fault) {
    case kNone:
      break;
    case kDifferentBarriers:
      if (thread < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case kBarrierAndShuffle:
      if (thread == 0)
        value = __shfl_sync(~0u, value, 0);
      else
        __syncthreads();
      break;
    case kBlocksWriteTheSame:
      out[thread] = 1.0f;
      break;
    case kBlockReadsOthers:
      out[index] = value;
      value = out[(index + kThreads) % (gridDim.x * kThreads)];
      break;
    case kWarpWithoutOrder:
    case kWarpInOrder:
      tile[thread] = value;
      if (fault == kWarpInOrder) __syncwarp();
      value = tile[thread ^ 1];
      break;
    case kBeyondShared:
      tile[thread + 5] = value;
      break;
    case kUnwrittenShared:
      value = tile[thread];
      break;
    case kUnwrittenGlobal:
      value = out[index];
      break;
    case kOutsideOfMask:
      value = __shfl_sync(1u << thread % 32, value, (thread + 1) % 32);
      break;
    case kMisaligned:
      value = reinterpret_cast<const double*>(&in[1])[0];
      break;
    case kNullPointer:
      *static_cast<float*>(nullptr) = value;
      break;
    case kCopyNotCommitted:
      copy_async<4>(&tile[thread], &in[index]);
      wait_for_copies<0>();
      value = tile[thread];
      break;
    case kCopySeenByOthers:
      copy_async<4>(&tile[thread], &in[index]);
      commit_copies();
      wait_for_copies<0>();
      value = tile[(thread + 32) % kThreads];
      break;
    case kSharedOfBlockBefore:
      if (blockIdx.x == gridDim.x - 1) value = tile[thread];
      tile[thread] = value;
      break;
    case kReadByTwoThenWritten:
      tile[thread] = value;
      __syncthreads();
      value = tile[0];
      if (thread == kThreads - 1) tile[0] = value + 1;
      break;
    case kRowOfMatrix:
      uint32_t matrices[4];
      tile[thread] = value;
      __syncthreads();
      load_matrices(matrices, &tile[1]);
      value = __uint_as_float(matrices[0]);
      break;
  }
  out[index] = value;
}

}  // namespace fastfuse::cuda

FASTFUSE_API int fastfuse_faulty(int fault, const float* in, float* out, int blocks, int threads,
                                 cudaStream_t stream) {
  using namespace fastfuse::cuda;
  return launch(faulty, blocks, threads, 0, stream, Fault(fault), in, out);
}
