// Vector bodies of upsample_cross_entropy, compiled once per instruction set (see isa_list.h).
//
// Each column's largest logit comes off before, so that a pixel's exponentials need no pass of
// their own for the largest value. Backward computes values and probabilities again and gathers: a
// target row's gradient goes to its source columns, and from there to its two source rows, which
// are stored when the last row that reads them is done. A source row's sum has one order, whoever
// computes it.

#include "cpu/logits_bodies.h"
#include "cpu/upsample_cross_entropy.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

template <class S>
using Rows = TargetRows<S, true>;

// The weights of classes, padded by zeros.
template <class A>
class Weights {
 public:
  Weights(const CrossEntropy& work, A* padded)
      : given_(static_cast<const A*>(work.weight)), padded_(padded) {
    const int64_t classes = work.logits.classes;
    for (int64_t c = 0; c < padded_classes<A>(classes); ++c)
      padded[c] = c >= classes ? A(0) : given_ ? given_[c] : A(1);
  }
  A of(int64_t c) const { return given_ ? given_[c] : A(1); }
  const A* padded() const { return padded_; }

 private:
  const A *given_, *padded_;
};

template <class A>
A logsumexp_of_one(Between<A> pixel, int64_t classes) {
  A top = pixel[0];
  for (int64_t c = 1; c < classes; ++c) {
    const A v = pixel[c];
    if (v > top || v != v) top = v;
  }
  A sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += exp_of(pixel[c] - top);
  return top + log_of(sum);
}

// A smaller sum has lost digits: the largest value was far below 0.
template <class A>
constexpr A kLeastSum = A(0x1p-20);

// Sums of exponentials, of tame rows: shifted values are at most 0, and the largest ones near it.
template <class A, int Pixels>
FASTFUSE_INLINE void exponential_sums(const Logits& logits, const A* row, int64_t x, A* sums) {
  const int64_t stride = padded_classes<A>(logits.classes);
  const PixelsBetween<A, Pixels> pixels(logits, row, x);
  Vec<A> sum[Pixels] = {};
  for (int64_t c = 0; c < stride; c += kLanes<A>)
    pixels.at(
        c, [&](int p, Vec<A> v) __attribute__((always_inline)) { sum[p] += exp_of_negative(v); });
  FASTFUSE_UNROLL
  for (int p = 0; p < Pixels; ++p) sums[p] = sum_of_lanes<A>(sum[p]);
}

template <class A>
A dot(const A* row, const A* weights, int64_t padded) {
  Vec<A> sum{};
  for (int64_t c = 0; c < padded; c += kLanes<A>) sum += load(row + c) * load(weights + c);
  return sum_of_lanes<A>(sum);
}

bool counts(const CrossEntropy& work, int64_t target) {
  return target != work.ignore_index && target >= 0 && target < work.logits.classes;
}

template <class S>
int64_t forward_scratch(const Logits& logits) {
  using A = compute_t<S>;
  return Rows<S>::scratch(logits) + padded_classes<A>(logits.classes) + logits.image.width +
         logits.x.out;
}

template <class S>
int64_t forward(const CrossEntropyForward& work, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const Logits& logits = work.logits;
  const int64_t padded = padded_classes<A>(logits.classes), width = logits.x.out;
  A* free = static_cast<A*>(scratch);
  Rows<S> rows(logits, free);
  free += Rows<S>::scratch(logits);
  const Weights<A> weights(work, free);
  A* const dots = free + padded;  // of source columns: sum_c w[c] v[c], which is linear too
  A* const sums = dots + logits.image.width;
  const A smoothing = static_cast<A>(work.smoothing);
  const A smooth = smoothing / static_cast<A>(logits.classes);
  const A total = static_cast<A>(work.total_weight);
  int64_t wrong = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const A* row = rows.at(unit / logits.y.out, unit % logits.y.out);
    const int64_t* target = work.target + unit * width;
    A* loss = static_cast<A*>(work.loss) + unit * width;
    A* logsumexp = static_cast<A*>(work.logsumexp) + unit * width;
    const bool tame = rows.tame;
    for_each_run(logits.x, [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int pixels = decltype(count)::value;
      bool any = false;
      for (int p = 0; p < pixels; ++p) any |= counts(work, target[x + p]);
      if (any && tame)
        exponential_sums<A, pixels>(logits, row, x, sums + x);
      else
        for (int p = 0; p < pixels; ++p) sums[x + p] = tame ? 1 : 0;
    });
    for_each_vector<A>(width, [&](int64_t x, auto load, auto store) {
      store(logsumexp + x, log_of_positive(load(sums + x)));
    });
    if (smoothing > 0)
      for (int64_t s = 0; s < logits.image.width; ++s)
        dots[s] = dot(row + s * padded, weights.padded(), padded);
    for (int64_t x = 0; x < width; ++x) {
      const int64_t t = target[x];
      if (!counts(work, t)) {
        if (t != work.ignore_index && wrong < 0) wrong = unit * width + x;
        loss[x] = logsumexp[x] = 0;
        continue;
      }
      if (!(sums[x] >= kLeastSum<A>))
        logsumexp[x] = logsumexp_of_one(between(logits, row, x), logits.classes);
      const Between<A> pixel = between(logits, row, x);
      A value = (A(1) - smoothing) * weights.of(t) * (logsumexp[x] - pixel[t]);
      if (smoothing > 0) {
        const A dotted = (A(1) - pixel.weight) * dots[logits.x.lower[x]] +
                         pixel.weight * dots[logits.x.upper[x]];
        value += smooth * (total * logsumexp[x] - dotted);
      }
      loss[x] = value;
    }
  }
  return wrong;
}

// ---- backward -----------------------------------------------------------------------------------

// A row (column, class) of the compute type to a row of an image, rounded.
template <class S>
void store_row(const CrossEntropyBackward& work, int64_t n, int64_t y, const compute_t<S>* row) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const Image& image = work.gradient;
  const int64_t classes = work.logits.classes, stride = padded_classes<A>(classes);
  S* to = static_cast<S*>(image.data) + n * image.stride_n + y * image.stride_h;
  if (work.channels_last) {
    for (int64_t x = 0; x < image.width; ++x)
      for (int64_t c = 0; c < classes; c += lanes) {
        const Vec<A> v = load(row + x * stride + c);
        if (c + lanes <= classes)
          store(to + x * image.stride_w + c, v);
        else
          store_partial(to + x * image.stride_w + c, v, classes - c);
      }
    return;
  }
  for (int64_t c = 0; c < classes; c += lanes) {
    const int64_t count = classes - c < lanes ? classes - c : lanes;
    for (int64_t x = 0; x < image.width; x += lanes) {
      const int64_t columns = image.width - x < lanes ? image.width - x : lanes;
      Vec<A> tile[lanes] = {};
      for (int64_t i = 0; i < columns; ++i) tile[i] = load(row + (x + i) * stride + c);
      transpose<A>(tile);
      for (int64_t i = 0; i < count; ++i) {
        S* line = to + (c + i) * image.stride_c + x;
        if (columns == lanes)
          store(line, tile[i]);
        else
          store_partial(line, tile[i], columns);
      }
    }
  }
}

// What of a pixel's gradient is one number: of probabilities, of the weights, of the target.
template <class A>
struct Factors {
  A probability, weight, target;
};

template <class A>
FASTFUSE_INLINE Factors<A> factors(const CrossEntropyBackward& work, const Weights<A>& weights,
                                   int64_t target, A grad) {
  if (!counts(work, target)) return {0, 0, 0};
  const A smoothing = static_cast<A>(work.smoothing);
  const A smooth = smoothing / static_cast<A>(work.logits.classes);
  const A kept = (A(1) - smoothing) * weights.of(target);
  return {grad * (kept + smooth * static_cast<A>(work.total_weight)), grad * smooth, grad * kept};
}

template <class A, int Pixels, bool Smooth>
FASTFUSE_INLINE void gather(const Logits& logits, const A* row, int64_t x, const A* logsumexp,
                            const Factors<A>* of, const A* weights, A* gradient) {
  const int64_t stride = padded_classes<A>(logits.classes);
  const PixelsBetween<A, Pixels> pixels(logits, row, x);
  A* const to_a = gradient + logits.x.lower[x] * stride;
  A* const to_b = gradient + logits.x.upper[x] * stride;
  for (int64_t c = 0; c < stride; c += kLanes<A>) {
    Vec<A> of_a{}, of_b{};
    pixels.at(c, [&](int p, Vec<A> v) __attribute__((always_inline)) {
      Vec<A> d = of[p].probability * exp_of_negative(v - logsumexp[p]);
      if constexpr (Smooth) d -= of[p].weight * load(weights + c);
      of_a += pixels.weight_of_a[p] * d;
      of_b += pixels.weight_of_b[p] * d;
    });
    store(to_a + c, load(to_a + c) + of_a);
    if (!logits.x.identity()) store(to_b + c, load(to_b + c) + of_b);  // which may be the same
  }
}

template <class S>
class SourceRows {
  using A = compute_t<S>;

 public:
  static int64_t scratch(const Logits& logits) {
    return Rows<S>::scratch(logits) + 3 * row_size<A>(logits) + padded_classes<A>(logits.classes);
  }

  SourceRows(const CrossEntropyBackward& work, A* scratch)
      : work_(work),
        logits_(work.logits),
        size_(row_size<A>(logits_)),
        rows_(logits_, scratch),
        row_(scratch + Rows<S>::scratch(logits_)),
        lower_(row_ + size_),
        upper_(lower_ + size_),
        weights_(work, upper_ + size_) {}

  // The gradients of the source rows [begin, end) of an image.
  void compute(int64_t n, int64_t begin, int64_t end) {
    const Sampling& y = logits_.y;
    int64_t first = 0;
    while (first < y.out && y.upper[first] < begin) ++first;
    int64_t at = first < y.out && y.lower[first] < begin ? y.lower[first] : begin;
    zero(lower_);
    zero(upper_);
    const auto finish = [&](int64_t until) {
      for (; at < until; ++at) {
        if (at >= begin && at < end) store_row<S>(work_, n, at, lower_);
        A* const done = lower_;
        lower_ = upper_, upper_ = done;
        zero(upper_);
      }
    };
    for (int64_t t = first; t < y.out && y.lower[t] < end; ++t) {
      finish(y.lower[t]);
      if (!target_row(n, t)) continue;
      const A weight = static_cast<const A*>(y.weight)[t];
      add(lower_, A(1) - weight);
      if (!y.identity()) add(y.upper[t] == y.lower[t] ? lower_ : upper_, weight);
    }
    finish(end);
  }

 private:
  void zero(A* row) const {
    for (int64_t i = 0; i < size_; i += kLanes<A>) store(row + i, Vec<A>{});
  }
  void add(A* sum, A weight) const {
    for (int64_t i = 0; i < size_; i += kLanes<A>)
      store(sum + i, load(sum + i) + weight * load(row_ + i));
  }

  // row_ = the gradient of a target row's source columns; whether there is any.
  bool target_row(int64_t n, int64_t y) {
    const int64_t width = logits_.x.out, at = (n * logits_.y.out + y) * width;
    const int64_t* target = work_.target + at;
    bool any = false;
    for (int64_t x = 0; x < width && !any; ++x) any = counts(work_, target[x]);
    if (!any) return false;
    const A* row = rows_.at(n, y);
    const A* logsumexp = static_cast<const A*>(work_.logsumexp) + at;
    const A* grad = static_cast<const A*>(work_.grad) + n * work_.stride_n + y * work_.stride_h;
    const bool tame = rows_.tame;
    zero(row_);
    for_each_run(logits_.x, [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int pixels = decltype(count)::value;
      Factors<A> of[pixels];
      bool any_here = false;
      for (int p = 0; p < pixels; ++p) {
        of[p] = factors(work_, weights_, target[x + p], grad[(x + p) * work_.stride_w]);
        any_here |= counts(work_, target[x + p]);
      }
      if (!any_here) return;
      if (!tame) {
        for (int p = 0; p < pixels; ++p)
          if (counts(work_, target[x + p])) gather_one(row, x + p, logsumexp[x + p], of[p]);
      } else if (work_.smoothing > 0)
        gather<A, pixels, true>(logits_, row, x, logsumexp + x, of, weights_.padded(), row_);
      else
        gather<A, pixels, false>(logits_, row, x, logsumexp + x, of, nullptr, row_);
      const int64_t stride = padded_classes<A>(logits_.classes);
      for (int p = 0; p < pixels; ++p) {
        if (!counts(work_, target[x + p])) continue;
        const A weight = static_cast<const A*>(logits_.x.weight)[x + p];
        row_[logits_.x.lower[x] * stride + target[x + p]] -= (A(1) - weight) * of[p].target;
        if (logits_.x.identity()) continue;
        row_[logits_.x.upper[x] * stride + target[x + p]] -= weight * of[p].target;
      }
    });
    return true;
  }

  void gather_one(const A* row, int64_t x, A logsumexp, Factors<A> of) {
    const int64_t stride = padded_classes<A>(logits_.classes);
    const Between<A> pixel = between(logits_, row, x);
    for (int64_t c = 0; c < logits_.classes; ++c) {
      const A d = of.probability * exp_of(pixel[c] - logsumexp) - of.weight * weights_.padded()[c];
      row_[logits_.x.lower[x] * stride + c] += (A(1) - pixel.weight) * d;
      if (!pixel.is_column) row_[logits_.x.upper[x] * stride + c] += pixel.weight * d;
    }
  }

  const CrossEntropyBackward& work_;
  const Logits& logits_;
  int64_t size_;
  Rows<S> rows_;
  A *row_, *lower_, *upper_;
  Weights<A> weights_;
};

template <class S>
void backward(const CrossEntropyBackward& work, int64_t begin, int64_t end, void* scratch) {
  SourceRows<S> rows(work, static_cast<compute_t<S>*>(scratch));
  const int64_t height = work.logits.y.in;
  while (begin < end) {
    const int64_t n = begin / height, first = begin % height;
    const int64_t last = end - n * height < height ? end - n * height : height;
    rows.compute(n, first, last);
    begin = n * height + last;
  }
}

}  // namespace

#define FASTFUSE_KERNEL(S) {forward<S>, backward<S>, forward_scratch<S>, SourceRows<S>::scratch}
extern const UpsampleCrossEntropyKernels upsample_cross_entropy_kernels = {
    {FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};
#undef FASTFUSE_KERNEL

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
