// Blocks of depthwise_conv2d: up to kMaxBlock outputs of one x-phase in registers, of a row and one
// vector of channels.
#pragma once

#include "cpu/vec.h"

namespace fastfuse {
namespace {

// As many outputs as fit the registers beside a row of weights and an input. At least 6: blocks are
// even parts of a row, and none may be narrower than the kernel's reach, 3.
#if defined(__AVX512F__)
constexpr int kMaxBlock = 16;
#else
constexpr int kMaxBlock = 8;
#endif

// A block's outputs are `step` apart, the first at `offset` of every row. Rows are those inside the
// image, `rows` of them. At the image's left or right edge there is nothing beyond the block.
template <class A>
struct Block {
  const A* const* row;
  int64_t rows;
  int64_t offset, step;
  bool left, right;
};

// Weights [tap][lane] from the row of the kernel on that the block's first row meets; `pairs` has
// in each lane the bfloat16 weights of two rows, one below the other.
template <class A>
struct Taps {
  const A* single;
  const A* pairs;
};

// sum += in * weight, for values.
template <class A>
struct OfValues {
  static constexpr bool kPairs = false;
  static FASTFUSE_INLINE Vec<A> add_product(Vec<A> sum, Vec<A> in, Vec<A> weight) {
    return sum + in * weight;
  }
};

#if defined(__AVX512BF16__)
// sum += in * weight over both halves of the lanes: two products for the price of one.
struct OfPairs {
  static constexpr bool kPairs = true;
  static FASTFUSE_INLINE Vec<float> add_product(Vec<float> sum, Vec<float> in, Vec<float> weight) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)in, (__m512bh)weight);
  }
};

// The lower halves alone, with weights that are float32.
struct OfLowerHalves {
  static FASTFUSE_INLINE Vec<float> add_product(Vec<float> sum, Vec<float> in, Vec<float> weight) {
    return sum + (Vec<float>)((Bits)in << 16) * weight;
  }
};
#endif

// For each input in reach of a block of P outputs: use(Count<its place, from -r on>, address).
template <int K, int P, class A, class Use>
FASTFUSE_INLINE void for_inputs(const A* first, const Block<A>& b, Use use) {
  constexpr int r = K / 2;
  const A* p = first - r * b.step;
  const auto next = [&](auto place) __attribute__((always_inline)) {
    use(place, p);
    p += b.step;
  };
  if (!b.left) unrolled<-r, 0>(next);
  p = first;
  unrolled<0, P>(next);
  if (!b.right) unrolled<P, P + r>(next);
}

template <class Product, int K, int P, class A>
FASTFUSE_INLINE void add_row(const Block<A>& b, const A* row, const A* weight, Vec<A> (&sum)[P]) {
  Vec<A> w[K];
  unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
    w[kx.value] = load(weight + kx.value * kLanes<A>);
  });
  for_inputs<K, P>(row + b.offset, b,
                   [&](auto place, const A* input) __attribute__((always_inline)) {
                     const Vec<A> in = load(input);
                     unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
                       constexpr int p = decltype(place)::value + K / 2 - decltype(kx)::value;
                       if constexpr (0 <= p && p < P)
                         sum[p] = Product::add_product(sum[p], in, w[kx.value]);
                     });
                   });
}

template <class A>
using ConvolveBlock = void (*)(const Block<A>&, const Taps<A>&, const A* bias, A* out);

template <class Product, class A, int K, int P>
void convolve_block(const Block<A>& b, const Taps<A>& taps, const A* bias, A* out) {
  constexpr int64_t row_of_taps = K * kLanes<A>;
  Vec<A> sum[P];
  const Vec<A> start = load(bias);
  unrolled<0, P>([&](auto p) __attribute__((always_inline)) { sum[p.value] = start; });
#if defined(__AVX512BF16__)
  if constexpr (Product::kPairs) {
    int64_t y = 0;
    for (; y + 2 <= b.rows; y += 2)
      add_row<Product, K, P>(b, b.row[y], taps.pairs + y * row_of_taps, sum);
    if (y < b.rows) add_row<OfLowerHalves, K, P>(b, b.row[y], taps.single + y * row_of_taps, sum);
  } else
#endif
    for (int64_t y = 0; y < b.rows; ++y)
      add_row<Product, K, P>(b, b.row[y], taps.single + y * row_of_taps, sum);
  unrolled<0, P>([&](auto p) __attribute__((always_inline)) {
    store(out, sum[p.value]);
    out += b.step;
  });
}

template <class A>
using SumBlock = void (*)(const Block<A>&, const A* grad, A* sums);

// sums[ky][kx] += sum_p grad[p] * row[ky][p + kx - r]
template <class Product, class A, int K, int P>
void sum_block(const Block<A>& b, const A* grad, A* sums) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> g[P];
  unrolled<0, P>([&](auto p) __attribute__((always_inline)) {
    g[p.value] = load(grad);
    grad += b.step;
  });
  for (int64_t y = 0; y < b.rows; ++y, sums += K * lanes) {
    Vec<A> sum[K];
    unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
      sum[kx.value] = load(sums + kx.value * lanes);
    });
    for_inputs<K, P>(b.row[y] + b.offset, b,
                     [&](auto place, const A* input) __attribute__((always_inline)) {
                       const Vec<A> in = load(input);
                       unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
                         constexpr int p = decltype(place)::value + K / 2 - decltype(kx)::value;
                         if constexpr (0 <= p && p < P)
                           sum[kx.value] = Product::add_product(sum[kx.value], in, g[p]);
                       });
                     });
    unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
      store(sums + kx.value * lanes, sum[kx.value]);
    });
  }
}

// Functions for blocks of 1, 2, ... outputs.
template <class A>
struct Blocks {
  ConvolveBlock<A> convolve[kMaxBlock];
  SumBlock<A> sum[kMaxBlock];
};

template <class Product, class A, int K, int... P>
struct MakeBlocks : MakeBlocks<Product, A, K, kMaxBlock - static_cast<int>(sizeof...(P)), P...> {};
template <class Product, class A, int K, int... P>
struct MakeBlocks<Product, A, K, 1, P...> {
  static constexpr Blocks<A> value = {
      {convolve_block<Product, A, K, 1>, convolve_block<Product, A, K, P>...},
      {sum_block<Product, A, K, 1>, sum_block<Product, A, K, P>...}};
};

// None for kernels of other sizes than 3, 5 and 7.
template <class Product, class A>
FASTFUSE_INLINE const Blocks<A>* blocks_of(int64_t kernel_size) {
  switch (kernel_size) {
    case 3:
      return &MakeBlocks<Product, A, 3>::value;
    case 5:
      return &MakeBlocks<Product, A, 5>::value;
    case 7:
      return &MakeBlocks<Product, A, 7>::value;
    default:
      return nullptr;
  }
}

}  // namespace
}  // namespace fastfuse
