// Vector bodies of upsample_argmax, compiled once per instruction set (see isa_list.h): running
// maxima of each lane's classes, and the vectors they came from.

#include "cpu/logits_bodies.h"
#include "cpu/upsample_argmax.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

// Ties take the lowest class; a NaN is larger than anything, and the first one wins.
template <class A>
void argmax_of_one(Between<A> pixel, int64_t classes, int64_t* label, A* confidence) {
  int64_t best = 0;
  for (int64_t c = 1; c < classes; ++c) {
    const A v = pixel[c], top = pixel[best];
    if (top == top && (v > top || v != v)) best = c;
  }
  *label = best;
  if (!confidence) return;
  A sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += exp_of(pixel[c] - pixel[best]);
  *confidence = A(1) / sum;
}

template <class A, int Pixels>
FASTFUSE_INLINE void argmax_of(const Logits& logits, const A* row, int64_t x, int64_t* labels,
                               A* confidence) {
  constexpr int64_t lanes = kLanes<A>;
  using Index = typename IntegerOf<A>::type;
  const int64_t stride = padded_classes<A>(logits.classes);
  const PixelsBetween<A, Pixels> pixels(logits, row, x);
  Vec<A> best[Pixels];
  IndexVec<A> where[Pixels];
  pixels.at(0, [&](int p, Vec<A> v) __attribute__((always_inline)) {
    best[p] = v;
    where[p] = IndexVec<A>{};
  });
  for (int64_t c = lanes; c < stride; c += lanes) {
    const IndexVec<A> here = IndexVec<A>{} + static_cast<Index>(c);
    pixels.at(c, [&](int p, Vec<A> v) __attribute__((always_inline)) {
      where[p] = v > best[p] ? here : where[p];
      best[p] = max_of<A>(v, best[p]);
    });
  }
  IndexVec<A> lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  const auto min_of = [](IndexVec<A> a, IndexVec<A> b)
                          __attribute__((always_inline)) { return a < b ? a : b; };
  Vec<A> top[Pixels];
  FASTFUSE_UNROLL
  for (int p = 0; p < Pixels; ++p) {
    top[p] = folded<A>(best[p], max_of<A>);
    const IndexVec<A> none = IndexVec<A>{} + static_cast<Index>(stride);
    labels[p] = folded<A>(best[p] == top[p] ? where[p] + lane : none, min_of)[0];
  }
  if (!confidence) return;
  Vec<A> sum[Pixels] = {};
  for (int64_t c = 0; c < stride; c += lanes)
    pixels.at(c, [&](int p, Vec<A> v)
                     __attribute__((always_inline)) { sum[p] += exp_of_negative(v - top[p]); });
  FASTFUSE_UNROLL
  for (int p = 0; p < Pixels; ++p) confidence[p] = A(1) / sum_of_lanes<A>(sum[p]);
}

template <class S>
void argmax(const UpsampleArgmax& work, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const Logits& logits = work.logits;
  TargetRows<S, false> rows(logits, static_cast<A*>(scratch));
  for (int64_t unit = begin; unit < end; ++unit) {
    const A* row = rows.at(unit / logits.y.out, unit % logits.y.out);
    int64_t* labels = work.labels + unit * logits.x.out;
    A* confidence = work.confidence ? static_cast<A*>(work.confidence) + unit * logits.x.out
                                    : static_cast<A*>(nullptr);
    if (!rows.tame) {
      for (int64_t x = 0; x < logits.x.out; ++x)
        argmax_of_one(between(logits, row, x), logits.classes, labels + x,
                      confidence ? confidence + x : nullptr);
      continue;
    }
    for_each_run(logits.x, [&](auto count, int64_t x) __attribute__((always_inline)) {
      argmax_of<A, decltype(count)::value>(logits, row, x, labels + x,
                                           confidence ? confidence + x : nullptr);
    });
  }
}

}  // namespace

#define FASTFUSE_KERNEL(S) {argmax<S>, TargetRows<S, false>::scratch}
extern const UpsampleArgmaxKernels upsample_argmax_kernels = {
    {FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};
#undef FASTFUSE_KERNEL

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
