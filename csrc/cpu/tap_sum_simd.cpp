// Vector bodies of tap_sum, compiled once per instruction set (see isa_list.h).
//
// Every body is separable and goes along y first: forward sums a row of every tap column kx over
// ky and the two source rows it lies between, then shifts and widens these rows along x. Backward
// is the same in reverse. A row of the result depends on nothing but its inputs.
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
// A unit is a row in one block of channels. Blocks are done kVectors vectors at a time, what is
// left over one vector at a time, and then a part of one: outputs may be added to, once only.

constexpr int kVectors = 4;
template <class A>
constexpr int64_t kChannelBlock = kVectors * kLanes<A>;

template <class A>
int64_t channel_blocks(const TapSum& op) {
  return (op.channels + kChannelBlock<A> - 1) / kChannelBlock<A>;
}

struct Row {
  int64_t n, y, c0, c1;
};

template <class A>
FASTFUSE_INLINE Row locate(const TapSum& op, int64_t unit, int64_t height) {
  const int64_t line = unit / height, blocks = channel_blocks<A>(op);
  const int64_t c0 = line % blocks * kChannelBlock<A>;
  return {line / blocks, unit % height, c0, smaller(c0 + kChannelBlock<A>, op.channels)};
}

// Calls part(count of vectors as a type, channel, load, store) over a row's channels.
template <int V>
struct Count {
  static constexpr int value = V;
};

template <class A, bool Stream, class Part>
FASTFUSE_INLINE void for_channels(const Row& row, Part part) {
  constexpr int64_t lanes = kLanes<A>;
  const auto whole_load = [](const auto* p) { return load(p); };
  const auto whole_store = [](auto* p, auto v) {
    if constexpr (Stream)
      stream(p, v);
    else
      store(p, v);
  };
  if (row.c1 - row.c0 == kChannelBlock<A>)
    return part(Count<kVectors>{}, row.c0, whole_load, whole_store);
  int64_t c = row.c0;
  for (; c + lanes <= row.c1; c += lanes) part(Count<1>{}, c, whole_load, whole_store);
  if (const int64_t n = row.c1 - c; n > 0)
    part(
        Count<1>{}, c, [n](const auto* p) { return load_partial(p, n); },
        [n](auto* p, auto v) { store_partial(p, v, n); });
}

// The sum of a table's entries for one position, of values at p + offset * scale.
template <int V, class A, class S, class Load>
FASTFUSE_INLINE void add_entries(const TapTable& table, int64_t position, const S* p, int64_t step,
                                 Load load, Vec<A>* sum) {
  const A* weights = static_cast<const A*>(table.weight);
  for (int32_t e = table.begin[position]; e < table.begin[position + 1]; ++e) {
    const S* from = p + table.offset[e] * step;
    for (int v = 0; v < V; ++v) sum[v] += weights[e] * load(from + v * kLanes<A>);
  }
}

template <class A>
int64_t forward_channels_last_units(const TapSum& op) {
  return op.batch * channel_blocks<A>(op) * op.out.height;
}

template <class A>
int64_t forward_channels_last_scratch(const TapSum& op) {
  int64_t pixels = op.kernel_size;  // the offsets of a row
  for (int64_t i = 0; i < op.num_levels; ++i) pixels += op.kernel_size * op.levels[i].taps.width;
  return pixels * kChannelBlock<A>;
}

// What the offsets add to every pixel of a row: a sum over the taps that fall inside.
template <int V, class A, class Load>
struct RowOffsets {
  const TapSum& op;
  A* by_kx;  // [k][V * lanes], summed over ky
  Vec<A> everywhere[V] = {};

  FASTFUSE_INLINE RowOffsets(const TapSum& op, A* scratch, int64_t y, int64_t c, Load load)
      : op(op), by_kx(scratch) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t k = op.kernel_size;
    const A* offsets = static_cast<const A*>(op.offsets) + c;
    for (int64_t kx = 0; kx < k; ++kx) {
      Vec<A> sum[V] = {};
      for (int64_t ky = 0; ky < k; ++ky) {
        const Range rows = inside(ky, op.padding, op.height, op.out.height);
        if (y < rows.begin || y >= rows.end) continue;
        for (int v = 0; v < V; ++v)
          sum[v] += load(offsets + (ky * k + kx) * op.channels + v * lanes);
      }
      for (int v = 0; v < V; ++v) {
        store(by_kx + (kx * V + v) * lanes, sum[v]);
        everywhere[v] += sum[v];
      }
    }
  }

  FASTFUSE_INLINE void add(int64_t x, Vec<A>* sum) const {
    const int64_t first = x - op.padding;  // where tap 0 falls
    if (first >= 0 && first + op.kernel_size <= op.width) {
      for (int v = 0; v < V; ++v) sum[v] += everywhere[v];
      return;
    }
    for (int64_t kx = 0; kx < op.kernel_size; ++kx)
      if (first + kx >= 0 && first + kx < op.width)
        for (int v = 0; v < V; ++v) sum[v] += fastfuse::load(by_kx + (kx * V + v) * kLanes<A>);
  }
};

template <int V, bool Offsets, class S, class Load, class Store>
FASTFUSE_INLINE void sum_row(const TapSum& op, const Row& row, int64_t c, compute_t<S>* scratch,
                             Load load, Store store) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>, step = V * lanes;
  const int64_t k = op.kernel_size;
  A* columns = scratch + k * step;  // per level [k][w][step]

  A* to = columns;
  for (int64_t i = 0; i < op.num_levels; ++i) {
    const TapLevel& level = op.levels[i];
    const Image& taps = level.taps;
    const S* from = static_cast<const S*>(taps.data) + row.n * taps.stride_n + c * taps.stride_c;
    for (int64_t x = 0; x < taps.width; ++x)
      for (int64_t kx = 0; kx < k; ++kx) {
        Vec<A> sum[V] = {};
        add_entries<V, A>(level.y, row.y, from + x * taps.stride_w + kx * level.tap_stride, 1, load,
                          sum);
        for (int v = 0; v < V; ++v)
          fastfuse::store(to + (kx * taps.width + x) * step + v * lanes, sum[v]);
      }
    to += k * taps.width * step;
  }

  S* out = static_cast<S*>(op.out.data) + row.n * op.out.stride_n + row.y * op.out.stride_h + c;
  Vec<A> constant[V] = {};
  if (op.bias)
    for (int v = 0; v < V; ++v) constant[v] = load(static_cast<const A*>(op.bias) + c + v * lanes);
  struct Nothing {
    FASTFUSE_INLINE void add(int64_t, Vec<A>*) const {}
  };
  const auto offsets = [&] {
    if constexpr (Offsets)
      return RowOffsets<V, A, Load>(op, scratch, row.y, c, load);
    else
      return Nothing{};
  }();
  const A base_scale = static_cast<A>(op.base_scale);
  const auto whole_load = [](const A* p) { return fastfuse::load(p); };
  for (int64_t x = 0; x < op.out.width; ++x, out += op.out.stride_w) {
    Vec<A> sum[V];
    for (int v = 0; v < V; ++v) sum[v] = constant[v];
    if (op.accumulate)
      for (int v = 0; v < V; ++v) sum[v] += base_scale * load(out + v * lanes);
    offsets.add(x, sum);
    const A* column = columns;
    for (int64_t i = 0; i < op.num_levels; ++i) {
      add_entries<V, A>(op.levels[i].x, x, column, step, whole_load, sum);
      column += k * op.levels[i].taps.width * step;
    }
    for (int v = 0; v < V; ++v) store(out + v * lanes, sum[v]);
  }
}

template <class S, bool Stream>
void forward_channels_last(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Row row = locate<A>(op, unit, op.out.height);
    for_channels<A, Stream>(row, [&](auto vectors, int64_t c, auto load, auto store) {
      constexpr int V = decltype(vectors)::value;
      A* memory = static_cast<A*>(scratch);
      if (op.offsets)
        sum_row<V, true, S>(op, row, c, memory, load, store);
      else
        sum_row<V, false, S>(op, row, c, memory, load, store);
    });
  }
}

template <class A>
int64_t backward_channels_last_units(const TapSum& op) {
  return op.batch * channel_blocks<A>(op) * op.levels[0].taps.height;
}

template <class A>
int64_t backward_channels_last_scratch(const TapSum& op) {
  return op.out.width * kChannelBlock<A>;
}

template <int V, class S, class Load, class Store>
FASTFUSE_INLINE void gather_row(const TapSum& op, const Row& row, int64_t c, compute_t<S>* rows,
                                Load load, Store store) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>, step = V * lanes;
  const Image &out = op.out, &taps = op.levels[0].taps;
  const AdjointSampling &along_y = op.levels[0].adjoint_y, &along_x = op.levels[0].adjoint_x;
  const A* y_weights = static_cast<const A*>(along_y.weight) + along_y.offset[row.y];
  const A scale = static_cast<A>(op.levels[0].scale);
  const S* from = static_cast<const S*>(out.data) + row.n * out.stride_n + c;
  S* to = static_cast<S*>(taps.data) + row.n * taps.stride_n + row.y * taps.stride_h + c;

  for (int64_t ky = 0; ky < op.kernel_size; ++ky) {
    const Range ys = readers(along_y, row.y, ky, op.padding, out.height);
    const int64_t y = along_y.first[row.y] - ky + op.padding;
    for (int64_t x = 0; x < out.width; ++x) {
      Vec<A> sum[V] = {};
      const S* pixel = from + (y + ys.begin) * out.stride_h + x * out.stride_w;
      for (int64_t i = ys.begin; i < ys.end; ++i, pixel += out.stride_h)
        for (int v = 0; v < V; ++v) sum[v] += y_weights[i] * load(pixel + v * lanes);
      for (int v = 0; v < V; ++v) fastfuse::store(rows + x * step + v * lanes, sum[v] * scale);
    }
    for (int64_t s = 0; s < taps.width; ++s) {
      const A* x_weights = static_cast<const A*>(along_x.weight) + along_x.offset[s];
      for (int64_t kx = 0; kx < op.kernel_size; ++kx) {
        const Range xs = readers(along_x, s, kx, op.padding, out.width);
        const A* column = rows + (along_x.first[s] - kx + op.padding + xs.begin) * step;
        Vec<A> sum[V] = {};
        for (int64_t i = xs.begin; i < xs.end; ++i, column += step)
          for (int v = 0; v < V; ++v) sum[v] += x_weights[i] * fastfuse::load(column + v * lanes);
        S* tap = to + s * taps.stride_w + (ky * op.kernel_size + kx) * op.levels[0].tap_stride;
        for (int v = 0; v < V; ++v) store(tap + v * lanes, sum[v]);
      }
    }
  }
}

template <class S, bool Stream>
void backward_channels_last(const TapSum& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Row row = locate<A>(op, unit, op.levels[0].taps.height);
    for_channels<A, Stream>(row, [&](auto vectors, int64_t c, auto load, auto store) {
      gather_row<decltype(vectors)::value, S>(op, row, c, static_cast<A*>(scratch), load, store);
    });
  }
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
  return padded(op.out.width) + padded(op.width) + padded(source);
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
          add_entries<1, A>(level.y, y, from + x, 1, load, value);
          store(row + x, value[0]);
        });
        if (!same_width) widen_row(narrow, level.x_axis, wide);
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
  return (padded(op.out.width) + padded(op.levels[0].taps.width)) * kLanes<A>;
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
