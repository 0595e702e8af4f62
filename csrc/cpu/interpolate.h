// Interpolation of rows, for vector bodies.
#pragma once

#include "cpu/bilinear.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

template <class A>
FASTFUSE_INLINE Vec<A> interpolate(Vec<A> a, Vec<A> b, Vec<A> weight_of_b) {
  return (A(1) - weight_of_b) * a + weight_of_b * b;  // not a + w * (b - a): that may overflow
}

// The length of a buffer for a row of n values that is read and written by whole vectors.
constexpr int64_t padded(int64_t n) { return n + 2 * kLanes<float>; }

// wide[0, x.out) = line interpolated along x. Both are padded by a vector or more.
template <class A>
FASTFUSE_INLINE void widen_row(const A* line, const Sampling& x, A* wide) {
  constexpr int64_t lanes = kLanes<A>;
  using Index = typename IntegerOf<A>::type;
  using TableVec = typename VectorType<int32_t, lanes * sizeof(int32_t)>::type;
  const A* weights = static_cast<const A*>(x.weight);
  for (int64_t d = 0; d < x.out; d += lanes) {
    const int64_t base = x.lower[d];
    const int64_t last = d + lanes <= x.out ? d + lanes - 1 : x.out - 1;
    Vec<A> a, b;
    if (x.upper[last] - base < 2 * lanes) {  // the sources of these outputs fit two vectors
      const auto lower = __builtin_convertvector(load_bytes<TableVec>(x.lower + d), IndexVec<A>);
      const auto upper = __builtin_convertvector(load_bytes<TableVec>(x.upper + d), IndexVec<A>);
      a = pick<A>(line + base, lower - static_cast<Index>(base));
      b = pick<A>(line + base, upper - static_cast<Index>(base));
    } else {
      for (int i = 0; i < lanes; ++i) {
        a[i] = line[x.lower[d + i]];
        b[i] = line[x.upper[d + i]];
      }
    }
    store(wide + d, interpolate<A>(a, b, load(weights + d)));
  }
}

}  // namespace
}  // namespace fastfuse
