// Blocks of depthwise_conv2d: outputs of one x-phase in registers, of a row and one vector of
// channels.
#pragma once

#include "cpu/depthwise_conv2d_elements.h"
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

template <class Elements, int K, int P, class A = typename Elements::Compute>
void convolve_block(const Block<A>& b, const Taps<A>& taps, const A* bias, A* out) {
  constexpr int64_t row_of_taps = K * kLanes<A>;
  Vec<A> sum[P];
  const Vec<A> start = load(bias);
  FASTFUSE_UNROLL for (int p = 0; p < P; ++p) sum[p] = start;
  int64_t y = 0;
  for (; y + Elements::kRows <= b.rows; y += Elements::kRows)
    add_row<Elements, K, P>(b, b.row[y], Elements::weights(taps) + y * row_of_taps, sum);
  if constexpr (Elements::kRows > 1)
    if (y < b.rows)
      add_row<typename Elements::FirstRow, K, P>(b, b.row[y], taps.single + y * row_of_taps, sum);
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
template <class Elements, int K, int P, class A = typename Elements::Compute>
void sum_block(const Block<A>& b, const A* grad, A* sums) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr int r = K / 2;
  Vec<A> g[P];
  FASTFUSE_UNROLL for (int p = 0; p < P; ++p, grad += b.step) g[p] = load(grad);
  for (int64_t y = 0; y < b.rows; ++y, sums += K * lanes) {
    Vec<A> sum[K];
    FASTFUSE_UNROLL for (int kx = 0; kx < K; ++kx) sum[kx] = load(sums + kx * lanes);
    const A* first = b.row[y] + b.offset;
    if (!b.left) sum_inputs<Elements, -r, 0>(first - r * b.step, b.step, g, sum);
    sum_inputs<Elements, 0, P>(first, b.step, g, sum);
    if (!b.right) sum_inputs<Elements, P, P + r>(first + P * b.step, b.step, g, sum);
    FASTFUSE_UNROLL for (int kx = 0; kx < K; ++kx) store(sums + kx * lanes, sum[kx]);
  }
}

// Functions for blocks of 1, 2, ... outputs.
template <class A>
struct Blocks {
  ConvolveBlock<A> convolve[kMaxBlock<A>];
  SumBlock<A> sum[kMaxBlock<A>];
};

template <class Elements, int K, int Longest, int... P>
struct MakeBlocks : MakeBlocks<Elements, K, Longest - 1, Longest, P...> {};
template <class Elements, int K, int... P>
struct MakeBlocks<Elements, K, 0, P...> {
  static constexpr Blocks<typename Elements::Compute> value = {{convolve_block<Elements, K, P>...},
                                                               {sum_block<Elements, K, P>...}};
};

// None for kernels of other sizes than 3, 5 and 7, and for elements that blocks do not take.
template <class Elements, class A = typename Elements::Compute>
FASTFUSE_INLINE const Blocks<A>* blocks_of([[maybe_unused]] int64_t kernel_size) {
  if constexpr (Elements::kRows == BlockElements<typename Elements::Storage>::kRows) {
    using Buffered = typename Elements::Buffered;
    switch (kernel_size) {
      case 3:
        return &MakeBlocks<Buffered, 3, kMaxBlock<A>>::value;
      case 5:
        return &MakeBlocks<Buffered, 5, kMaxBlock<A>>::value;
      case 7:
        return &MakeBlocks<Buffered, 7, kMaxBlock<A>>::value;
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace fastfuse
