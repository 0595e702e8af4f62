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

template <class A>
struct Normal {
  Vec<A> function, density;
};

template <class V, class... Coefficients>
FASTFUSE_INLINE V polynomial(V x, float first, Coefficients... rest) {
  if constexpr (sizeof...(rest) == 0)
    return V{} + first;
  else
    return first + x * polynomial(x, rest...);
}

// 2^n p, n whole and at least -126.
FASTFUSE_INLINE Vec<float> scaled(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const IndexVec<float> exponent = __builtin_convertvector(n, IndexVec<float>) + 127;
  return p * (Vec<float>)(exponent << 23);
#endif
}

FASTFUSE_INLINE Vec<float> rounded(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_roundscale_ps((__m512)x, 0);
#else
  const Vec<float> large = Vec<float>{} + 0x1.8p23f;  // its last bit is 1
  Vec<float> sum = x + large;
  asm("" : "+m"(sum));  // or the compiler might take the difference for x
  return sum - large;
#endif
}

// Relative error 2^-11.
FASTFUSE_INLINE Vec<float> reciprocal_estimate(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_rcp_ps((__m256)x);
#else
  return 1.0f / x;
#endif
}

template <bool Narrow>
FASTFUSE_INLINE Normal<float> normal(Vec<float> x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kSqrtHalf = 0.707106781f, kInverseSqrt2Pi = 0.398942280f;
  constexpr float kLowest = -87.3f;
  Vec<float> exponent = -0.5f * x * x;
  exponent = exponent > kLowest ? exponent : splat(kLowest);
  const Vec<float> n = rounded(exponent * kLog2E);
  const Vec<float> r = (exponent - n * kLn2High) - n * kLn2Low;
  const Vec<float> magnitude = (Vec<float>)((Bits)x & 0x7FFFFFFFu);
  Vec<float> e, tail;
  if constexpr (Narrow) {
    e = scaled(polynomial(r, 0.999928074f, 1.0001642f, 0.504963257f, 0.165668287f), n);
    const Vec<float> t = reciprocal_estimate(1.0f + 0.5f * kSqrtHalf * magnitude);
    tail = e * t *
           polynomial(t, 0.5f * 0.279927358f, 0.5f * 0.310710694f, 0.5f * 0.109576288f,
                      0.5f * 0.469976043f, 0.5f * -0.170110416f);
  } else {
    e = scaled(polynomial(r, 1.0f, 1.00000004f, 0.499999921f, 0.166664202f, 0.0416682256f,
                          0.00837481578f, 0.00138368419f),
               n);
    const Vec<float> denominator = 1.0f + 0.4f * kSqrtHalf * magnitude;
#if defined(__AVX512F__)
    Vec<float> t = reciprocal_estimate(denominator);  // 2^-14, and after a Newton step 2^-24
    t = t * (2.0f - denominator * t);
#else
    const Vec<float> t = 1.0f / denominator;
#endif
    tail = e * t *
           polynomial(t, 0.5f * 0.2256263f, 0.5f * 0.226575681f, 0.5f * 0.200958797f,
                      0.5f * 0.196962174f, 0.5f * 0.0715103426f, 0.5f * 0.0997265919f,
                      0.5f * 0.073844792f, 0.5f * -0.135472387f, 0.5f * 0.0402677664f);
  }
  return {x < 0.0f ? tail : 1.0f - tail, kInverseSqrt2Pi * e};
}

template <bool Narrow>
FASTFUSE_INLINE Normal<double> normal(Vec<double> x) {
  Normal<double> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    result.function[i] = 0.5 * erfc(-0.70710678118654752440 * x[i]);
    result.density[i] = 0.39894228040143267794 * exp(-0.5 * x[i] * x[i]);
  }
  return result;
}

}  // namespace
}  // namespace fastfuse
