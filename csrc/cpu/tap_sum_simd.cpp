// Vector bodies of tap_sum, compiled once per instruction set (see isa_list.h).
//
// Every body is separable. The channels_last ones go along x first and keep the rows they made in
// a ring of a few, dense in memory whatever the strides of the taps; the contiguous ones go along y
// first. A row of the result depends on nothing but its inputs.
// docs/tap_sum.md explains the four bodies.

#include "cpu/interpolate.h"
#include "cpu/tap_sum.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

FASTFUSE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTFUSE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The output positions at which a tap falls inside the upsampled map.
struct Range {
  int64_t begin, end;
};
FASTFUSE_INLINE Range inside(int64_t tap, int64_t padding, int64_t size, int64_t out_size) {
  return {smaller(larger(padding - tap, 0), out_size), smaller(size + padding - tap, out_size)};
}

// Of the targets that read source position `s`, those that a tap brings into the output: they are
// first + i - tap + padding for begin <= i < end.
FASTFUSE_INLINE Range readers(const AdjointSampling& axis, int64_t s, int64_t tap, int64_t padding,
                              int64_t out_size) {
  const int64_t shift = tap - padding - axis.first[s];
  return {larger(shift, 0), smaller(out_size + shift, axis.count[s])};
}

// ---- channels_last ---------------------------------------------------------------------------
// A unit is a row of one tile: some channels (most often all) of some columns, so many that the
// tile's ring fits the second-level cache. Within a tile rows are done from top to bottom.

constexpr int64_t kRingBytes = 512 << 10;
constexpr int64_t kMaxChannels = 512, kMinChannels = 64;  // of a tile
constexpr int64_t kMinColumns = 32;  // of the output, unless there are very many channels

// `columns` to be cut into tiles whose every column takes `column_bytes` per channel.
struct Tiling {
  int64_t channels, columns, channel_blocks, column_blocks;

  Tiling(int64_t all_channels, int64_t all_columns, int64_t column_bytes, int64_t min_columns) {
    channels = smaller(all_channels, kMaxChannels);
    const auto fitting = [&] { return kRingBytes / (channels * column_bytes); };
    while (fitting() < smaller(min_columns, all_columns) && channels > kMinChannels)
      channels = larger(channels / 2, kMinChannels);
    column_blocks = divided(all_columns, larger(smaller(fitting(), all_columns), 1));
    columns = divided(all_columns, column_blocks);
    channel_blocks = divided(all_channels, channels);
  }
  static int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
  int64_t tiles() const { return channel_blocks * column_blocks; }
};

struct Tile {
  int64_t n, c0, channels, x0, x1;
  int64_t stride;  // of the buffers: channels in whole vectors
};

// Calls row(tile, y, whether it did y - 1 of the tile just before) for the units [begin, end).
template <class A, class Do>
FASTFUSE_INLINE void for_rows(const Tiling& tiling, int64_t all_channels, int64_t all_columns,
                              int64_t height, int64_t begin, int64_t end, Do row) {
  while (begin < end) {
    const int64_t line = begin / height, first = begin % height;
    const int64_t last = smaller(first + end - begin, height);
    const int64_t index = line % tiling.tiles();
    Tile tile;
    tile.n = line / tiling.tiles();
    tile.c0 = index / tiling.column_blocks * tiling.channels;
    tile.channels = smaller(tiling.channels, all_channels - tile.c0);
    tile.stride = Tiling::divided(tile.channels, kLanes<A>) * kLanes<A>;
    tile.x0 = smaller(index % tiling.column_blocks * tiling.columns, all_columns);
    tile.x1 = smaller(tile.x0 + tiling.columns, all_columns);
    for (int64_t y = first; y < last; ++y) row(tile, y, y > first);
    begin += last - first;
  }
}

template <int V>
struct Count {
  static constexpr int value = V;
};

// Calls part(Count<vectors>, first channel, load, store) over n channels, each of them once:
// outputs may be added to.
template <class A, bool Stream = false, class Part>
FASTFUSE_INLINE void for_channels(int64_t n, Part part) {
  constexpr int kVectors = 4;
  constexpr int64_t lanes = kLanes<A>;
  const auto whole_load = [](const auto* p) { return load(p); };
  const auto whole_store = [](auto* p, auto v) {
    if constexpr (Stream)
      stream(p, v);
    else
      store(p, v);
  };
  int64_t c = 0;
  for (; c + kVectors * lanes <= n; c += kVectors * lanes)
    part(Count<kVectors>{}, c, whole_load, whole_store);
  for (; c + lanes <= n; c += lanes) part(Count<1>{}, c, whole_load, whole_store);
  if (c < n)
    part(
        Count<1>{}, c, [m = n - c](const auto* p) { return load_partial(p, m); },
        [m = n - c](auto* p, auto v) { store_partial(p, v, m); });
}

// Hardware prefetchers stop at page ends, and a pixel of all taps is more than a page: the pixels
// of the next row that correspond to position `x` of `size`, into the second-level cache.
template <class S>
FASTFUSE_INLINE void prefetch_below(const S* row, int64_t stride, int64_t pixels, int64_t x,
                                    int64_t size, int64_t channels) {
  for (int64_t i = x * pixels / size; i < (x + 1) * pixels / size; ++i)
    for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(S)))
      __builtin_prefetch(row + i * stride + c, 0, 2);
}

// The same address, of which the compiler knows nothing: what is at constant distances from it is
// addressed so, and not by an index register for each.
template <class P>
FASTFUSE_INLINE P opaque(P p) {
  asm("" : "+r"(p));
  return p;
}

// The sum of a table's entries for one position, of the values at p + offset.
template <int V, class A, class S, class Load>
FASTFUSE_INLINE void add_entries(const TapTable& table, int64_t position, const S* p, Load load,
                                 Vec<A>* sum) {
  const A* weights = static_cast<const A*>(table.weight);
  for (int32_t e = table.begin[position]; e < table.begin[position + 1]; ++e) {
    const S* from = opaque(p + table.offset[e]);
    for (int v = 0; v < V; ++v) sum[v] += weights[e] * load(from + v * kLanes<A>);
  }
}

// A row of a ring and the weight with which it counts.
template <class A>
struct Term {
  const A* row;
  A weight;
};

// sum += the terms at `offset`.
template <int V, class A>
FASTFUSE_INLINE void add_terms(const Term<A>* begin, const Term<A>* end, int64_t offset,
                               Vec<A>* sum) {
  for (const Term<A>* term = begin; term != end; ++term) {
    const A* from = opaque(term->row + offset);
    for (int v = 0; v < V; ++v) sum[v] += term->weight * load(from + v * kLanes<A>);
  }
}

template <class A>
Tiling forward_tiling(const TapSum& op) {
  const int64_t rows = 2 * larger(op.num_levels, 1) * op.kernel_size;
  return Tiling(op.channels, op.out.width, rows * sizeof(A), kMinColumns);
}

template <class A>
int64_t forward_channels_last_units(const TapSum& op) {
  return op.batch * forward_tiling<A>(op).tiles() * op.out.height;
}

// Per level and ky two rows of the ring; the constants of a row; the terms.
template <class A>
int64_t forward_channels_last_scratch(const TapSum& op) {
  const Tiling tiling = forward_tiling<A>(op);
  const int64_t rows = 2 * op.num_levels * op.kernel_size;
  const int64_t pixels = rows * tiling.columns + op.kernel_size + 2;
  return pixels * (tiling.channels + kLanes<A>)*sizeof(A) + rows * sizeof(Term<A>);
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

// One row of a tile. The ring holds what row y - 1 left there if `continued`.
template <class S, bool Stream>
FASTFUSE_INLINE void sum_row(const TapSum& op, const Tile& tile, int64_t y, bool continued,
                             void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t k = op.kernel_size, length = (tile.x1 - tile.x0) * tile.stride;
  A* slot = static_cast<A*>(scratch);  // [level][ky][parity of the source row][x][stride]
  A* const constants = slot + 2 * op.num_levels * k * length;
  Term<A>* const terms = reinterpret_cast<Term<A>*>(constants + (k + 2) * tile.stride);
  Term<A>* end = terms;

  for (int64_t i = 0; i < op.num_levels; ++i) {
    const TapLevel& level = op.levels[i];
    const Image& taps = level.taps;
    const Sampling& axis = level.axis;
    const A* weights = static_cast<const A*>(axis.weight);
    const S* from = static_cast<const S*>(taps.data) + tile.n * taps.stride_n + tile.c0;
    const A scale = static_cast<A>(level.scale);
    for (int64_t ky = 0; ky < k; ++ky, slot += 2 * length) {
      const int64_t u = y + ky - op.padding;  // where the tap falls in the upsampled map
      if (u < 0 || u >= op.height) continue;
      const auto use = [&](int64_t source, A weight) {
        A* to = slot + (source & 1) * length;
        *end++ = {to, weight * scale};
        if (continued && u > 0 &&
            (source == axis.lower[u - 1] || (source == axis.upper[u - 1] && weights[u - 1] > 0)))
          return;  // made for row y - 1
        const S* row = from + source * taps.stride_h + ky * k * level.tap_stride;
        const bool more = source + 1 < taps.height;
        for (int64_t x = tile.x0; x < tile.x1; ++x, to += tile.stride) {
          for (int64_t kx = 0; more && kx < k; ++kx)
            prefetch_below(row + taps.stride_h + kx * level.tap_stride, taps.stride_w, taps.width,
                           x, op.out.width, tile.channels);
          for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
            constexpr int V = decltype(vectors)::value;
            Vec<A> sum[V] = {};
            add_entries<V, A>(level.terms, x, row + c, load, sum);
            for (int v = 0; v < V; ++v) store(to + c + v * lanes, sum[v]);
          });
        }
      };
      const A weight = axis.upper[u] > axis.lower[u] ? weights[u] : A(0);
      use(axis.lower[u], A(1) - weight);
      if (weight > 0) use(axis.upper[u], weight);
    }
  }

  S* out = static_cast<S*>(op.out.data) + tile.n * op.out.stride_n + y * op.out.stride_h +
           tile.x0 * op.out.stride_w + tile.c0;
  const RowConstants<A> start(op, tile, y, constants);
  const A base_scale = static_cast<A>(op.base_scale);
  int64_t offset = 0;
  for (int64_t x = tile.x0; x < tile.x1; ++x, offset += tile.stride, out += op.out.stride_w) {
    const A* constant = start.at(x);
    for_channels<A, Stream>(tile.channels, [&](auto vectors, int64_t c, auto load, auto store) {
      constexpr int V = decltype(vectors)::value;
      Vec<A> sum[V];
      for (int v = 0; v < V; ++v) sum[v] = fastfuse::load(constant + c + v * lanes);
      if (op.accumulate)
        for (int v = 0; v < V; ++v) sum[v] += base_scale * load(out + c + v * lanes);
      add_terms<V, A>(terms, end, offset + c, sum);
      for (int v = 0; v < V; ++v) store(out + c + v * lanes, sum[v]);
    });
  }
}

template <class S, bool Stream>
void forward_channels_last(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  for_rows<A>(forward_tiling<A>(op), op.channels, op.out.width, op.out.height, begin, end,
              [&](const Tile& tile, int64_t y, bool continued) {
                sum_row<S, Stream>(op, tile, y, continued, scratch);
              });
}

template <class A>
Tiling backward_tiling(const TapSum& op) {
  const TapLevel& level = op.levels[0];
  const int64_t min_columns = kMinColumns * level.taps.width / op.out.width;
  return Tiling(op.channels, level.taps.width, level.ring_rows * op.kernel_size * sizeof(A),
                larger(min_columns, 1));
}

template <class A>
int64_t backward_channels_last_units(const TapSum& op) {
  return op.batch * backward_tiling<A>(op).tiles() * op.levels[0].taps.height;
}

template <class A>
int64_t backward_channels_last_scratch(const TapSum& op) {
  const Tiling tiling = backward_tiling<A>(op);
  const int64_t rows = op.levels[0].ring_rows;
  const int64_t pixels = rows * op.kernel_size * tiling.columns;
  return pixels * (tiling.channels + kLanes<A>)*sizeof(A) + rows * sizeof(Term<A>);
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
  const AdjointSampling &along_y = level.adjoint_y, &along_x = level.adjoint_x;
  const int64_t k = op.kernel_size, length = k * (tile.x1 - tile.x0) * tile.stride;
  const S* from = static_cast<const S*>(out.data) + tile.n * out.stride_n + tile.c0;
  S* to = static_cast<S*>(taps.data) + tile.n * taps.stride_n + s * taps.stride_h + tile.c0;
  A* const ring = static_cast<A*>(scratch);  // [gradient's row % ring_rows][x][kx][stride]
  Term<A>* const terms = reinterpret_cast<Term<A>*>(ring + level.ring_rows * length);

  // The rows of the gradient that any tap of a source row reads.
  const auto rows_of = [&](int64_t source) {
    const int64_t first = along_y.first[source] + op.padding;
    return Range{larger(first - (k - 1), 0), smaller(first + along_y.count[source], out.height)};
  };
  const Range rows = rows_of(s);
  const int64_t made = continued ? rows_of(s - 1).end : 0;
  for (int64_t y = larger(rows.begin, made); y < rows.end; ++y) {
    const S* gradient = from + y * out.stride_h;
    A* column = ring + y % level.ring_rows * length;
    for (int64_t x = tile.x0; x < tile.x1; ++x) {
      const A* weights = static_cast<const A*>(along_x.weight) + along_x.offset[x];
      if (y + 1 < out.height)
        prefetch_below(gradient + out.stride_h, out.stride_w, out.width, x, taps.width,
                       tile.channels);
      for (int64_t kx = 0; kx < k; ++kx, column += tile.stride) {
        const Range xs = readers(along_x, x, kx, op.padding, out.width);
        const S* first = gradient + (along_x.first[x] + op.padding - kx) * out.stride_w;
        for_channels<A>(tile.channels, [&](auto vectors, int64_t c, auto load, auto) {
          constexpr int V = decltype(vectors)::value;
          Vec<A> sum[V] = {};
          const S* pixel = first + xs.begin * out.stride_w + c;
          for (int64_t i = xs.begin; i < xs.end; ++i, pixel += out.stride_w) {
            const S* from = opaque(pixel);
            for (int v = 0; v < V; ++v) sum[v] += weights[i] * load(from + v * lanes);
          }
          for (int v = 0; v < V; ++v) store(column + c + v * lanes, sum[v]);
        });
      }
    }
  }

  const A* weights = static_cast<const A*>(along_y.weight) + along_y.offset[s];
  const A scale = static_cast<A>(level.scale);
  for (int64_t ky = 0; ky < k; ++ky) {
    const Range ys = readers(along_y, s, ky, op.padding, out.height);
    Term<A>* end = terms;
    for (int64_t i = ys.begin; i < ys.end; ++i) {
      const int64_t y = along_y.first[s] + i - ky + op.padding;
      *end++ = {ring + y % level.ring_rows * length, weights[i] * scale};
    }
    int64_t offset = 0;
    for (int64_t x = tile.x0; x < tile.x1; ++x)
      for (int64_t kx = 0; kx < k; ++kx, offset += tile.stride) {
        S* tap = to + x * taps.stride_w + (ky * k + kx) * level.tap_stride;
        for_channels<A, Stream>(tile.channels, [&](auto vectors, int64_t c, auto, auto store) {
          constexpr int V = decltype(vectors)::value;
          Vec<A> sum[V] = {};
          add_terms<V, A>(terms, end, offset + c, sum);
          for (int v = 0; v < V; ++v) store(tap + c + v * lanes, sum[v]);
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
  for (int64_t i = 0; i < op.num_levels; ++i) source = larger(source, op.levels[i].taps.width);
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
          Vec<A> value[1] = {};
          add_entries<1, A>(level.terms, y, from + x, load, value);
          store(row + x, value[0]);
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
    const int64_t count = smaller(end - unit, lanes);
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

#define FASTFUSE_KERNEL(S, body)                                                \
  {choose_stores<S, body<S, false>, body<S, true>>, body##_units<compute_t<S>>, \
   body##_scratch<compute_t<S>>}
#define FASTFUSE_FOR_DTYPES(body)                                                                \
  {FASTFUSE_KERNEL(double, body), FASTFUSE_KERNEL(float, body), FASTFUSE_KERNEL(bfloat16, body), \
   FASTFUSE_KERNEL(float16, body)}

}  // namespace

extern const TapSumKernels tap_sum_kernels = {
    {FASTFUSE_FOR_DTYPES(forward_contiguous), FASTFUSE_FOR_DTYPES(forward_channels_last)},
    {FASTFUSE_FOR_DTYPES(backward_contiguous), FASTFUSE_FOR_DTYPES(backward_channels_last)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
