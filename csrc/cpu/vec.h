// The vector type: one register of the instruction set a file is compiled for.
//
// Built on the compiler's vector extensions, so that one source serves portable, AVX2 and AVX-512
// builds and other processors. Everything here has internal linkage (see isa_list.h).
//
// Kernels compute in float (storage: float, bfloat16, float16) or double (storage: double).
#pragma once

#include <cstdint>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fastfuse {

// Storage-only types: kernels convert on load and round to nearest even on store.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define FASTFUSE_INLINE inline __attribute__((always_inline))

template <class T, int Bytes = kVectorBytes>
struct VectorType {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <class A>
using Vec = typename VectorType<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// The integer type of the same width, for lane indices and bit patterns.
template <class A>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class A>
using IndexVec = Vec<typename IntegerOf<A>::type>;

// What a storage type computes in.
template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class S>
using compute_t = typename ComputeType<S>::type;

using Bits = Vec<uint32_t>;
using HalfBits = VectorType<uint16_t, kVectorBytes / 2>::type;

template <class V, class P>
FASTFUSE_INLINE V load_bytes(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class A>
FASTFUSE_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // value - 0, not value + 0: keeps -0.0
}

FASTFUSE_INLINE Vec<float> widen(HalfBits h, bfloat16) {
  return (Vec<float>)(__builtin_convertvector(h, Bits) << 16);
}

#if defined(__AVX512BF16__)
// One instruction for ten. It takes subnormal values (below 1.2e-38) for zero.
FASTFUSE_INLINE HalfBits narrow(Vec<float> v, bfloat16) {
  return (HalfBits)_mm512_cvtneps_pbh((__m512)v);
}
#else
FASTFUSE_INLINE HalfBits narrow(Vec<float> v, bfloat16) {
  const Bits u = (Bits)v;
  const Bits upper = u >> 16;
  const Bits rounded = (u + 0x7FFFu + (upper & 1u)) >> 16;
  const Bits quiet = upper | 0x40u;  // a NaN stays a NaN of the same sign
  return __builtin_convertvector(v == v ? rounded : quiet, HalfBits);
}
#endif

#if defined(__AVX512F__)
FASTFUSE_INLINE Vec<float> widen(HalfBits h, float16) {
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
}
FASTFUSE_INLINE HalfBits narrow(Vec<float> v, float16) {
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
FASTFUSE_INLINE Vec<float> widen(HalfBits h, float16) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
}
FASTFUSE_INLINE HalfBits narrow(Vec<float> v, float16) {
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
FASTFUSE_INLINE Bits select(Bits mask, Bits yes, Bits no) { return (yes & mask) | (no & ~mask); }

// Exponent and mantissa are moved into place; 2^112 rescales the exponent, subnormals included.
FASTFUSE_INLINE Vec<float> widen(HalfBits h, float16) {
  const Bits u = __builtin_convertvector(h, Bits);
  const Bits magnitude = (u & 0x7FFFu) << 13;
  const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  const Bits special = (Bits)((u & 0x7C00u) == 0x7C00u);
  const Bits value = select(special, magnitude | 0x7F800000u, (Bits)scaled);
  return (Vec<float>)(value | ((u & 0x8000u) << 16));
}

// Normal results round in integers; subnormal ones by adding 0.5, whose last bit is 2^-24.
FASTFUSE_INLINE HalfBits narrow(Vec<float> v, float16) {
  const Bits u = (Bits)v;
  const Bits sign = (u >> 16) & 0x8000u;
  const Bits magnitude = u & 0x7FFFFFFFu;
  const Bits normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3F000000u;
  const Bits overflow = (Bits)(magnitude >= 0x477FF000u);
  const Bits is_nan = (Bits)(magnitude > 0x7F800000u);
  Bits r = select((Bits)(magnitude < 0x38800000u), subnormal, normal);
  r = select(overflow, Bits{} + 0x7C00u, r);
  r = select(is_nan, 0x7E00u | ((magnitude >> 13) & 0x3FFu), r);
  return __builtin_convertvector(r | sign, HalfBits);
}
#endif

// load / store: kLanes<compute_t<S>> consecutive elements at any alignment.
FASTFUSE_INLINE Vec<float> load(const float* p) { return load_bytes<Vec<float>>(p); }
FASTFUSE_INLINE Vec<double> load(const double* p) { return load_bytes<Vec<double>>(p); }
template <class S>
FASTFUSE_INLINE Vec<float> load(const S* p) {
  return widen(load_bytes<HalfBits>(p), S{});
}

FASTFUSE_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
FASTFUSE_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class S>
FASTFUSE_INLINE void store(S* p, Vec<float> v) {
  const HalfBits h = narrow(v, S{});
  __builtin_memcpy(p, &h, sizeof h);
}

// Stores that bypass the caches, for outputs too large to be read from them again: without them
// every line is first fetched from memory. They need vectors aligned to their size, and
// finish_streaming before another thread reads. The portable build has none.
constexpr bool kCanStream = kVectorBytes > 16;
#if defined(__AVX512F__)
FASTFUSE_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
FASTFUSE_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
template <class S>
FASTFUSE_INLINE void stream(S* p, Vec<float> v) {
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow(v, S{}));
}
FASTFUSE_INLINE void finish_streaming() { _mm_sfence(); }
#elif defined(__AVX2__)
FASTFUSE_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
FASTFUSE_INLINE void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
template <class S>
FASTFUSE_INLINE void stream(S* p, Vec<float> v) {
  _mm_stream_si128((__m128i*)p, (__m128i)narrow(v, S{}));
}
FASTFUSE_INLINE void finish_streaming() { _mm_sfence(); }
#else
template <class S>
FASTFUSE_INLINE void stream(S* p, Vec<compute_t<S>> v) {
  store(p, v);
}
FASTFUSE_INLINE void finish_streaming() {}
#endif

// The first n elements only, 0 < n < lanes; the other lanes of a load are zero.
#if defined(__AVX512F__)
FASTFUSE_INLINE Vec<float> load_partial(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
FASTFUSE_INLINE Vec<double> load_partial(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
template <class S>
FASTFUSE_INLINE Vec<float> load_partial(const S* p, int64_t n) {
  return widen((HalfBits)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), S{});
}
FASTFUSE_INLINE void store_partial(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
FASTFUSE_INLINE void store_partial(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
template <class S>
FASTFUSE_INLINE void store_partial(S* p, Vec<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(v, S{}));
}
#else
template <class S>
FASTFUSE_INLINE Vec<compute_t<S>> load_partial(const S* p, int64_t n) {
  S buffer[kLanes<compute_t<S>>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class S>
FASTFUSE_INLINE void store_partial(S* p, Vec<compute_t<S>> v, int64_t n) {
  S buffer[kLanes<compute_t<S>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

// Calls step(i, load, store) over [0, n) by vectors: `load(p)` and `store(p, v)` touch only
// elements that exist. The last vector overlaps the one before it, or, if n is less than a vector,
// is a partial one; a step must therefore not read what it writes. With Stream, stores bypass the
// caches: then n must be whole vectors.
template <class A, bool Stream = false, class Step>
FASTFUSE_INLINE void for_each_vector(int64_t n, Step step) {
  constexpr int64_t lanes = kLanes<A>;
  const auto whole_load = [](const auto* p) { return load(p); };
  const auto whole_store = [](auto* p, auto v) {
    if constexpr (Stream)
      stream(p, v);
    else
      store(p, v);
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step(i, whole_load, whole_store);
  if (Stream || i == n) return;
  if (n > lanes) {
    step(n - lanes, whole_load, whole_store);
  } else {
    step(
        0, [n](const auto* p) { return load_partial(p, n); },
        [n](auto* p, auto v) { store_partial(p, v, n); });
  }
}

// Lanes picked by index from the two vectors at p: result[i] = p[index[i]], 0 <= index < 2 lanes.
template <class A>
FASTFUSE_INLINE Vec<A> pick(const A* p, IndexVec<A> index) {
#if defined(__clang__)
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[index[i]];
  return v;
#else
  return __builtin_shuffle(load(p), load(p + kLanes<A>), index);
#endif
}

// f(Count<Begin>{}), ..., f(Count<End - 1>{}): a loop whose every step is compiled on its own.
template <int V>
struct Count {
  static constexpr int value = V;
};

template <int Begin, int End, class Do>
FASTFUSE_INLINE void unrolled(Do f) {
  if constexpr (Begin < End) {
    f(Count<Begin>{});
    unrolled<Begin + 1, End>(f);
  }
}

// Before a loop over constants: it is unrolled whole, so that arrays of vectors become registers.
// It compiles in less than half the time of `unrolled`, for steps that need no constant
// expressions.
#define FASTFUSE_UNROLL _Pragma("GCC unroll 32")

#if !defined(__clang__)
// The lanes of two vectors that make the first or the second result of exchanging blocks.
template <class A, int Block, bool Second, int... I>
FASTFUSE_INLINE IndexVec<A> exchanged() {
  constexpr int lanes = kLanes<A>, i = sizeof...(I);
  if constexpr (i < lanes) {
    constexpr int index =
        Second ? (i & Block ? lanes + i : i + Block) : (i & Block ? lanes + i - Block : i);
    return exchanged<A, Block, Second, I..., index>();
  } else {
    return IndexVec<A>{I...};
  }
}

template <class A, int Block>
FASTFUSE_INLINE void exchange_blocks(Vec<A>* rows) {
  if constexpr (Block < kLanes<A>) {
    unrolled<0, kLanes<A>>([&](auto row) __attribute__((always_inline)) {
      constexpr int i = decltype(row)::value;
      if constexpr (!(i & Block)) {
        const Vec<A> a = rows[i], b = rows[i + Block];
        rows[i] = __builtin_shuffle(a, b, exchanged<A, Block, false>());
        rows[i + Block] = __builtin_shuffle(a, b, exchanged<A, Block, true>());
      }
    });
    exchange_blocks<A, 2 * Block>(rows);
  }
}
#endif

// The sum of a vector's lanes, by halves.
template <class A, int Step = kLanes<A> / 2>
FASTFUSE_INLINE A sum_of_lanes(Vec<A> v) {
#if defined(__clang__)
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
#else
  if constexpr (Step == 0) {
    return v[0];
  } else {
    IndexVec<A> other;
    for (int i = 0; i < kLanes<A>; ++i) other[i] = i ^ Step;
    return sum_of_lanes<A, Step / 2>(v + __builtin_shuffle(v, other));
  }
#endif
}

// rows[i][j] <-> rows[j][i], by log2(lanes) rounds of exchanging blocks.
template <class A>
FASTFUSE_INLINE void transpose(Vec<A>* rows) {
#if defined(__clang__)
  for (int i = 0; i < kLanes<A>; ++i)
    for (int j = 0; j < i; ++j) {
      const A t = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = t;
    }
#else
  exchange_blocks<A, 1>(rows);
#endif
}

}  // namespace
}  // namespace fastfuse
