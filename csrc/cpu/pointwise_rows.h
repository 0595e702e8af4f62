// The pointwise steps of one row, for vector bodies: layer norm, residual, and their gradients.
//
// S is the type of images, G that of what lies between: S itself, or the accumulation type.
#pragma once

#include "cpu/gelu.h"
#include "cpu/rows_bodies.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

// Whether GELU may be as inexact as the storage type.
template <class S>
constexpr bool kNarrow = sizeof(S) == 2;

template <class A>
struct Moments {
  A mean, inverse_std;
};

// The moments of a row, which is left in `values` in whole vectors: 0 where there is no channel.
template <class S, class A = compute_t<S>>
FASTFUSE_INLINE Moments<A> moments(const S* x, int64_t channels, double eps, A* values) {
  const A count = static_cast<A>(channels);
  Vec<A> sum = {};
  for_channels<A>(channels, [&](auto vectors, int64_t c, auto load, auto) {
    for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
      const Vec<A> value = load(x + c);
      fastfuse::store(values + c, value);
      sum += value;
    }
  });
  const A mean = sum_of_lanes<A>(sum) / count;
  Vec<A> squares = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    const Vec<A> difference = load(values + c) - mean;
    squares += difference * difference;
  }
  A total = sum_of_lanes<A>(squares);
  for (; c < channels; ++c) total += (values[c] - mean) * (values[c] - mean);
  return {mean, A(1) / static_cast<A>(__builtin_sqrt(total / count + static_cast<A>(eps)))};
}

// out = [skip +] [GELU](LN(x)), the bracketed parts on demand; `values` has room for a row of whole
// vectors.
template <class S, class G, class A = compute_t<S>>
FASTFUSE_INLINE void layer_norm_row(G* out, const S* x, const A* weight, const A* bias,
                                    const S* skip, bool gelu, int64_t channels, double eps,
                                    A* values) {
  const Moments<A> m = moments(x, channels, eps, values);
  for_channels<A>(channels, [&](auto count, int64_t c, auto load, auto store) {
    for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
      const Vec<A> scale = load(weight + c) * m.inverse_std;
      Vec<A> y = (fastfuse::load(values + c) - m.mean) * scale + load(bias + c);
      if (gelu) y = fastfuse::gelu<kNarrow<S>>(y);
      if (skip) y += load(skip + c);
      store(out + c, y);
    }
  });
}

// grad_x of LN's gradient, and what weight and bias get of it added to their sums; of GELU after LN
// with `gelu`. `values` has room for two rows of whole vectors.
template <class S, class G, class A = compute_t<S>>
FASTFUSE_INLINE void layer_norm_backward_row(S* grad_x, A* sum_weight, A* sum_bias, const G* grad,
                                             const S* x, const A* weight, const A* bias,
                                             int64_t length, double eps, bool gelu, A* values) {
  A* scaled = values + round_up(length, kLanes<A>);  // the gradient of the normalized row
  const Moments<A> m = moments(x, length, eps, values);
  Vec<A> total = {}, product = {};
  for_channels<A>(length, [&](auto count, int64_t c, auto load, auto store) {
    for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
      const Vec<A> normalized = (fastfuse::load(values + c) - m.mean) * m.inverse_std;
      const Vec<A> w = load(weight + c);
      Vec<A> g = load(grad + c);
      if (gelu) {
        const Vec<A> y = normalized * w + load(bias + c);
        g = g * gelu_with_derivative<kNarrow<S>>(y).derivative;
      }
      store(sum_weight + c, load(sum_weight + c) + g * normalized);
      store(sum_bias + c, load(sum_bias + c) + g);
      const Vec<A> of_normalized = g * w;  // 0 where there is no channel, as w is
      store(scaled + c, of_normalized);
      total += of_normalized;
      product += of_normalized * normalized;
    }
  });
  const A channels = static_cast<A>(length);
  const A mean = sum_of_lanes<A>(total) / channels;
  const A correlation = sum_of_lanes<A>(product) / channels;
  for_channels<A>(length, [&](auto count, int64_t c, auto load, auto store) {
    for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
      const Vec<A> normalized = (fastfuse::load(values + c) - m.mean) * m.inverse_std;
      store(grad_x + c, (load(scaled + c) - mean - normalized * correlation) * m.inverse_std);
    }
  });
}

// out = x + keep * scale * (product + bias)
template <class S, class G, class A = compute_t<S>>
FASTFUSE_INLINE void residual_row(S* out, const S* x, const G* product, const A* bias,
                                  const A* scale, A keep, int64_t channels) {
  for_channels<A>(channels, [&](auto count, int64_t c, auto load, auto store) {
    for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
      const Vec<A> factor = scale ? load(scale + c) * keep : splat(keep);
      store(out + c, load(x + c) + factor * (load(product + c) + load(bias + c)));
    }
  });
}

}  // namespace
}  // namespace fastfuse
