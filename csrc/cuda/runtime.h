// What every CUDA kernel is written with: the language of nvcc, or of the emulator in
// tests/support/cuda, which runs the same source on the CPU.
#pragma once

#ifdef FASTFUSE_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

#define FASTFUSE_API extern "C" __attribute__((visibility("default")))

namespace fastfuse::cuda {

// As fastfuse/ops/launch_cuda.py numbers them.
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Where the pixels of an image in channels_last are, in elements; channels are next to each other.
struct ImageStrides {
  int64_t image, row, pixel;
};

#ifndef FASTFUSE_EMULATED

// Launches return an error of cudaError_t, 0 for none; nothing waits.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > (48 << 10)) {  // what a kernel may have unasked
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies Bytes (4, 8 or 16) to shared memory while the thread goes on, or writes zeros where there
// is nothing to read: then `global` is not looked at, but must be some address of the tensor.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool there = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "as cp.async has them");
  const int bytes = there ? Bytes : 0;
  if constexpr (Bytes == 16) {  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(bytes)
                 : "memory");
  }
}

// Closes a group of copies of this thread.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the latest N groups of this thread are there; other threads see them behind
// a barrier.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

}  // namespace fastfuse::cuda
