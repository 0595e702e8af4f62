// Products of matrices that fit the caches, in panels of sums that fit the registers.
#pragma once

#include "cpu/integers.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

// A multiple of every panel's rows.
constexpr int64_t kPanelMultiple = 12;
constexpr int kMaxPanelVectors = 4;

// Rows of a panel so many vectors wide, whose sums are registers.
template <int Vectors>
constexpr int kPanelRows = kVectorBytes < 64 ? 12 / Vectors
                           : Vectors < 3     ? 12
                                             : 6;

// A matrix with any strides.
template <class A>
struct Strided {
  const A* data;
  int64_t row, column;
};

// Rows of a panel of out = left right, or of out += left right: what is added is summed apart, so
// that long sums are sums of shorter ones.
template <class A, int Vectors, bool Add, int Rows>
FASTFUSE_INLINE void multiply_rows(A* out, int64_t out_stride, Strided<A> left, const A* right,
                                   int64_t right_stride, int64_t depth) {
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[Rows][Vectors];
  FASTFUSE_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FASTFUSE_UNROLL
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Vec<A>{};
  }
  const A* l = left.data;
  for (int64_t k = 0; k < depth; ++k, l += left.column, right += right_stride) {
    Vec<A> x[Vectors];
    FASTFUSE_UNROLL
    for (int v = 0; v < Vectors; ++v) x[v] = load(right + v * lanes);
    FASTFUSE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const A factor = l[r * left.row];
      FASTFUSE_UNROLL
      for (int v = 0; v < Vectors; ++v) sums[r][v] += factor * x[v];
    }
  }
  FASTFUSE_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FASTFUSE_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      A* const to = out + r * out_stride + v * lanes;
      store(to, Add ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// A panel, of rows up to a multiple of its own.
template <class A, int Vectors, bool Add>
FASTFUSE_INLINE void multiply_panel(A* out, int64_t out_stride, Strided<A> left, int64_t rows,
                                    const A* right, int64_t right_stride, int64_t depth) {
  constexpr int kRows = kPanelRows<Vectors>;
  for (int64_t i = 0; i < rows; i += kRows)
    multiply_rows<A, Vectors, Add, kRows>(out + i * out_stride, out_stride,
                                          {left.data + i * left.row, left.row, left.column}, right,
                                          right_stride, depth);
}

// out = left right, of whole vectors of columns; rows are done up to a multiple of a panel's, which
// is at most kPanelMultiple.
template <class A, bool Add = false>
void multiply(A* out, int64_t out_stride, Strided<A> left, int64_t rows, const A* right,
              int64_t right_stride, int64_t depth, int64_t columns) {
  int64_t vectors = columns / kLanes<A>, panels = ceil_div(vectors, kMaxPanelVectors);
  for (; panels > 0; --panels) {
    const int64_t here = ceil_div(vectors, panels);
    const auto panel = [&](auto count) {
      multiply_panel<A, decltype(count)::value, Add>(out, out_stride, left, rows, right,
                                                     right_stride, depth);
    };
    switch (here) {
      case 1:
        panel(Count<1>{});
        break;
      case 2:
        panel(Count<2>{});
        break;
      case 3:
        panel(Count<3>{});
        break;
      default:
        panel(Count<4>{});
        break;
    }
    vectors -= here;
    out += here * kLanes<A>;
    right += here * kLanes<A>;
  }
}

// to[c][r] = from[r][c], of whole vectors both ways.
template <class A>
FASTFUSE_INLINE void transpose_rows(A* to, int64_t to_stride, const A* from, int64_t stride,
                                    int64_t rows, int64_t columns) {
  constexpr int lanes = kLanes<A>;
  for (int64_t r = 0; r < rows; r += lanes)
    for (int64_t c = 0; c < columns; c += lanes) {
      Vec<A> block[lanes];
      FASTFUSE_UNROLL
      for (int i = 0; i < lanes; ++i) block[i] = load(from + (r + i) * stride + c);
      transpose<A>(block);
      FASTFUSE_UNROLL
      for (int i = 0; i < lanes; ++i) store(to + (c + i) * to_stride + r, block[i]);
    }
}

}  // namespace
}  // namespace fastfuse
