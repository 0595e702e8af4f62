// The normal distribution's density and function, for GELU(x) = x Phi(x) and its derivative.
//
// Phi(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + c |x|): what exp leaves is smooth, and a
// polynomial in t is accurate relative to Phi, far out too. Nothing cancels. Polynomials are
// minimax ones (relative error, |x| <= 13, where float32's exp ends). Error of GELU: in float32
// 4e-7 of the largest of |x| and 1, and 2e-6 relative to the result; for bfloat16 and float16
// storage, which round by 2e-3 and 2e-4, 2e-5 and 2e-4. float64 calls erfc and exp for every lane.
#pragma once

#include <math.h>

#include "cpu/vec.h"

namespace fastfuse {
namespace {

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
// Relative error 2^-11 or, after a Newton step from 2^-14, that of float32.
template <bool Narrow>
FASTFUSE_INLINE Vec<float> reciprocal(Vec<float> x) {
  const Vec<float> estimate = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return Narrow ? estimate : estimate * (2.0f - x * estimate);
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
template <bool Narrow>
FASTFUSE_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX2__)
  if constexpr (Narrow) return (Vec<float>)_mm256_rcp_ps((__m256)x);
#endif
  return 1.0f / x;
}
#endif

FASTFUSE_INLINE Vec<float> magnitude(Vec<float> x) { return (Vec<float>)((Bits)x & 0x7FFFFFFFu); }

// exp(-x^2 / 2) and Phi(-|x|).
template <class A>
struct Tail {
  Vec<A> exponential, probability;
};

template <bool Narrow>
FASTFUSE_INLINE Tail<float> tail(Vec<float> x) {
  constexpr float kHalfLog2E = 0.721347520f, kSqrtHalf = 0.707106781f;
  const Vec<float> exponent = at_least(x * x * -kHalfLog2E, -126.0f);
  const Vec<float> n = rounded(exponent), r = exponent - n;
  if constexpr (Narrow) {
    const Vec<float> e =
        scaled(polynomial(r, 0.999928074f, 0.69326099f, 0.24261112f, 0.0551716435f), n);
    const Vec<float> t = reciprocal<true>(1.0f + 0.5f * kSqrtHalf * magnitude(x));
    return {e, e * t *
                   polynomial(t, 0.5f * 0.279927358f, 0.5f * 0.310710694f, 0.5f * 0.109576288f,
                              0.5f * 0.469976043f, 0.5f * -0.170110416f)};
  } else {
    const Vec<float> e = scaled(polynomial(r, 1.0f, 0.693147206f, 0.240226469f, 0.0555032878f,
                                           0.00961848897f, 0.00133999312f, 0.000153458094f),
                                n);
    const Vec<float> t = reciprocal<false>(1.0f + 0.4f * kSqrtHalf * magnitude(x));
    return {e, e * t *
                   polynomial(t, 0.5f * 0.2256263f, 0.5f * 0.226575681f, 0.5f * 0.200958797f,
                              0.5f * 0.196962174f, 0.5f * 0.0715103426f, 0.5f * 0.0997265919f,
                              0.5f * 0.073844792f, 0.5f * -0.135472387f, 0.5f * 0.0402677664f)};
  }
}

// GELU is max(x, 0) - |x| Phi(-|x|).
template <bool Narrow>
FASTFUSE_INLINE Vec<float> gelu(Vec<float> x) {
  return at_least(x, 0.0f) - magnitude(x) * tail<Narrow>(x).probability;
}

template <class A>
struct GeluWithDerivative {
  Vec<A> value, derivative;
};

// The derivative is Phi(x) + x times the density.
template <bool Narrow>
FASTFUSE_INLINE GeluWithDerivative<float> gelu_with_derivative(Vec<float> x) {
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const Tail<float> t = tail<Narrow>(x);
  const Vec<float> phi = x < 0.0f ? t.probability : 1.0f - t.probability;
  return {x * phi, phi + x * (kInverseSqrt2Pi * t.exponential)};
}

template <bool Narrow>
FASTFUSE_INLINE GeluWithDerivative<double> gelu_with_derivative(Vec<double> x) {
  constexpr double kSqrtHalf = 0.70710678118654752440, kInverseSqrt2Pi = 0.39894228040143267794;
  GeluWithDerivative<double> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    const double phi = 0.5 * erfc(-kSqrtHalf * x[i]);
    result.value[i] = x[i] * phi;
    result.derivative[i] = phi + x[i] * kInverseSqrt2Pi * exp(-0.5 * x[i] * x[i]);
  }
  return result;
}

template <bool Narrow>
FASTFUSE_INLINE Vec<double> gelu(Vec<double> x) {
  return gelu_with_derivative<Narrow>(x).value;
}

}  // namespace
}  // namespace fastfuse
