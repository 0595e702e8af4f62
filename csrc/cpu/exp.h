// exp for vector bodies, and the steps it is made of.
#pragma once

#include <math.h>

#include "cpu/vec.h"

namespace fastfuse {
namespace {

// Of one value.
FASTFUSE_INLINE float exp_of(float x) { return expf(x); }
FASTFUSE_INLINE double exp_of(double x) { return exp(x); }
FASTFUSE_INLINE float log_of(float x) { return logf(x); }
FASTFUSE_INLINE double log_of(double x) { return log(x); }

// c0 + c1 x + ... by Estrin's scheme: halves are independent, for a chain of as many multiply-adds
// as there are coefficients is what would bound GELU.
template <int N, class V>
FASTFUSE_INLINE V polynomial_of(V x, const V (&c)[N]) {
  if constexpr (N == 1) {
    return c[0];
  } else {
    V pairs[(N + 1) / 2];
    unrolled<0, N / 2>([&](auto i) __attribute__((always_inline)) {
      pairs[i.value] = c[2 * i.value] + x * c[2 * i.value + 1];
    });
    if constexpr (N % 2 == 1) pairs[N / 2] = c[N - 1];
    return polynomial_of(x * x, pairs);
  }
}

template <class V, class... Coefficients>
FASTFUSE_INLINE V polynomial(V x, Coefficients... coefficients) {
  const V c[] = {V{} + coefficients...};
  return polynomial_of(x, c);
}

#if defined(__AVX512F__)
FASTFUSE_INLINE Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm512_max_ps((__m512)x, _mm512_set1_ps(low));
}
FASTFUSE_INLINE Vec<float> rounded(Vec<float> x) {
  return (Vec<float>)_mm512_roundscale_ps((__m512)x, 0);
}
// 2^n p, n whole and at least -126.
FASTFUSE_INLINE Vec<float> scaled(Vec<float> p, Vec<float> n) {
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
#if defined(__AVX2__)
FASTFUSE_INLINE Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm256_max_ps((__m256)x, _mm256_set1_ps(low));
}
FASTFUSE_INLINE Vec<float> rounded(Vec<float> x) {
  return (Vec<float>)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
FASTFUSE_INLINE Vec<float> at_least(Vec<float> x, float low) { return x > low ? x : splat(low); }
FASTFUSE_INLINE Vec<float> rounded(Vec<float> x) {
  const Vec<float> large = Vec<float>{} + 0x1.8p23f;  // its last bit is 1
  Vec<float> sum = x + large;
  asm("" : "+m"(sum));  // or the compiler might take the difference for x
  return sum - large;
}
#endif
FASTFUSE_INLINE Vec<float> scaled(Vec<float> p, Vec<float> n) {
  const IndexVec<float> exponent = __builtin_convertvector(n, IndexVec<float>) + 127;
  return p * (Vec<float>)(exponent << 23);
}
#endif

// 2^r for |r| <= 1/2: relative error 7e-5, or that of float32.
template <bool Narrow>
FASTFUSE_INLINE Vec<float> exp2_of_fraction(Vec<float> r) {
  if constexpr (Narrow)
    return polynomial(r, 0.999928074f, 0.69326099f, 0.24261112f, 0.0551716435f);
  else
    return polynomial(r, 1.0f, 0.693147206f, 0.240226469f, 0.0555032878f, 0.00961848897f,
                      0.00133999312f, 0.000153458094f);
}

// exp(x) for x of at most 0, or above it by rounding; below -87 it stays at 2^-126. Relative error
// 1e-7, and 2e-8 |x| that log2(e) has lost.
FASTFUSE_INLINE Vec<float> exp_of_negative(Vec<float> x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 0x1.8p23f + 127;  // a sum with it ends in the biased exponent
  x = at_least(x, -87.3f);
  const Vec<float> sum = x * kLog2E + kRound;
  const Vec<float> r = x * kLog2E - (sum - kRound);
  return (Vec<float>)((Bits)sum << 23) * exp2_of_fraction<false>(r);
}
FASTFUSE_INLINE Vec<double> exp_of_negative(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

// The natural logarithm of positive normal values; relative error 1e-7. The polynomial is Cephes's.
FASTFUSE_INLINE Vec<float> log_of_positive(Vec<float> x) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const IndexVec<float> exponent = ((IndexVec<float>)x - kSqrtHalf) >> 23;
  const Vec<float> f = (Vec<float>)((IndexVec<float>)x - (exponent << 23)) - 1.0f;
  const Vec<float> n = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> tail = f * f * f *
                          polynomial(f, 3.3333331174e-1f, -2.4999993993e-1f, 2.0000714765e-1f,
                                     -1.6668057665e-1f, 1.4249322787e-1f, -1.2420140846e-1f,
                                     1.1676998740e-1f, -1.1514610310e-1f, 7.0376836292e-2f);
  return tail + n * kLn2Low - 0.5f * f * f + f + n * kLn2High;
}
FASTFUSE_INLINE Vec<double> log_of_positive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = log(x[i]);
  return x;
}

}  // namespace
}  // namespace fastfuse
