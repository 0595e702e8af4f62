// The contiguous bodies of tap_sum: along y first, then along x.
#pragma once

#include "cpu/interpolate.h"
#include "cpu/tap_sum_terms.h"

namespace fastfuse {
namespace {

// ---- forward: a unit is a row of the output --------------------------------------------------

template <class A>
int64_t forward_contiguous_units(const TapSumForward& op) {
  return op.batch * op.channels * op.out.height;
}

// Three rows: the sum, what is added to it, and that before it is widened.
template <class A>
int64_t forward_contiguous_scratch(const TapSumForward& op) {
  int64_t source = 0;
  for (int64_t i = 0; i < op.num_levels; ++i)
    source = max_of(source, op.levels[i].taps.image.width);
  return (padded(op.out.width) + padded(op.width) + padded(source)) * sizeof(A);
}

struct OutputRow {
  int64_t n, c, y;

  OutputRow(const TapSumForward& op, int64_t unit)
      : n(unit / op.out.height / op.channels),
        c(unit / op.out.height % op.channels),
        y(unit % op.out.height) {}
};

// sum = what stands in the output, the bias and the offsets of the taps that fall inside.
template <class S, class A>
FASTFUSE_INLINE void start_row(const TapSumForward& op, const OutputRow& at, const S* out, A* sum) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t k = op.kernel_size;
  const A bias = op.bias ? static_cast<const A*>(op.bias)[at.c] : A(0);
  for (int64_t x = 0; x < padded(op.out.width); x += lanes) store(sum + x, splat(bias));
  if (op.accumulate) {
    const A base_scale = static_cast<A>(op.base_scale);
    for_each_vector<A>(op.out.width, [&](int64_t x, auto load, auto) {
      store(sum + x, load(out + x) * base_scale + bias);
    });
  }
  if (!op.offsets) return;
  for (int64_t kx = 0; kx < k; ++kx) {
    const Range xs = inside(kx, op.padding, op.width, op.out.width);
    A value = 0;
    for (int64_t ky = 0; ky < k; ++ky)
      if (inside(ky, op.padding, op.height, op.out.height).contains(at.y))
        value += static_cast<const A*>(op.offsets)[(ky * k + kx) * op.channels + at.c];
    for (int64_t x = xs.begin; x < xs.end; ++x) sum[x] += value;
  }
}

// sum += a level's taps: for each kx, its ky taps summed to a row of the source's width (narrow),
// which is upsampled (wide) and shifted.
template <class S, class A>
FASTFUSE_INLINE void add_level(const TapSumForward& op, const TapSumLevel& level,
                               const OutputRow& at, A* sum, A* wide, A* narrow) {
  constexpr int64_t lanes = kLanes<A>;
  const Image& taps = level.taps.image;
  const bool same_width = taps.width == op.width;
  for (int64_t kx = 0; kx < op.kernel_size; ++kx) {
    const Range xs = inside(kx, op.padding, op.width, op.out.width);
    if (xs.begin >= xs.end) continue;
    const S* from = static_cast<const S*>(taps.data) + at.n * taps.stride_n + at.c * taps.stride_c +
                    kx * level.taps.stride;
    A* row = same_width ? wide : narrow;
    for_each_vector<A>(taps.width, [&](int64_t x, auto load, auto store) {
      Vec<A> value[1][1] = {};
      add_entries<1, A>(level.first, at.y, from + x, load, value);
      store(row + x, value[0][0]);
    });
    if (!same_width) widen_row(narrow, level.second, wide);
    // Whole vectors are added: after the row's end zeros, to what is not read.
    for (int64_t x = 0; x < 2 * lanes; ++x) wide[op.width + x] = 0;
    const A* shifted = wide + xs.begin + kx - op.padding;
    for (int64_t x = 0; x < xs.end - xs.begin; x += lanes)
      store(sum + xs.begin + x, load(sum + xs.begin + x) + load(shifted + x));
  }
}

template <class S, bool Stream>
void forward_contiguous(const TapSumForward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  A* sum = static_cast<A*>(scratch);
  A* wide = sum + padded(op.out.width);
  A* narrow = wide + padded(op.width);

  for (int64_t unit = begin; unit < end; ++unit) {
    const OutputRow at(op, unit);
    S* out = static_cast<S*>(op.out.data) + at.n * op.out.stride_n + at.c * op.out.stride_c +
             at.y * op.out.stride_h;
    start_row(op, at, out, sum);
    for (int64_t i = 0; i < op.num_levels; ++i)
      add_level<S>(op, op.levels[i], at, sum, wide, narrow);
    for_each_vector<A, Stream>(op.out.width,
                               [&](int64_t x, auto, auto store) { store(out + x, load(sum + x)); });
  }
}

// ---- backward: a unit is a row of the taps for one ky, all kx --------------------------------
// Rows are reduced kLanes at a time and transposed, so that the reduction along x runs over lanes.

template <class A>
int64_t backward_contiguous_units(const TapSumBackward& op) {
  return op.batch * op.channels * op.taps.image.height * op.kernel_size;
}

template <class A>
int64_t backward_contiguous_scratch(const TapSumBackward& op) {
  return (padded(op.out.width) + padded(op.taps.image.width)) * sizeof(Vec<A>);
}

// Of the targets that read source position `s`, those that a tap brings into the output: they are
// first + i - tap + padding for begin <= i < end.
FASTFUSE_INLINE Range readers(const AdjointSampling& axis, int64_t s, int64_t tap, int64_t padding,
                              int64_t out_size) {
  const int64_t shift = tap - padding - axis.first[s];
  return {max_of(shift, 0), min_of(out_size + shift, axis.count[s])};
}

// A row of the taps, the first row of the gradient that it reads, and the weights of all of them.
template <class S>
struct TapRow {
  const S* from;
  S* to;
  const compute_t<S>* weights;
  int64_t count;

  TapRow() = default;
  TapRow(const TapSumBackward& op, int64_t unit) {
    const Image &out = op.out, &taps = op.taps.image;
    const int64_t k = op.kernel_size, ky = unit % k, s = unit / k % taps.height;
    const int64_t plane = unit / k / taps.height, n = plane / op.channels, c = plane % op.channels;
    const Range ys = readers(op.y, s, ky, op.padding, out.height);
    const int64_t y = op.y.first[s] - ky + op.padding + ys.begin;
    from = static_cast<const S*>(out.data) + n * out.stride_n + c * out.stride_c + y * out.stride_h;
    to = static_cast<S*>(taps.data) + n * taps.stride_n + c * taps.stride_c + s * taps.stride_h +
         ky * k * op.taps.stride;
    weights = static_cast<const compute_t<S>*>(op.y.weight) + op.y.offset[s] + ys.begin;
    count = ys.end - ys.begin;
  }
};

// tall[x][row] = the rows of the gradient that each row of taps reads, summed along y.
template <class S, class A>
FASTFUSE_INLINE void reduce_rows(const TapSumBackward& op, const TapRow<S>* rows, Vec<A>* tall) {
  constexpr int64_t lanes = kLanes<A>;
  const A scale = static_cast<A>(op.taps.scale);
  for_each_vector<A>(op.out.width, [&](int64_t x, auto load, auto) {
    Vec<A> square[lanes];
    for (int64_t r = 0; r < lanes; ++r) {
      Vec<A> sum{};
      const S* pixels = rows[r].from + x;
      for (int64_t i = 0; i < rows[r].count; ++i, pixels += op.out.stride_h)
        sum += rows[r].weights[i] * load(pixels);
      square[r] = sum * scale;
    }
    transpose<A>(square);
    for (int64_t r = 0; r < lanes; ++r) tall[x + r] = square[r];
  });
}

// reduced[source][row] = what a tap's source columns read of these, summed along x.
template <class A>
FASTFUSE_INLINE void reduce_columns(const TapSumBackward& op, int64_t kx, const Vec<A>* tall,
                                    Vec<A>* reduced) {
  for (int64_t s = 0; s < op.taps.image.width; ++s) {
    const A* weights = static_cast<const A*>(op.x.weight) + op.x.offset[s];
    const Range xs = readers(op.x, s, kx, op.padding, op.out.width);
    const Vec<A>* column = tall + op.x.first[s] - kx + op.padding;
    Vec<A> sum{};
    for (int64_t i = xs.begin; i < xs.end; ++i) sum += weights[i] * column[i];
    reduced[s] = sum;
  }
}

template <class S, bool Stream>
void backward_contiguous(const TapSumBackward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  Vec<A>* tall = static_cast<Vec<A>*>(scratch);
  Vec<A>* reduced = tall + padded(op.out.width);

  for (int64_t unit = begin; unit < end; unit += lanes) {
    const int64_t count = min_of(end - unit, lanes);
    TapRow<S> rows[lanes];  // those after the last are the first again
    for (int64_t r = 0; r < lanes; ++r) rows[r] = TapRow<S>(op, unit + (r < count ? r : 0));
    reduce_rows<S, A>(op, rows, tall);
    for (int64_t kx = 0; kx < op.kernel_size; ++kx) {
      reduce_columns<A>(op, kx, tall, reduced);
      for_each_vector<A, Stream>(op.taps.image.width, [&](int64_t s, auto, auto store) {
        Vec<A> square[lanes];
        for (int64_t r = 0; r < lanes; ++r) square[r] = reduced[s + r];
        transpose<A>(square);
        for (int64_t r = 0; r < count; ++r) store(rows[r].to + kx * op.taps.stride + s, square[r]);
      });
    }
  }
}

}  // namespace
}  // namespace fastfuse
