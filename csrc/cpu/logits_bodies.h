// Upsampled logits, a pixel's classes at a time, in registers.
//
// Source rows become matrices (column, class) of the compute type, with classes along lanes,
// padded to whole vectors by values that never win and whose exponentials vanish. A target row is
// two of them interpolated along y; its pixels are interpolated along x where they are used. Pixels
// between the same two columns are processed together, for they share their loads.
//
// Rows with values that are not finite, or so large that padding could win, are "wild": bodies walk
// them value by value.
#pragma once

#include "cpu/exp.h"
#include "cpu/integers.h"
#include "cpu/interpolate.h"
#include "cpu/logits.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

template <class A>
constexpr A kNever = A(-1e36);  // padding
template <class A>
constexpr A kWild = A(1e30);

template <class A>
FASTFUSE_INLINE int64_t padded_classes(int64_t classes) {
  return round_up(classes, kLanes<A>);
}

// Of a source row.
template <class A>
int64_t row_size(const Logits& logits) {
  return logits.image.width * padded_classes<A>(logits.classes);
}

// v[0] op v[1] op ..., by halves.
template <class A, int Step = kLanes<A> / 2, class V, class Op>
FASTFUSE_INLINE V folded(V v, Op op) {
  if constexpr (Step == 0) {
    return v;
  } else {
    IndexVec<A> other;
    for (int i = 0; i < kLanes<A>; ++i) other[i] = i ^ Step;
#if defined(__clang__)
    V swapped;
    for (int i = 0; i < kLanes<A>; ++i) swapped[i] = v[i ^ Step];
#else
    const V swapped = __builtin_shuffle(v, other);
#endif
    return folded<A, Step / 2>(op(v, swapped), op);
  }
}

template <class A>
FASTFUSE_INLINE Vec<A> max_of(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// Less each column's largest value, if that is finite. Softmax is what it was: what comes off a
// target pixel's classes is one number, between those of two columns. Large logits keep their
// digits.
template <class A>
void shift_row(const Logits& logits, A* row) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t classes = logits.classes, whole = classes / lanes * lanes;
  for (int64_t x = 0; x < logits.image.width; ++x, row += padded_classes<A>(classes)) {
    A top = row[0];
    if (whole > 0) {
      Vec<A> tops = load(row);
      for (int64_t c = lanes; c < whole; c += lanes) tops = max_of<A>(load(row + c), tops);
      top = folded<A>(tops, max_of<A>)[0];
    }
    for (int64_t c = whole; c < classes; ++c) top = row[c] > top ? row[c] : top;
    if (!(top - top == 0)) continue;
    for (int64_t c = 0; c < whole; c += lanes) store(row + c, load(row + c) - top);
    for (int64_t c = whole; c < classes; ++c) row[c] -= top;
  }
}

// A source row of an image as (column, class), `classes` padded; whether all of it is tame.
template <class S>
bool load_row(const Logits& logits, int64_t n, int64_t y, compute_t<S>* row) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const Image& image = logits.image;
  const int64_t classes = logits.classes, stride = padded_classes<A>(classes);
  const S* from = static_cast<const S*>(image.data) + n * image.stride_n + y * image.stride_h;
  const int64_t whole = classes / lanes * lanes;
  IndexVec<A> tame = IndexVec<A>{} - 1;
  const auto keep = [&](A* to, Vec<A> v) __attribute__((always_inline)) {
    tame &= (v <= kWild<A>)&(v >= -kWild<A>);
    store(to, v);
  };
  if (logits.channels_last) {
    for (int64_t x = 0; x < image.width; ++x) {
      const S* pixel = from + x * image.stride_w;
      A* to = row + x * stride;
      for (int64_t c = 0; c < whole; c += lanes) keep(to + c, load(pixel + c));
      if (whole < classes) {
        Vec<A> last = load_partial(pixel + whole, classes - whole);
        for (int64_t i = classes - whole; i < lanes; ++i) last[i] = 0;
        keep(to + whole, last);
        for (int64_t i = classes - whole; i < lanes; ++i) to[whole + i] = kNever<A>;
      }
    }
  } else {
    for (int64_t c = 0; c < stride; c += lanes) {
      const int64_t count = classes - c < lanes ? classes - c : lanes;
      int64_t x = 0;
      for (; x + lanes <= image.width; x += lanes) {
        Vec<A> tile[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          tile[i] = splat(kNever<A>);
          if (i < count) {
            tile[i] = load(from + (c + i) * image.stride_c + x);
            tame &= (tile[i] <= kWild<A>)&(tile[i] >= -kWild<A>);
          }
        }
        transpose<A>(tile);
        for (int64_t i = 0; i < lanes; ++i) store(row + (x + i) * stride + c, tile[i]);
      }
      for (; x < image.width; ++x)
        for (int64_t i = 0; i < lanes; ++i) {
          A value = kNever<A>;
          if (i < count) {
            value = load_partial(from + (c + i) * image.stride_c + x, 1)[0];
            tame[0] &= value <= kWild<A> && value >= -kWild<A> ? -1 : 0;
          }
          row[x * stride + c + i] = value;
        }
    }
  }
  for (int64_t i = 0; i < lanes; ++i)
    if (!tame[i]) return false;
  return true;
}

// Target rows, in any order; consecutive ones share their source rows. `Shifted`: see shift_row.
template <class S, bool Shifted>
class TargetRows {
  using A = compute_t<S>;

 public:
  static int64_t scratch(const Logits& logits) { return 3 * row_size<A>(logits); }

  TargetRows(const Logits& logits, A* scratch)
      : logits_(logits), size_(row_size<A>(logits)), row_(scratch) {
    a_.row = scratch + size_;
    b_.row = a_.row + size_;
  }

  // (source column, class) of the target row y.
  const A* at(int64_t n, int64_t y) {
    const int64_t lower = n * logits_.y.in + logits_.y.lower[y];
    const int64_t upper = n * logits_.y.in + logits_.y.upper[y];
    if (a_.at != lower && b_.at == lower) {
      const Source held = a_;
      a_ = b_, b_ = held;
    }
    read(lower, a_);
    tame = a_.tame;
    if (logits_.y.identity()) return a_.row;
    if (lower != upper) {
      read(upper, b_);
      tame = a_.tame && b_.tame;
    }
    const A* const a = a_.row;
    const A* const b = lower == upper ? a : b_.row;
    const Vec<A> weight = splat(static_cast<const A*>(logits_.y.weight)[y]);
    for (int64_t i = 0; i < size_; i += kLanes<A>)
      store(row_ + i, interpolate<A>(load(a + i), load(b + i), weight));
    return row_;
  }

  bool tame = true;  // of the row that `at` gave

 private:
  struct Source {
    A* row;
    int64_t at = -1;  // among the rows of all images
    bool tame = true;
  };
  void read(int64_t at, Source& source) const {
    if (source.at == at) return;
    source.at = at;
    source.tame = load_row<S>(logits_, at / logits_.y.in, at % logits_.y.in, source.row);
    if constexpr (Shifted) shift_row(logits_, source.row);
  }

  const Logits& logits_;
  int64_t size_;
  A* row_;
  Source a_, b_;
};

// The columns between which a target pixel lies, and their weights. Where widths agree it is one.
template <class A>
struct Between {
  const A *a, *b;
  A weight;  // of b
  bool is_column;
  FASTFUSE_INLINE A operator[](int64_t c) const {
    return is_column ? a[c] : (A(1) - weight) * a[c] + weight * b[c];
  }
};

template <class A>
FASTFUSE_INLINE Between<A> between(const Logits& logits, const A* row, int64_t x) {
  const int64_t stride = padded_classes<A>(logits.classes);
  return {row + logits.x.lower[x] * stride, row + logits.x.upper[x] * stride,
          static_cast<const A*>(logits.x.weight)[x], logits.x.identity()};
}

// The end of the target pixels from x on that lie between the same two columns, at most `most`.
FASTFUSE_INLINE int64_t run_end(const Sampling& x, int64_t begin, int64_t most) {
  int64_t end = begin + 1;
  while (end < x.out && end - begin < most && x.lower[end] == x.lower[begin] &&
         x.upper[end] == x.upper[begin])
    ++end;
  return end;
}

// step(Count<Pixels>{}, x) over a target row, for Pixels pixels between the same two columns.
template <class Step>
FASTFUSE_INLINE void for_each_run(const Sampling& x, Step step) {
  for (int64_t begin = 0; begin < x.out;) {
    const int64_t end = run_end(x, begin, 4);
    for (; end - begin >= 4; begin += 4) step(Count<4>{}, begin);
    for (; end - begin >= 2; begin += 2) step(Count<2>{}, begin);
    for (; begin < end; ++begin) step(Count<1>{}, begin);
  }
}

// The classes of a few pixels between the same two columns, vector by vector.
template <class A, int Pixels>
struct PixelsBetween {
  const A *a, *b;
  Vec<A> weight_of_a[Pixels], weight_of_b[Pixels];

  FASTFUSE_INLINE PixelsBetween(const Logits& logits, const A* row, int64_t x) {
    const Between<A> first = between(logits, row, x);
    a = first.a, b = first.b;
    FASTFUSE_UNROLL
    for (int p = 0; p < Pixels; ++p) {
      weight_of_b[p] = splat(static_cast<const A*>(logits.x.weight)[x + p]);
      weight_of_a[p] = A(1) - weight_of_b[p];
    }
  }
  // step(p, v) for each pixel, of the classes from c on.
  template <class Step>
  FASTFUSE_INLINE void at(int64_t c, Step step) const {
    const Vec<A> left = load(a + c), right = load(b + c);
    FASTFUSE_UNROLL
    for (int p = 0; p < Pixels; ++p) step(p, weight_of_a[p] * left + weight_of_b[p] * right);
  }
};

}  // namespace
}  // namespace fastfuse
