// Vector bodies of tap_sum, compiled once per instruction set (see isa_list.h).
//
// Every body is separable. The channels_last ones go along x first and keep the rows they made in
// a ring of a few, dense in memory whatever the strides of the taps; the contiguous ones go along y
// first. A row of the result depends on nothing but its inputs.
// docs/tap_sum.md explains the four bodies.

#include "cpu/interpolate.h"
#include "cpu/tap_sum.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

// The output positions at which a tap falls inside the upsampled map.
struct Range {
  int64_t begin, end;
};
FASTFUSE_INLINE Range inside(int64_t tap, int64_t padding, int64_t size, int64_t out_size) {
  return {min_of(max_of(padding - tap, 0), out_size), min_of(size + padding - tap, out_size)};
}

// Of the targets that read source position `s`, those that a tap brings into the output: they are
// first + i - tap + padding for begin <= i < end.
FASTFUSE_INLINE Range readers(const AdjointSampling& axis, int64_t s, int64_t tap, int64_t padding,
                              int64_t out_size) {
  const int64_t shift = tap - padding - axis.first[s];
  return {max_of(shift, 0), min_of(out_size + shift, axis.count[s])};
}

// ---- channels_last ---------------------------------------------------------------------------
// A unit is a row, or a pair of rows, of one tile. Within a tile rows are done from top to bottom.

// sum[r] += a table's entries for a position and result r, of the values at p + offset. Each is
// loaded once; what does not count for a result is not added to it, not even times zero.
template <int V, class A, int Results, class S, class Load>
FASTFUSE_INLINE void add_entries(const TapTable& table, int64_t position, const S* p, Load load,
                                 Vec<A> (*sum)[V], Count<Results>) {
  const A* weights = static_cast<const A*>(table.weight);
  for (int32_t e = table.begin[position]; e < table.begin[position + 1]; ++e) {
    const S* from = opaque(p + table.offset[e]);
    Vec<A> value[V];
    for (int v = 0; v < V; ++v) value[v] = load(from + v * kLanes<A>);
    for (int r = 0; r < Results; ++r)
      if (const A weight = weights[e * Results + r]; weight != 0)
        for (int v = 0; v < V; ++v) sum[r][v] += weight * value[v];
  }
}

// A row of a ring and the weights with which it counts for `Rows` results.
template <class A, int Rows>
struct Term {
  const A* row;
  A weight[Rows];
};

// sum[r] += the terms at `offset`, in the same way.
template <int V, class A, int Rows>
FASTFUSE_INLINE void add_terms(const Term<A, Rows>* begin, const Term<A, Rows>* end, int64_t offset,
                               Vec<A> (*sum)[V]) {
  for (const Term<A, Rows>* term = begin; term != end; ++term) {
    const A* from = opaque(term->row + offset);
    Vec<A> value[V];
    for (int v = 0; v < V; ++v) value[v] = load(from + v * kLanes<A>);
    for (int r = 0; r < Rows; ++r)
      if (term->weight[r] != 0)
        for (int v = 0; v < V; ++v) sum[r][v] += term->weight[r] * value[v];
  }
}

// Output rows are made two at a time, which share most of the rows they are sums of: every row of
// the ring is loaded once for both. Of a level and ky, two rows read up to four source rows.
constexpr int64_t kSlots = 4;

template <class A>
Tiling forward_tiling(const TapSum& op) {
  const int64_t rows = kSlots * max_of(op.num_levels, 1) * op.kernel_size;
  return Tiling(op.ring_bytes, op.channels, op.out.width, rows * sizeof(A), kMinColumns, kPair);
}

int64_t forward_pairs(const TapSum& op) { return (op.out.height + kPair - 1) / kPair; }

template <class A>
int64_t forward_channels_last_units(const TapSum& op) {
  return op.batch * forward_tiling<A>(op).tiles() * forward_pairs(op);
}

// The ring; the constants of two rows; the terms.
template <class A>
int64_t forward_channels_last_scratch(const TapSum& op) {
  const Tiling tiling = forward_tiling<A>(op);
  const int64_t rows = kSlots * op.num_levels * op.kernel_size;
  const int64_t pixels = rows * tiling.columns + kPair * (op.kernel_size + 2);
  return pixels * (tiling.channels + kLanes<A>)*sizeof(A) + rows * sizeof(Term<A, kPair>);
}

// The bias and what the offsets add to the pixels of a row: a sum over the taps that fall inside.
template <class A>
struct RowConstants {
  const TapSum& op;
  const Tile& tile;
  A* const by_kx;       // [k][stride], the offsets summed over ky
  A* const everywhere;  // [stride], where all taps fall inside
  A* const at_border;

  RowConstants(const TapSum& op, const Tile& tile, int64_t y, A* scratch)
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
          for (int64_t ky = 0; ky < k; ++ky) {
            const Range rows = inside(ky, op.padding, op.height, op.out.height);
            if (y >= rows.begin && y < rows.end) sum += load(offsets + (ky * k + kx) * op.channels);
          }
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
  A weight[kSlots][kPair];
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

// Two rows of a tile, from `y` on. The ring holds what the two before left there if `continued`.
template <class S, bool Stream>
FASTFUSE_INLINE void sum_rows(const TapSum& op, const Tile& tile, int64_t y, bool continued,
                              void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t rows = min_of(kPair, op.out.height - y);
  const int64_t columns = (tile.x1 - tile.x0 + 1) / kPair * kPair;
  const int64_t k = op.kernel_size, length = columns * tile.stride;
  A* slots = static_cast<A*>(scratch);  // [level][ky][slot][x][stride]
  A* const constants = slots + kSlots * op.num_levels * k * length;
  auto* const terms = reinterpret_cast<Term<A, kPair>*>(constants + kPair * (k + 2) * tile.stride);
  Term<A, kPair>* end = terms;

  for (int64_t i = 0; i < op.num_levels; ++i) {
    const TapLevel& level = op.levels[i];
    const Image& taps = level.taps;
    const S* from = static_cast<const S*>(taps.data) + tile.n * taps.stride_n + tile.c0;
    const A scale = static_cast<A>(level.scale);
    // Where source rows are skipped, no two pairs share one, and slots are given out in order.
    const bool dense = taps.height <= op.height;
    for (int64_t ky = 0; ky < k; ++ky, slots += kSlots * length) {
      const int64_t u = y + ky - op.padding;
      const PairOfRows<A> pair(level.axis, u, rows);
      const int64_t made =
          dense && continued && u <= op.height ? PairOfRows<A>::last(level.axis, u - 1) : -1;
      for (int64_t j = 0; j < pair.count; ++j) {
        const int64_t source = pair.source[j];
        A* to = slots + (dense ? source % kSlots : j) * length;
        *end++ = {to, {pair.weight[j][0] * scale, pair.weight[j][1] * scale}};
        if (source <= made) continue;
        const S* row = from + source * taps.stride_h + ky * k * level.tap_stride;
        const bool more = source + 1 < taps.height;
        for (int64_t x = tile.x0; x < tile.x1; x += kPair, to += kPair * tile.stride) {
          for (int64_t kx = 0; more && kx < k; ++kx)
            prefetch_below(row + taps.stride_h + kx * level.tap_stride, taps.stride_w, taps.width,
                           x / kPair, (op.out.width + 1) / kPair, tile.channels);
          for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
            constexpr int V = decltype(vectors)::value;
            Vec<A> sum[kPair][V] = {};
            add_entries<V, A>(level.terms, x / kPair, row + c, load, sum, Count<kPair>{});
            for (int r = 0; r < kPair; ++r)
              for (int v = 0; v < V; ++v) store(to + r * tile.stride + c + v * lanes, sum[r][v]);
          });
        }
      }
    }
  }

  S* out = static_cast<S*>(op.out.data) + tile.n * op.out.stride_n + y * op.out.stride_h +
           tile.x0 * op.out.stride_w + tile.c0;
  const RowConstants<A> start[kPair] = {
      {op, tile, y, constants},
      {op, tile, min_of(y + 1, op.out.height - 1), constants + (k + 2) * tile.stride}};
  const A base_scale = static_cast<A>(op.base_scale);
  int64_t offset = 0;
  for (int64_t x = tile.x0; x < tile.x1; ++x, offset += tile.stride, out += op.out.stride_w) {
    const A* constant[kPair] = {start[0].at(x), start[1].at(x)};
    for_channels<A, Stream>(tile.channels, [&](auto vectors, int64_t c, auto load, auto store) {
      constexpr int V = decltype(vectors)::value;
      Vec<A> sum[kPair][V] = {};
      for (int r = 0; r < kPair; ++r) {
        for (int v = 0; v < V; ++v) sum[r][v] = fastfuse::load(constant[r] + c + v * lanes);
        if (op.accumulate && r < rows)
          for (int v = 0; v < V; ++v)
            sum[r][v] += base_scale * load(out + r * op.out.stride_h + c + v * lanes);
      }
      add_terms<V>(terms, end, offset + c, sum);
      for (int r = 0; r < kPair; ++r)
        if (r < rows)
          for (int v = 0; v < V; ++v) store(out + r * op.out.stride_h + c + v * lanes, sum[r][v]);
    });
  }
}

template <class S, bool Stream>
void forward_channels_last(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  for_rows<A>(forward_tiling<A>(op), op.channels, op.out.width, forward_pairs(op), begin, end,
              [&](const Tile& tile, int64_t pair, bool continued) {
                sum_rows<S, Stream>(op, tile, pair * kPair, continued, scratch);
              });
}

// Taps are gathered kTaps at a time along each axis: every value is loaded once for all of them.
int64_t padded_taps(const TapSum& op) { return (op.kernel_size + kTaps - 1) / kTaps * kTaps; }

template <class A>
Tiling backward_tiling(const TapSum& op) {
  const TapLevel& level = op.levels[0];
  const int64_t min_columns = kMinColumns * level.taps.width / op.out.width;
  return Tiling(op.ring_bytes, op.channels, level.taps.width,
                level.ring_rows * padded_taps(op) * sizeof(A), max_of(min_columns, 1), 1);
}

template <class A>
int64_t backward_channels_last_units(const TapSum& op) {
  return op.batch * backward_tiling<A>(op).tiles() * op.levels[0].taps.height;
}

template <class A>
int64_t backward_channels_last_scratch(const TapSum& op) {
  const Tiling tiling = backward_tiling<A>(op);
  const int64_t rows = op.levels[0].ring_rows;
  const int64_t pixels = rows * padded_taps(op) * tiling.columns;
  return pixels * (tiling.channels + kLanes<A>)*sizeof(A) + rows * sizeof(Term<A, kTaps>);
}

// One source row of a tile. The ring holds the gradient's rows reduced along x for every kx, up to
// the last that source row y - 1 read if `continued`.
template <class S, bool Stream>
FASTFUSE_INLINE void gather_row(const TapSum& op, const Tile& tile, int64_t s, bool continued,
                                void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const TapLevel& level = op.levels[0];
  const Image &out = op.out, &taps = level.taps;
  const AdjointSampling& along_y = level.adjoint_y;
  const int64_t k = op.kernel_size, groups = (k + kTaps - 1) / kTaps;
  const int64_t padded_k = groups * kTaps, length = padded_k * (tile.x1 - tile.x0) * tile.stride;
  const S* from = static_cast<const S*>(out.data) + tile.n * out.stride_n + tile.c0;
  S* to = static_cast<S*>(taps.data) + tile.n * taps.stride_n + s * taps.stride_h + tile.c0;
  A* const ring = static_cast<A*>(scratch);  // [gradient's row % ring_rows][x][padded kx][stride]
  auto* const terms = reinterpret_cast<Term<A, kTaps>*>(ring + level.ring_rows * length);

  // The rows of the gradient that any tap of a source row reads.
  const auto rows_of = [&](int64_t source) {
    const int64_t first = along_y.first[source] + op.padding;
    return Range{max_of(first - (k - 1), 0), min_of(first + along_y.count[source], out.height)};
  };
  const Range rows = rows_of(s);
  const int64_t made = continued ? rows_of(s - 1).end : 0;
  for (int64_t y = max_of(rows.begin, made); y < rows.end; ++y) {
    const S* gradient = from + y * out.stride_h;
    A* column = ring + y % level.ring_rows * length;
    for (int64_t x = tile.x0; x < tile.x1; ++x) {
      if (y + 1 < out.height)
        prefetch_below(gradient + out.stride_h, out.stride_w, out.width, x, taps.width,
                       tile.channels);
      for (int64_t kx = 0; kx < k; kx += kTaps, column += kTaps * tile.stride)
        for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
          constexpr int V = decltype(vectors)::value;
          Vec<A> sum[kTaps][V] = {};
          add_entries<V, A>(level.terms, x * groups + kx / kTaps, gradient + c, load, sum,
                            Count<kTaps>{});
          for (int r = 0; r < kTaps; ++r)
            for (int v = 0; v < V; ++v) store(column + r * tile.stride + c + v * lanes, sum[r][v]);
        });
    }
  }

  const A* weights = static_cast<const A*>(along_y.weight) + along_y.offset[s];
  const A scale = static_cast<A>(level.scale);
  for (int64_t ky0 = 0; ky0 < k; ky0 += kTaps) {
    const int64_t group = min_of(kTaps, k - ky0);
    Term<A, kTaps>* end = terms;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      Term<A, kTaps> term = {ring + y % level.ring_rows * length, {}};
      bool counts = false;
      for (int64_t r = 0; r < group; ++r) {
        const int64_t i = y + ky0 + r - op.padding - along_y.first[s];
        if (i < 0 || i >= along_y.count[s]) continue;
        term.weight[r] = weights[i] * scale;
        counts = true;
      }
      if (counts) *end++ = term;
    }
    int64_t offset = 0;
    for (int64_t x = tile.x0; x < tile.x1; ++x)
      for (int64_t kx = 0; kx < padded_k; ++kx, offset += tile.stride) {
        if (kx >= k) continue;
        S* tap = to + x * taps.stride_w + (ky0 * k + kx) * level.tap_stride;
        for_channels<A, Stream>(tile.channels, [&](auto vectors, int64_t c, auto, auto store) {
          constexpr int V = decltype(vectors)::value;
          Vec<A> sum[kTaps][V] = {};
          add_terms<V>(terms, end, offset + c, sum);
          for (int r = 0; r < kTaps; ++r)
            if (r < group)
              for (int v = 0; v < V; ++v)
                store(tap + r * k * level.tap_stride + c + v * lanes, sum[r][v]);
        });
      }
  }
}

template <class S, bool Stream>
void backward_channels_last(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const Image& taps = op.levels[0].taps;
  for_rows<A>(backward_tiling<A>(op), op.channels, taps.width, taps.height, begin, end,
              [&](const Tile& tile, int64_t s, bool continued) {
                gather_row<S, Stream>(op, tile, s, continued, scratch);
              });
}

// ---- contiguous ------------------------------------------------------------------------------

// Forward: a unit is a row of the output.
template <class A>
int64_t forward_contiguous_units(const TapSum& op) {
  return op.batch * op.channels * op.out.height;
}

template <class A>
int64_t forward_contiguous_scratch(const TapSum& op) {
  int64_t source = 0;
  for (int64_t i = 0; i < op.num_levels; ++i) source = max_of(source, op.levels[i].taps.width);
  return (padded(op.out.width) + padded(op.width) + padded(source)) * sizeof(A);
}

// sum[0, n) += a row; both may be read and written up to a vector further
template <class A>
FASTFUSE_INLINE void add_to(A* sum, const A* row, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) store(sum + i, load(sum + i) + load(row + i));
}

template <class S, bool Stream>
void forward_contiguous(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t k = op.kernel_size;
  A* sum = static_cast<A*>(scratch);
  A* wide = sum + padded(op.out.width);
  A* narrow = wide + padded(op.width);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / op.out.height, y = unit % op.out.height;
    const int64_t n = plane / op.channels, c = plane % op.channels;
    S* out = static_cast<S*>(op.out.data) + n * op.out.stride_n + c * op.out.stride_c +
             y * op.out.stride_h;
    const A bias = op.bias ? static_cast<const A*>(op.bias)[c] : A(0);
    for (int64_t x = 0; x < padded(op.out.width); x += lanes) store(sum + x, splat(bias));
    if (op.accumulate) {
      const A base_scale = static_cast<A>(op.base_scale);
      for_each_vector<A>(op.out.width, [&](int64_t x, auto load, auto) {
        store(sum + x, load(out + x) * base_scale + bias);
      });
    }
    if (op.offsets)
      for (int64_t kx = 0; kx < k; ++kx) {
        const Range xs = inside(kx, op.padding, op.width, op.out.width);
        A value = 0;
        for (int64_t ky = 0; ky < k; ++ky) {
          const Range ys = inside(ky, op.padding, op.height, op.out.height);
          if (y >= ys.begin && y < ys.end)
            value += static_cast<const A*>(op.offsets)[(ky * k + kx) * op.channels + c];
        }
        for (int64_t x = xs.begin; x < xs.end; ++x) sum[x] += value;
      }

    for (int64_t i = 0; i < op.num_levels; ++i) {
      const TapLevel& level = op.levels[i];
      const Image& taps = level.taps;
      const bool same_width = taps.width == op.width;
      for (int64_t kx = 0; kx < k; ++kx) {
        const Range xs = inside(kx, op.padding, op.width, op.out.width);
        if (xs.begin >= xs.end) continue;
        const S* from = static_cast<const S*>(taps.data) + n * taps.stride_n + c * taps.stride_c +
                        kx * level.tap_stride;
        A* row = same_width ? wide : narrow;
        for_each_vector<A>(taps.width, [&](int64_t x, auto load, auto store) {
          Vec<A> value[1][1] = {};
          add_entries<1, A>(level.terms, y, from + x, load, value, Count<1>{});
          store(row + x, value[0][0]);
        });
        if (!same_width) widen_row(narrow, level.axis, wide);
        for (int64_t x = 0; x < 2 * lanes; ++x) wide[op.width + x] = 0;  // add_to goes further
        add_to(sum + xs.begin, wide + xs.begin + kx - op.padding, xs.end - xs.begin);
      }
    }
    for_each_vector<A, Stream>(op.out.width, [&](int64_t x, auto, auto store) {
      store(out + x, fastfuse::load(sum + x));
    });
  }
}

// Backward: a unit is a row of the taps for one ky, all kx. Rows are reduced kLanes at a time,
// transposed, so that the reduction along x runs over lanes.
template <class A>
int64_t backward_contiguous_units(const TapSum& op) {
  return op.batch * op.channels * op.levels[0].taps.height * op.kernel_size;
}

template <class A>
int64_t backward_contiguous_scratch(const TapSum& op) {
  return (padded(op.out.width) + padded(op.levels[0].taps.width)) * sizeof(Vec<A>);
}

template <class S, bool Stream>
void backward_contiguous(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t k = op.kernel_size;
  const Image &out = op.out, &taps = op.levels[0].taps;
  const AdjointSampling &along_y = op.levels[0].adjoint_y, &along_x = op.levels[0].adjoint_x;
  const A scale = static_cast<A>(op.levels[0].scale);
  Vec<A>* tall = static_cast<Vec<A>*>(scratch);  // [out.width][lane = row]
  Vec<A>* reduced = tall + padded(out.width);    // [taps.width][lane = row]

  struct Line {
    const S* from;
    S* to;
    const A* weights;
    int64_t count;
  };
  const auto find = [&](int64_t unit) {
    const int64_t ky = unit % k, s = unit / k % taps.height, plane = unit / k / taps.height;
    const int64_t n = plane / op.channels, c = plane % op.channels;
    const Range ys = readers(along_y, s, ky, op.padding, out.height);
    const int64_t y = along_y.first[s] - ky + op.padding + ys.begin;
    return Line{
        static_cast<const S*>(out.data) + n * out.stride_n + c * out.stride_c + y * out.stride_h,
        static_cast<S*>(taps.data) + n * taps.stride_n + c * taps.stride_c + s * taps.stride_h +
            ky * k * op.levels[0].tap_stride,
        static_cast<const A*>(along_y.weight) + along_y.offset[s] + ys.begin, ys.end - ys.begin};
  };

  for (int64_t unit = begin; unit < end; unit += lanes) {
    Line lines[lanes];
    const int64_t count = min_of(end - unit, lanes);
    for (int64_t r = 0; r < lanes; ++r) lines[r] = find(unit + (r < count ? r : 0));

    for_each_vector<A>(out.width, [&](int64_t x, auto load, auto) {
      Vec<A> tile[lanes];
      for (int64_t r = 0; r < lanes; ++r) {
        Vec<A> sum{};
        const S* pixels = lines[r].from + x;
        for (int64_t i = 0; i < lines[r].count; ++i, pixels += out.stride_h)
          sum += lines[r].weights[i] * load(pixels);
        tile[r] = sum * scale;
      }
      transpose<A>(tile);
      for (int64_t r = 0; r < lanes; ++r) tall[x + r] = tile[r];
    });

    for (int64_t kx = 0; kx < k; ++kx) {
      for (int64_t s = 0; s < taps.width; ++s) {
        const A* weights = static_cast<const A*>(along_x.weight) + along_x.offset[s];
        const Range xs = readers(along_x, s, kx, op.padding, out.width);
        const Vec<A>* column = tall + along_x.first[s] - kx + op.padding;
        Vec<A> sum{};
        for (int64_t i = xs.begin; i < xs.end; ++i) sum += weights[i] * column[i];
        reduced[s] = sum;
      }
      for_each_vector<A, Stream>(taps.width, [&](int64_t s, auto, auto store) {
        Vec<A> tile[lanes];
        for (int64_t r = 0; r < lanes; ++r) tile[r] = reduced[s + r];
        transpose<A>(tile);
        for (int64_t r = 0; r < count; ++r)
          store(lines[r].to + kx * op.levels[0].tap_stride + s, tile[r]);
      });
    }
  }
}

template <class S, void (*Plain)(const TapSum&, int64_t, int64_t, void*),
          void (*Streaming)(const TapSum&, int64_t, int64_t, void*)>
void choose_stores(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  if (!op.stream) return Plain(op, begin, end, scratch);
  Streaming(op, begin, end, scratch);
  finish_streaming();
}

#define FASTFUSE_KERNEL(S, body)                                                      \
  {choose_stores<S, body<S, false>, body<S, kCanStream>>, body##_units<compute_t<S>>, \
   body##_scratch<compute_t<S>>}
#define FASTFUSE_FOR_DTYPES(body) {FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL, body)}

}  // namespace

extern const TapSumKernels tap_sum_kernels = {
    {FASTFUSE_FOR_DTYPES(forward_contiguous), FASTFUSE_FOR_DTYPES(forward_channels_last)},
    {FASTFUSE_FOR_DTYPES(backward_contiguous), FASTFUSE_FOR_DTYPES(backward_channels_last)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
