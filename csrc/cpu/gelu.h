// The normal distribution's density and function, for GELU(x) = x Phi(x) and its derivative.
//
// Phi(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + c |x|): what exp leaves is smooth, and a
// polynomial in t is accurate relative to Phi, far out too. Nothing cancels. Polynomials are
// minimax ones (relative error, |x| <= 13, where float32's exp ends). Error of GELU: in float32
// 4e-7 of the largest of |x| and 1, and 2e-6 relative to the result; for bfloat16 and float16
// storage, which round by 2e-3 and 2e-4, 2e-5 and 2e-4. float64 calls erfc and exp for every lane.
#pragma once

#include "cpu/exp.h"

namespace fastfuse {
namespace {

// Relative error 2^-11 or, after a Newton step from 2^-14, that of float32.
#if defined(__AVX512F__)
template <bool Narrow>
FASTFUSE_INLINE Vec<float> reciprocal(Vec<float> x) {
  const Vec<float> estimate = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return Narrow ? estimate : estimate * (2.0f - x * estimate);
}
#else
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
  const Vec<float> n = rounded(exponent);
  const Vec<float> e = scaled(exp2_of_fraction<Narrow>(exponent - n), n);
  if constexpr (Narrow) {
    const Vec<float> t = reciprocal<true>(1.0f + 0.5f * kSqrtHalf * magnitude(x));
    return {e, e * t *
                   polynomial(t, 0.5f * 0.279927358f, 0.5f * 0.310710694f, 0.5f * 0.109576288f,
                              0.5f * 0.469976043f, 0.5f * -0.170110416f)};
  } else {
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
