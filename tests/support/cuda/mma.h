// Products of small matrices by a warp: tensor cores, and how their operands come from shared
// memory. Lane l holds, of each 8 x 8 matrix of 16 bits, elements 2 * (l % 4) and the next of row
// l / 4.
#pragma once

#include <type_traits>

#include "cuda/runtime.h"

#ifdef FASTFUSE_EMULATED
#include "matrices.h"
#endif

namespace fastfuse::cuda {

#ifndef FASTFUSE_EMULATED

// Four 8 x 8 matrices: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, aligned.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: lanes hold elements of a column of what is in memory.
__device__ __forceinline__ void load_transposed_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums += a b of a [16, 16] and b [16, 8]. Lane l holds of a matrices (rows 0-7, columns 0-7),
// (8-15, 0-7), (0-7, 8-15), (8-15, 8-15), of b's transpose columns 0-7 and 8-15, of sums columns
// 2 * (l % 4) and the next of row l / 4 and of row l / 4 + 8.
__device__ __forceinline__ void mma_bf16_16816(float (&sums)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16_16816(float (&sums)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// By the type of the elements.
template <class T>
__device__ __forceinline__ void mma_16816(float (&sums)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __half>)
    mma_f16_16816(sums, a, b);
  else
    mma_bf16_16816(sums, a, b);
}

}  // namespace fastfuse::cuda
