// AVX-512 on a processor that has only AVX2: included before everything else where
// FASTFUSE_EMULATE_AVX512 is on, it gives the AVX-512 bodies the few instructions that they name.
// The compiler itself splits the vectors of 64 bytes. Slow: for tests alone.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define __AVX512F__ 1
#ifdef FASTFUSE_EMULATE_BF16
#define __AVX512BF16__ 1
#endif

namespace fastfuse {
namespace {
namespace emulated {

#define FASTFUSE_EMULATED [[maybe_unused]] inline __attribute__((always_inline))

union Floats {
  __m512 whole;
  __m256 halves[2];
  float lanes[16];
  uint32_t bits[16];
};
union Shorts {
  __m256i whole;
  __m128i halves[2];
  uint16_t lanes[16];
};
union Doubles {
  __m512d whole;
  __m256d halves[2];
  double lanes[8];
};

// Only the lanes of a mask are touched: what lies beyond them may not exist.
template <class Vector, class T>
FASTFUSE_EMULATED Vector masked_load(unsigned mask, const T* p) {
  Vector v{};
  for (unsigned i = 0; i < sizeof v.lanes / sizeof v.lanes[0]; ++i)
    if (mask >> i & 1) v.lanes[i] = p[i];
  return v;
}
template <class Vector, class T>
FASTFUSE_EMULATED void masked_store(T* p, unsigned mask, Vector v) {
  for (unsigned i = 0; i < sizeof v.lanes / sizeof v.lanes[0]; ++i)
    if (mask >> i & 1) p[i] = v.lanes[i];
}

FASTFUSE_EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const float* p) {
  return masked_load<Floats>(mask, p).whole;
}
FASTFUSE_EMULATED __m512d maskz_loadu_pd(__mmask8 mask, const double* p) {
  return masked_load<Doubles>(mask, p).whole;
}
FASTFUSE_EMULATED __m256i maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return masked_load<Shorts>(mask, static_cast<const uint16_t*>(p)).whole;
}
FASTFUSE_EMULATED void mask_storeu_ps(float* p, __mmask16 mask, __m512 v) {
  masked_store(p, mask, Floats{v});
}
FASTFUSE_EMULATED void mask_storeu_pd(double* p, __mmask8 mask, __m512d v) {
  masked_store(p, mask, Doubles{v});
}
FASTFUSE_EMULATED void mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  masked_store(static_cast<uint16_t*>(p), mask, Shorts{v});
}

// As the instructions, these trap where p is not a multiple of 64 bytes.
FASTFUSE_EMULATED void stream_ps(float* p, __m512 v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  const Floats from{v};
  for (int i = 0; i < 2; ++i) _mm256_stream_ps(p + 8 * i, from.halves[i]);
}
FASTFUSE_EMULATED void stream_pd(double* p, __m512d v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  const Doubles from{v};
  for (int i = 0; i < 2; ++i) _mm256_stream_pd(p + 4 * i, from.halves[i]);
}

FASTFUSE_EMULATED __m512 cvtph_ps(__m256i v) {
  const Shorts from{v};
  Floats to;
  for (int i = 0; i < 2; ++i) to.halves[i] = _mm256_cvtph_ps(from.halves[i]);
  return to.whole;
}
template <int Rounding>
FASTFUSE_EMULATED __m256i cvtps_ph(__m512 v) {
  const Floats from{v};
  Shorts to;
  for (int i = 0; i < 2; ++i) to.halves[i] = _mm256_cvtps_ph(from.halves[i], Rounding);
  return to.whole;
}

FASTFUSE_EMULATED __m512 set1_ps(float value) {
  Floats v;
  for (float& lane : v.lanes) lane = value;
  return v.whole;
}
FASTFUSE_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  const Floats x{a}, y{b};
  Floats v;
  for (int i = 0; i < 2; ++i) v.halves[i] = _mm256_max_ps(x.halves[i], y.halves[i]);
  return v.whole;
}
template <int Scale>  // to 2^-(Scale / 16); here to whole numbers
FASTFUSE_EMULATED __m512 roundscale_ps(__m512 a) {
  static_assert(Scale == 0);
  Floats v{a};
  for (__m256& half : v.halves)
    half = _mm256_round_ps(half, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return v.whole;
}
FASTFUSE_EMULATED __m512 scalef_ps(__m512 a, __m512 n) {
  Floats v{a};
  const Floats power{n};
  for (int i = 0; i < 16; ++i)
    v.lanes[i] = __builtin_ldexpf(v.lanes[i], static_cast<int>(__builtin_floorf(power.lanes[i])));
  return v.whole;
}
// The instruction promises a relative error of 2^-14: so much too small is a result here.
FASTFUSE_EMULATED __m512 rcp14_ps(__m512 a) {
  Floats v{a};
  for (float& lane : v.lanes) lane = 1.0f / lane;
  for (uint32_t& bits : v.bits) bits &= ~0x1FFu;
  return v.whole;
}

// Subnormal values are taken for zeros, those of results too.
FASTFUSE_EMULATED uint32_t flushed(uint32_t bits) {
  return bits & 0x7F800000u ? bits : bits & 0x80000000u;
}
FASTFUSE_EMULATED float flushed(float value) {
  return __builtin_fabsf(value) < 0x1p-126f ? __builtin_copysignf(0.0f, value) : value;
}
FASTFUSE_EMULATED __m256i cvtneps_pbh(__m512 a) {
  const Floats v{a};
  Shorts to;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = flushed(v.bits[i]), upper = bits >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    to.lanes[i] =
        static_cast<uint16_t>(is_nan ? upper | 0x40u : (bits + 0x7FFFu + (upper & 1)) >> 16);
  }
  return to.whole;
}
template <class Pairs>
FASTFUSE_EMULATED __m512 dpbf16_ps(__m512 sum, Pairs a, Pairs b) {
  static_assert(sizeof(Pairs) == 64);
  Floats v{sum}, x, y;
  __builtin_memcpy(&x, &a, sizeof x);
  __builtin_memcpy(&y, &b, sizeof y);
  for (int i = 0; i < 16; ++i)
    for (int shift = 0; shift <= 16; shift += 16) {  // the upper ones first
      Floats factors;
      factors.bits[0] = flushed(x.bits[i] << shift & 0xFFFF0000u);
      factors.bits[1] = flushed(y.bits[i] << shift & 0xFFFF0000u);
      v.lanes[i] = flushed(__builtin_fmaf(factors.lanes[0], factors.lanes[1], flushed(v.lanes[i])));
    }
  return v.whole;
}

#undef FASTFUSE_EMULATED

}  // namespace emulated
}  // namespace
}  // namespace fastfuse

// Some of them are macros where the compiler does not optimize.
#undef _mm512_cvtps_ph
#undef _mm512_roundscale_ps
#define _mm512_maskz_loadu_ps fastfuse::emulated::maskz_loadu_ps
#define _mm512_maskz_loadu_pd fastfuse::emulated::maskz_loadu_pd
#define _mm256_maskz_loadu_epi16 fastfuse::emulated::maskz_loadu_epi16
#define _mm512_mask_storeu_ps fastfuse::emulated::mask_storeu_ps
#define _mm512_mask_storeu_pd fastfuse::emulated::mask_storeu_pd
#define _mm256_mask_storeu_epi16 fastfuse::emulated::mask_storeu_epi16
#define _mm512_stream_ps fastfuse::emulated::stream_ps
#define _mm512_stream_pd fastfuse::emulated::stream_pd
#define _mm512_cvtph_ps fastfuse::emulated::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) fastfuse::emulated::cvtps_ph<(rounding)>(v)
#define _mm512_set1_ps fastfuse::emulated::set1_ps
#define _mm512_max_ps fastfuse::emulated::max_ps
#define _mm512_roundscale_ps(v, scale) fastfuse::emulated::roundscale_ps<(scale)>(v)
#define _mm512_scalef_ps fastfuse::emulated::scalef_ps
#define _mm512_rcp14_ps fastfuse::emulated::rcp14_ps
#define _mm512_cvtneps_pbh fastfuse::emulated::cvtneps_pbh
#define _mm512_dpbf16_ps fastfuse::emulated::dpbf16_ps
