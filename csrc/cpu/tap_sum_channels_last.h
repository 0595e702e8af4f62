// The channels_last bodies of tap_sum: along x first, then along y, over a ring of rows.
//
// A unit is a row, or a pair of rows, of one tile. Within a tile rows are done from top to bottom,
// and rows of the ring that the one before left there are not made again.
#pragma once

#include "cpu/tap_sum_terms.h"

namespace fastfuse {
namespace {

// ---- forward: a unit is a pair of output rows ------------------------------------------------
// The two share most of the rows they are sums of: every row of the ring is loaded once for both.
// Of a level and ky they read up to four source rows.
constexpr int64_t kRowsAtOnce = 2, kSlots = 4;

template <class A>
using ForwardTerm = Term<A, kRowsAtOnce>;

int64_t ring_rows(const TapSumForward& op) { return kSlots * op.num_levels * op.kernel_size; }
int64_t row_pairs(const TapSumForward& op) { return ceil_div(op.out.height, kRowsAtOnce); }

template <class A>
Tiling forward_tiling(const TapSumForward& op) {
  const int64_t column_bytes = max_of(ring_rows(op), kSlots * op.kernel_size) * sizeof(A);
  return Tiling(op.ring_bytes, op.channels, op.out.width, column_bytes, kMinColumns,
                kColumnsAtOnce);
}

template <class A>
int64_t forward_channels_last_units(const TapSumForward& op) {
  return op.batch * forward_tiling<A>(op).tiles() * row_pairs(op);
}

// The ring; the constants of two rows; the terms.
template <class A>
int64_t forward_channels_last_scratch(const TapSumForward& op) {
  const Tiling tiling = forward_tiling<A>(op);
  const int64_t pixels = ring_rows(op) * tiling.columns + kRowsAtOnce * (op.kernel_size + 2);
  return pixels * (tiling.channels + kLanes<A>)*sizeof(A) + ring_rows(op) * sizeof(ForwardTerm<A>);
}

// The bias and what the offsets add to the pixels of a row: a sum over the taps that fall inside.
template <class A>
struct RowConstants {
  const TapSumForward& op;
  const Tile& tile;
  A* const by_kx;       // [k][stride], the offsets summed over ky
  A* const everywhere;  // [stride], where all taps fall inside
  A* const at_border;

  RowConstants(const TapSumForward& op, const Tile& tile, int64_t y, A* scratch)
      : op(op),
        tile(tile),
        by_kx(scratch),
        everywhere(scratch + op.kernel_size * tile.stride),
        at_border(everywhere + tile.stride) {
    const int64_t k = op.kernel_size;
    for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
      for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
        const A* bias = static_cast<const A*>(op.bias) + tile.c0 + c;
        const A* offsets = static_cast<const A*>(op.offsets) + tile.c0 + c;
        Vec<A> total = op.bias ? load(bias) : Vec<A>{};
        for (int64_t kx = 0; op.offsets && kx < k; ++kx) {
          Vec<A> sum{};
          for (int64_t ky = 0; ky < k; ++ky)
            if (inside(ky, op.padding, op.height, op.out.height).contains(y))
              sum += load(offsets + (ky * k + kx) * op.channels);
          store(by_kx + kx * tile.stride + c, sum);
          total += sum;
        }
        store(everywhere + c, total);
      }
    });
  }

  const A* at(int64_t x) const {
    const int64_t first = x - op.padding;  // where tap 0 falls
    if (!op.offsets || (first >= 0 && first + op.kernel_size <= op.width)) return everywhere;
    for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
      for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
        Vec<A> sum = op.bias ? load(static_cast<const A*>(op.bias) + tile.c0 + c) : Vec<A>{};
        for (int64_t kx = 0; kx < op.kernel_size; ++kx)
          if (first + kx >= 0 && first + kx < op.width)
            sum += fastfuse::load(by_kx + kx * tile.stride + c);
        store(at_border + c, sum);
      }
    });
    return at_border;
  }
};

// The source rows that a tap reads for two output rows, with their weights.
template <class A>
struct PairOfRows {
  int64_t source[kSlots];
  A weight[kSlots][kRowsAtOnce];
  int64_t count = 0;

  // `u` is where the tap falls in the upsampled map for the first of the two.
  PairOfRows(const Sampling& axis, int64_t u, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (u + r < 0 || u + r >= axis.out) continue;
      const A upper = upper_weight(axis, u + r);
      add(axis.lower[u + r], r, A(1) - upper);
      if (upper > 0) add(axis.upper[u + r], r, upper);
    }
  }

  static A upper_weight(const Sampling& axis, int64_t u) {
    return axis.upper[u] > axis.lower[u] ? static_cast<const A*>(axis.weight)[u] : A(0);
  }

  // The last source row that the tap read for output rows up to the one that falls on `u`.
  static int64_t last(const Sampling& axis, int64_t u) {
    if (u < 0) return -1;
    return upper_weight(axis, u) > 0 ? axis.upper[u] : axis.lower[u];
  }

 private:
  void add(int64_t row, int64_t r, A w) {
    int64_t i = 0;
    while (i < count && source[i] != row) ++i;
    if (i == count) {
      source[count++] = row;
      weight[i][0] = weight[i][1] = 0;
    }
    weight[i][r] += w;
  }
};

// A source row of a tile for one ky: its kx taps upsampled along x and summed, to a row of the
// ring.
template <class S, class A>
FASTFUSE_INLINE void make_row(const TapSumForward& op, const TapSumLevel& level, const Tile& tile,
                              int64_t ky, int64_t source, A* to) {
  const Image& taps = level.taps.image;
  const int64_t k = op.kernel_size;
  const S* row = static_cast<const S*>(taps.data) + tile.n * taps.stride_n +
                 source * taps.stride_h + tile.c0 + ky * k * level.taps.stride;
  const bool more = source + 1 < taps.height;
  for (int64_t x = tile.x0; x < tile.x1; x += kColumnsAtOnce, to += kColumnsAtOnce * tile.stride) {
    const int64_t group = x / kColumnsAtOnce;
    for (int64_t kx = 0; more && kx < k; ++kx)
      prefetch_below(row + taps.stride_h + kx * level.taps.stride, taps.stride_w, taps.width, group,
                     ceil_div(op.out.width, kColumnsAtOnce), tile.channels);
    for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
      constexpr int V = decltype(vectors)::value;
      Vec<A> sum[kColumnsAtOnce][V] = {};
      add_entries<V, A>(level.first, group, row + c, load, sum);
      for (int r = 0; r < kColumnsAtOnce; ++r)
        for (int v = 0; v < V; ++v) store(to + r * tile.stride + c + v * kLanes<A>, sum[r][v]);
    });
  }
}

// Makes the rows of `length` that the output rows from `y` on are sums of, less those that the two
// before left in the ring if `continued`. Writes the terms of these sums; returns their end.
template <class S, class A>
FASTFUSE_INLINE ForwardTerm<A>* fill_ring(const TapSumForward& op, const Tile& tile, int64_t y,
                                          bool continued, A* slots, int64_t length,
                                          ForwardTerm<A>* terms) {
  const int64_t rows = min_of(kRowsAtOnce, op.out.height - y);
  for (int64_t i = 0; i < op.num_levels; ++i) {
    const TapSumLevel& level = op.levels[i];
    const A scale = static_cast<A>(level.taps.scale);
    // Where source rows are skipped, no two pairs share one, and slots are given out in order.
    const bool dense = level.taps.image.height <= op.height;
    for (int64_t ky = 0; ky < op.kernel_size; ++ky, slots += kSlots * length) {
      const int64_t u = y + ky - op.padding;
      const PairOfRows<A> pair(level.second, u, rows);
      const int64_t made =
          dense && continued && u <= op.height ? PairOfRows<A>::last(level.second, u - 1) : -1;
      for (int64_t j = 0; j < pair.count; ++j) {
        const int64_t source = pair.source[j];
        A* slot = slots + (dense ? source % kSlots : j) * length;
        *terms++ = {slot, {pair.weight[j][0] * scale, pair.weight[j][1] * scale}};
        if (source > made) make_row<S>(op, level, tile, ky, source, slot);
      }
    }
  }
  return terms;
}

// The output rows from `y` on: their constants, what stands there, the terms.
template <class S, bool Stream, class A>
FASTFUSE_INLINE void sum_terms(const TapSumForward& op, const Tile& tile, int64_t y, A* constants,
                               const ForwardTerm<A>* terms, const ForwardTerm<A>* end) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t rows = min_of(kRowsAtOnce, op.out.height - y);
  S* out = static_cast<S*>(op.out.data) + tile.n * op.out.stride_n + y * op.out.stride_h +
           tile.x0 * op.out.stride_w + tile.c0;
  const RowConstants<A> start[kRowsAtOnce] = {
      {op, tile, y, constants},
      {op, tile, min_of(y + 1, op.out.height - 1), constants + (op.kernel_size + 2) * tile.stride}};
  const A base_scale = static_cast<A>(op.base_scale);
  int64_t offset = 0;
  for (int64_t x = tile.x0; x < tile.x1; ++x, offset += tile.stride, out += op.out.stride_w) {
    const A* constant[kRowsAtOnce] = {start[0].at(x), start[1].at(x)};
    for_channels<A, Stream>(tile.channels, [&](auto vectors, int64_t c, auto load, auto store) {
      constexpr int V = decltype(vectors)::value;
      Vec<A> sum[kRowsAtOnce][V] = {};
      for (int r = 0; r < kRowsAtOnce; ++r) {
        for (int v = 0; v < V; ++v) sum[r][v] = fastfuse::load(constant[r] + c + v * lanes);
        if (op.accumulate && r < rows)
          for (int v = 0; v < V; ++v)
            sum[r][v] += base_scale * load(out + r * op.out.stride_h + c + v * lanes);
      }
      add_terms<V>(terms, end, offset + c, sum);
      for (int r = 0; r < kRowsAtOnce; ++r)
        if (r < rows)
          for (int v = 0; v < V; ++v) store(out + r * op.out.stride_h + c + v * lanes, sum[r][v]);
    });
  }
}

template <class S, bool Stream>
void forward_channels_last(const TapSumForward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  for_rows<A>(forward_tiling<A>(op), row_pairs(op), begin, end,
              [&](const Tile& tile, int64_t pair, bool continued) {
                const int64_t y = pair * kRowsAtOnce;
                const int64_t length = round_up(tile.x1 - tile.x0, kColumnsAtOnce) * tile.stride;
                A* ring = static_cast<A*>(scratch);  // [level][ky][slot][x][stride]
                A* constants = ring + ring_rows(op) * length;
                auto* terms = reinterpret_cast<ForwardTerm<A>*>(
                    constants + kRowsAtOnce * (op.kernel_size + 2) * tile.stride);
                auto* terms_end = fill_ring<S>(op, tile, y, continued, ring, length, terms);
                sum_terms<S, Stream>(op, tile, y, constants, terms, terms_end);
              });
}

// ---- backward: a unit is a source row --------------------------------------------------------
// The ring holds the gradient's rows reduced along x for every kx. Taps are gathered kTapsAtOnce at
// a time along each axis: every value is loaded once for all of them.

template <class A>
using BackwardTerm = Term<A, kTapsAtOnce>;

int64_t padded_taps(const TapSumBackward& op) { return round_up(op.kernel_size, kTapsAtOnce); }

template <class A>
Tiling backward_tiling(const TapSumBackward& op) {
  const int64_t width = op.taps.image.width, min_columns = kMinColumns * width / op.out.width;
  return Tiling(op.ring_bytes, op.channels, width, op.ring_rows * padded_taps(op) * sizeof(A),
                max_of(min_columns, 1), 1);
}

template <class A>
int64_t backward_channels_last_units(const TapSumBackward& op) {
  return op.batch * backward_tiling<A>(op).tiles() * op.taps.image.height;
}

template <class A>
int64_t backward_channels_last_scratch(const TapSumBackward& op) {
  const Tiling tiling = backward_tiling<A>(op);
  const int64_t pixels = op.ring_rows * padded_taps(op) * tiling.columns;
  return pixels * (tiling.channels + kLanes<A>)*sizeof(A) + op.ring_rows * sizeof(BackwardTerm<A>);
}

// The rows of the gradient that any tap of a source row reads.
FASTFUSE_INLINE Range rows_read(const TapSumBackward& op, int64_t source) {
  const int64_t first = op.y.first[source] + op.padding;
  return {max_of(first - (op.kernel_size - 1), 0),
          min_of(first + op.y.count[source], op.out.height)};
}

// A row of the gradient reduced along x to a tile's source columns, for every kx: to a row of the
// ring, [x][padded kx][stride].
template <class S, class A>
FASTFUSE_INLINE void reduce_row(const TapSumBackward& op, const Tile& tile, int64_t y, A* to) {
  const Image& out = op.out;
  const S* gradient =
      static_cast<const S*>(out.data) + tile.n * out.stride_n + tile.c0 + y * out.stride_h;
  const int64_t groups = ceil_div(op.kernel_size, kTapsAtOnce);  // of each source column
  for (int64_t x = tile.x0; x < tile.x1; ++x) {
    if (y + 1 < out.height)
      prefetch_below(gradient + out.stride_h, out.stride_w, out.width, x, op.taps.image.width,
                     tile.channels);
    for (int64_t g = 0; g < groups; ++g, to += kTapsAtOnce * tile.stride)
      for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
        constexpr int V = decltype(vectors)::value;
        Vec<A> sum[kTapsAtOnce][V] = {};
        add_entries<V, A>(op.columns, x * groups + g, gradient + c, load, sum);
        for (int r = 0; r < kTapsAtOnce; ++r)
          for (int v = 0; v < V; ++v) store(to + r * tile.stride + c + v * kLanes<A>, sum[r][v]);
      });
  }
}

// The terms of source row `s` and up to kTapsAtOnce ky from `ky0` on; returns their end.
template <class A>
FASTFUSE_INLINE BackwardTerm<A>* find_terms(const TapSumBackward& op, int64_t s, int64_t ky0,
                                            Range rows, const A* ring, int64_t length,
                                            BackwardTerm<A>* terms) {
  const A* weights = static_cast<const A*>(op.y.weight) + op.y.offset[s];
  const A scale = static_cast<A>(op.taps.scale);
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    BackwardTerm<A> term = {ring + y % op.ring_rows * length, {}};
    bool counts = false;
    for (int64_t r = 0; r < min_of(kTapsAtOnce, op.kernel_size - ky0); ++r) {
      const int64_t i = y + ky0 + r - op.padding - op.y.first[s];
      if (i < 0 || i >= op.y.count[s]) continue;
      term.weight[r] = weights[i] * scale;
      counts = true;
    }
    if (counts) *terms++ = term;
  }
  return terms;
}

// The taps of source row `s` for these ky and every kx.
template <class S, bool Stream, class A>
FASTFUSE_INLINE void write_taps(const TapSumBackward& op, const Tile& tile, int64_t s, int64_t ky0,
                                const BackwardTerm<A>* terms, const BackwardTerm<A>* end) {
  const Image& taps = op.taps.image;
  const int64_t k = op.kernel_size, padded_k = padded_taps(op);
  const int64_t group = min_of(kTapsAtOnce, k - ky0);
  S* to = static_cast<S*>(taps.data) + tile.n * taps.stride_n + s * taps.stride_h + tile.c0;
  int64_t offset = 0;
  for (int64_t x = tile.x0; x < tile.x1; ++x)
    for (int64_t kx = 0; kx < padded_k; ++kx, offset += tile.stride) {
      if (kx >= k) continue;
      S* tap = to + x * taps.stride_w + (ky0 * k + kx) * op.taps.stride;
      for_channels<A, Stream>(tile.channels, [&](auto vectors, int64_t c, auto, auto store) {
        constexpr int V = decltype(vectors)::value;
        Vec<A> sum[kTapsAtOnce][V] = {};
        add_terms<V>(terms, end, offset + c, sum);
        for (int r = 0; r < kTapsAtOnce; ++r)
          if (r < group)
            for (int v = 0; v < V; ++v)
              store(tap + r * k * op.taps.stride + c + v * kLanes<A>, sum[r][v]);
      });
    }
}

template <class S, bool Stream>
void backward_channels_last(const TapSumBackward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  for_rows<A>(backward_tiling<A>(op), op.taps.image.height, begin, end,
              [&](const Tile& tile, int64_t s, bool continued) {
                const int64_t length = padded_taps(op) * (tile.x1 - tile.x0) * tile.stride;
                A* ring = static_cast<A*>(scratch);  // [gradient's row % ring_rows]
                auto* terms = reinterpret_cast<BackwardTerm<A>*>(ring + op.ring_rows * length);
                const Range rows = rows_read(op, s);
                const int64_t made = continued ? rows_read(op, s - 1).end : 0;
                for (int64_t y = max_of(rows.begin, made); y < rows.end; ++y)
                  reduce_row<S>(op, tile, y, ring + y % op.ring_rows * length);
                for (int64_t ky0 = 0; ky0 < op.kernel_size; ky0 += kTapsAtOnce) {
                  auto* terms_end = find_terms(op, s, ky0, rows, ring, length, terms);
                  write_taps<S, Stream, A>(op, tile, s, ky0, terms, terms_end);
                }
              });
}

}  // namespace
}  // namespace fastfuse
