// Sums of tap_sum along one axis, for vector bodies.
#pragma once

#include "cpu/integers.h"
#include "cpu/tap_sum.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

struct Range {
  int64_t begin, end;
  bool contains(int64_t i) const { return begin <= i && i < end; }
};

// The output positions at which a tap falls inside the upsampled map.
FASTFUSE_INLINE Range inside(int64_t tap, int64_t padding, int64_t size, int64_t out_size) {
  return {min_of(max_of(padding - tap, 0), out_size), min_of(size + padding - tap, out_size)};
}

// sum[r] += a table's entries for a group and result r, of the values at p + offset. Each is loaded
// once; what does not count for a result is not added to it, not even times zero.
template <int V, class A, int Results, class S, class Load>
FASTFUSE_INLINE void add_entries(const TapTable& table, int64_t group, const S* p, Load load,
                                 Vec<A> (&sum)[Results][V]) {
  const A* weights = static_cast<const A*>(table.weight);
  for (int32_t e = table.begin[group]; e < table.begin[group + 1]; ++e) {
    const S* from = opaque(p + table.offset[e]);
    Vec<A> value[V];
    for (int v = 0; v < V; ++v) value[v] = load(from + v * kLanes<A>);
    for (int r = 0; r < Results; ++r)
      if (const A weight = weights[e * Results + r]; weight != 0)
        for (int v = 0; v < V; ++v) sum[r][v] += weight * value[v];
  }
}

// A row of a ring and the weights with which it counts for `Results` rows of the result.
template <class A, int Results>
struct Term {
  const A* row;
  A weight[Results];
};

// sum[r] += the terms at `offset`, in the same way.
template <int V, class A, int Results>
FASTFUSE_INLINE void add_terms(const Term<A, Results>* begin, const Term<A, Results>* end,
                               int64_t offset, Vec<A> (&sum)[Results][V]) {
  for (const Term<A, Results>* term = begin; term != end; ++term) {
    const A* from = opaque(term->row + offset);
    Vec<A> value[V];
    for (int v = 0; v < V; ++v) value[v] = load(from + v * kLanes<A>);
    for (int r = 0; r < Results; ++r)
      if (term->weight[r] != 0)
        for (int v = 0; v < V; ++v) sum[r][v] += term->weight[r] * value[v];
  }
}

}  // namespace
}  // namespace fastfuse
