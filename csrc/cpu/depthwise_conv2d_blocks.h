// Blocks of depthwise_conv2d: outputs of one x-phase in registers, of a row and one vector of
// channels.
#pragma once

#include "cpu/vec.h"

namespace fastfuse {
namespace {

// As many outputs as fit the registers beside a row of weights and an input. At least 6: blocks are
// even parts of a row, and none may be narrower than the kernel's reach, 3. float64 has fewer, for
// they take a while to compile.
template <class A>
constexpr int kMaxBlock = kVectorBytes == 64 && sizeof(A) == 4 ? 16 : 8;

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

// sum[p] += in[p + kx - r] * w[kx] for the inputs [Begin, End), the first of them at `in`.
template <class Product, int Begin, int End, int K, int P, class A>
FASTFUSE_INLINE void add_inputs(const A* in, int64_t step, const Vec<A> (&w)[K], Vec<A> (&sum)[P]) {
  FASTFUSE_UNROLL for (int i = Begin; i < End; ++i, in += step) {
    const Vec<A> value = load(in);
    FASTFUSE_UNROLL for (int kx = 0; kx < K; ++kx) {
      const int p = i + K / 2 - kx;
      if (0 <= p && p < P) sum[p] = Product::add_product(sum[p], value, w[kx]);
    }
  }
}

template <class Product, int K, int P, class A>
FASTFUSE_INLINE void add_row(const Block<A>& b, const A* row, const A* weight, Vec<A> (&sum)[P]) {
  constexpr int r = K / 2;
  Vec<A> w[K];
  FASTFUSE_UNROLL for (int kx = 0; kx < K; ++kx) w[kx] = load(weight + kx * kLanes<A>);
  const A* first = row + b.offset;
  if (!b.left) add_inputs<Product, -r, 0>(first - r * b.step, b.step, w, sum);
  add_inputs<Product, 0, P>(first, b.step, w, sum);
  if (!b.right) add_inputs<Product, P, P + r>(first + P * b.step, b.step, w, sum);
}

template <class A>
using ConvolveBlock = void (*)(const Block<A>&, const Taps<A>&, const A* bias, A* out);

template <class Product, class A, int K, int P>
void convolve_block(const Block<A>& b, const Taps<A>& taps, const A* bias, A* out) {
  constexpr int64_t row_of_taps = K * kLanes<A>;
  Vec<A> sum[P];
  const Vec<A> start = load(bias);
  FASTFUSE_UNROLL for (int p = 0; p < P; ++p) sum[p] = start;
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
  FASTFUSE_UNROLL for (int p = 0; p < P; ++p, out += b.step) store(out, sum[p]);
}

// sum[kx] += in[p + kx - r] * g[p] for the inputs [Begin, End), the first of them at `in`.
template <class Product, int Begin, int End, int K, int P, class A>
FASTFUSE_INLINE void sum_inputs(const A* in, int64_t step, const Vec<A> (&g)[P], Vec<A> (&sum)[K]) {
  FASTFUSE_UNROLL for (int i = Begin; i < End; ++i, in += step) {
    const Vec<A> value = load(in);
    FASTFUSE_UNROLL for (int kx = 0; kx < K; ++kx) {
      const int p = i + K / 2 - kx;
      if (0 <= p && p < P) sum[kx] = Product::add_product(sum[kx], value, g[p]);
    }
  }
}

template <class A>
using SumBlock = void (*)(const Block<A>&, const A* grad, A* sums);

// sums[ky][kx] += sum_p grad[p] * row[ky][p + kx - r]
template <class Product, class A, int K, int P>
void sum_block(const Block<A>& b, const A* grad, A* sums) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr int r = K / 2;
  Vec<A> g[P];
  FASTFUSE_UNROLL for (int p = 0; p < P; ++p, grad += b.step) g[p] = load(grad);
  for (int64_t y = 0; y < b.rows; ++y, sums += K * lanes) {
    Vec<A> sum[K];
    FASTFUSE_UNROLL for (int kx = 0; kx < K; ++kx) sum[kx] = load(sums + kx * lanes);
    const A* first = b.row[y] + b.offset;
    if (!b.left) sum_inputs<Product, -r, 0>(first - r * b.step, b.step, g, sum);
    sum_inputs<Product, 0, P>(first, b.step, g, sum);
    if (!b.right) sum_inputs<Product, P, P + r>(first + P * b.step, b.step, g, sum);
    FASTFUSE_UNROLL for (int kx = 0; kx < K; ++kx) store(sums + kx * lanes, sum[kx]);
  }
}

// Functions for blocks of 1, 2, ... outputs.
template <class A>
struct Blocks {
  ConvolveBlock<A> convolve[kMaxBlock<A>];
  SumBlock<A> sum[kMaxBlock<A>];
};

template <class Product, class A, int K, int... P>
struct MakeBlocks : MakeBlocks<Product, A, K, kMaxBlock<A> - static_cast<int>(sizeof...(P)), P...> {
};
template <class Product, class A, int K, int... P>
struct MakeBlocks<Product, A, K, 1, P...> {
  static constexpr Blocks<A> value = {
      {convolve_block<Product, A, K, 1>, convolve_block<Product, A, K, P>...},
      {sum_block<Product, A, K, 1>, sum_block<Product, A, K, P>...}};
};

// None for kernels of other sizes than 3, 5 and 7. Where there are pairs, those have them, and only
// other sizes are left to values.
template <class Product, class A>
FASTFUSE_INLINE const Blocks<A>* blocks_of([[maybe_unused]] int64_t kernel_size) {
#if defined(__AVX512BF16__)
  if constexpr (!Product::kPairs)
    return nullptr;
  else
#endif
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
