// Elements of depthwise_conv2d's rows: values, or pairs of bfloat16 values.
#pragma once

#include "cpu/vec.h"

namespace fastfuse {
namespace {

// Weights [tap][lane] from the row of the kernel on that the block's first row meets; `pairs` has
// in each lane the bfloat16 weights of two rows, one below the other.
template <class A>
struct Taps {
  const A* single;
  const A* pairs;
};

// What a lane of a buffer holds, and all that follows from it. Values: one of the compute type.
template <class S>
struct Values {
  using Storage = S;
  using Compute = compute_t<S>;
  using Buffered = Values<Compute>;  // what blocks see of them
  using V = Vec<Compute>;
  static constexpr int64_t kRows = 1;  // of the image, in a row of the buffer

  // sum += in * weight
  static FASTFUSE_INLINE V add_product(V sum, V in, V weight) { return sum + in * weight; }
  static FASTFUSE_INLINE V sum_of_rows(V in) { return in; }
  static FASTFUSE_INLINE const Compute* weights(const Taps<Compute>& taps) { return taps.single; }
  static FASTFUSE_INLINE void pair_taps(const Compute*, int64_t, Compute*) {}

  // Elements for the values at an address of a row.
  struct Reader {
    Reader(bool, bool, int64_t) {}
    FASTFUSE_INLINE V operator()(const S* p) const { return load(p); }
    FASTFUSE_INLINE V operator()(const S* p, int64_t n) const { return load_partial(p, n); }
  };
};

#if defined(__AVX512BF16__)
// Pairs: in the lower half the value of a row, in the upper one that of the row below. One
// instruction multiplies both.
struct Pairs {
  using Storage = bfloat16;
  using Compute = float;
  using Buffered = Pairs;
  using V = Vec<float>;
  static constexpr int64_t kRows = 2;

  static FASTFUSE_INLINE V add_product(V sum, V in, V weight) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)in, (__m512bh)weight);
  }
  static FASTFUSE_INLINE V sum_of_rows(V in) {
    return (V)((Bits)in << 16) + (V)((Bits)in & 0xFFFF0000u);
  }
  static FASTFUSE_INLINE const float* weights(const Taps<float>& taps) { return taps.pairs; }

  // Each of the float32 taps that are bfloat16 values, with the one a row below.
  static FASTFUSE_INLINE void pair_taps(const float* taps, int64_t kernel_size, float* pairs) {
    constexpr int64_t lanes = kLanes<float>;
    const int64_t row = kernel_size * lanes;
    for (int64_t i = 0; i < (kernel_size - 1) * row; i += lanes) {
      const Bits here = (Bits)load(taps + i), below = (Bits)load(taps + row + i);
      store(pairs + i, (V)(here >> 16 | below));
    }
  }

  // Of pairs whose first row alone counts, with weights that are float32.
  struct FirstRow {
    static FASTFUSE_INLINE V add_product(V sum, V in, V weight) {
      return sum + (V)((Bits)in << 16) * weight;
    }
  };

  // 0 for a row that is outside.
  struct Reader {
    int64_t below;
    Bits lower, upper;

    Reader(bool inside, bool inside_below, int64_t distance)
        : below(inside_below ? distance : 0),
          lower(Bits{} + (inside ? 0x0000FFFFu : 0)),
          upper(Bits{} + (inside_below ? 0xFFFF0000u : 0)) {}
    FASTFUSE_INLINE V operator()(const bfloat16* p) const {
      return join(load_bytes<HalfBits>(p), load_bytes<HalfBits>(p + below));
    }
    FASTFUSE_INLINE V operator()(const bfloat16* p, int64_t n) const {
      const auto mask = (__mmask16)((1u << n) - 1);
      return join((HalfBits)_mm256_maskz_loadu_epi16(mask, p),
                  (HalfBits)_mm256_maskz_loadu_epi16(mask, p + below));
    }

   private:
    FASTFUSE_INLINE V join(HalfBits here, HalfBits there) const {
      const Bits low = __builtin_convertvector(here, Bits) & lower;
      return (V)(low | (__builtin_convertvector(there, Bits) << 16 & upper));
    }
  };
};

// The elements that blocks take: there is no other storage type where there are pairs.
template <class S>
using BlockElements = Pairs;
#else
template <class S>
using BlockElements = Values<S>;
#endif

}  // namespace
}  // namespace fastfuse
