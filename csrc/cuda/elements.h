// Elements of tensors in registers: values are float32, memory has any dtype.
#pragma once

#include "cuda/runtime.h"

namespace fastfuse::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// N neighbouring elements, moved by one access; their address is a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const auto vector = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(vector.values[i]);
}

// One instruction a value: it is the upper half of a float32.
template <int N>
__device__ __forceinline__ void load(const __nv_bfloat16* from, float (&to)[N]) {
  static_assert(N % 2 == 0, "pairs");
  const auto pairs = *reinterpret_cast<const Vector<uint32_t, N / 2>*>(from);
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    to[i] = __uint_as_float(pairs.values[i / 2] << 16);
    to[i + 1] = __uint_as_float(pairs.values[i / 2] & 0xffff0000u);
  }
}

// Two values as a word, which one instruction makes.
__device__ __forceinline__ uint32_t narrow_pair(float x, float y, const __nv_bfloat16*) {
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(x, y);
  return pair.x | uint32_t{pair.y} << 16;
}
__device__ __forceinline__ uint32_t narrow_pair(float x, float y, const __half*) {
  const __half2_raw pair = __floats2half2_rn(x, y);
  return pair.x | uint32_t{pair.y} << 16;
}

template <int N, class T>
__device__ __forceinline__ void store(const float (&from)[N], T* to) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    Vector<uint32_t, N / 2> pairs;
#pragma unroll
    for (int i = 0; i < N; i += 2) pairs.values[i / 2] = narrow_pair(from[i], from[i + 1], to);
    *reinterpret_cast<Vector<uint32_t, N / 2>*>(to) = pairs;
  } else {
    Vector<T, N> vector;
#pragma unroll
    for (int i = 0; i < N; ++i) vector.values[i] = narrow<T>(from[i]);
    *reinterpret_cast<Vector<T, N>*>(to) = vector;
  }
}

}  // namespace fastfuse::cuda
