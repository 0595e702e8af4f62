// Vector bodies of the pointwise steps: each row is read, computed and written once, from and to
// caches, between two matrix products.

#include "cpu/gelu.h"
#include "cpu/integers.h"
#include "cpu/pointwise.h"
#include "cpu/rows_bodies.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
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

template <class S>
void layer_norm(const LayerNorm& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const A *weight = static_cast<const A*>(op.weight), *bias = static_cast<const A*>(op.bias);
  A* values = static_cast<A*>(scratch);
  for (int64_t i = begin; i < end; ++i) {
    const S* skip = op.skip.data ? row_of<const S>(op.skip, i) : nullptr;
    S* out = row_of<S>(op.out, i);
    const Moments<A> m = moments(row_of<const S>(op.x, i), op.channels, op.eps, values);
    for_channels<A>(op.channels, [&](auto count, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
        const Vec<A> scale = load(weight + c) * m.inverse_std;
        Vec<A> y = (fastfuse::load(values + c) - m.mean) * scale + load(bias + c);
        if (op.gelu) y = gelu<kNarrow<S>>(y);
        if (skip) y += load(skip + c);
        store(out + c, y);
      }
    });
  }
}

template <class S>
void layer_norm_backward(const LayerNormBackward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const LayerNorm& f = op.forward;
  const A *weight = static_cast<const A*>(f.weight), *bias = static_cast<const A*>(f.bias);
  const int64_t length = round_up(f.channels, kLanes<A>);
  A* values = static_cast<A*>(scratch);
  A* scaled = values + length;  // the gradient of the normalized row
  for (int64_t block = begin; block < end; ++block) {
    A* sum_weight = static_cast<A*>(op.sums) + 2 * block * f.channels;
    A* sum_bias = sum_weight + f.channels;
    clear(sum_weight, 2 * f.channels);
    for (int64_t i = block * kRowBlock; i < min_of((block + 1) * kRowBlock, f.rows); ++i) {
      const S* grad = row_of<const S>(op.grad_output, i);
      S* grad_x = row_of<S>(op.grad_x, i);
      const Moments<A> m = moments(row_of<const S>(f.x, i), f.channels, f.eps, values);
      Vec<A> total = {}, product = {};
      for_channels<A>(f.channels, [&](auto count, int64_t c, auto load, auto store) {
        for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
          const Vec<A> normalized = (fastfuse::load(values + c) - m.mean) * m.inverse_std;
          const Vec<A> w = load(weight + c);
          Vec<A> g = load(grad + c);
          if (f.gelu) {
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
      const A channels = static_cast<A>(f.channels);
      const A mean = sum_of_lanes<A>(total) / channels;
      const A correlation = sum_of_lanes<A>(product) / channels;
      for_channels<A>(f.channels, [&](auto count, int64_t c, auto load, auto store) {
        for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
          const Vec<A> normalized = (fastfuse::load(values + c) - m.mean) * m.inverse_std;
          store(grad_x + c, (load(scaled + c) - mean - normalized * correlation) * m.inverse_std);
        }
      });
    }
  }
}

template <class S>
void bias_gelu(const BiasGelu& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  const A* bias = static_cast<const A*>(op.bias);
  for (int64_t i = begin; i < end; ++i) {
    const S* hidden = row_of<const S>(op.hidden, i);
    S* out = row_of<S>(op.out, i);
    for_channels<A>(op.channels, [&](auto count, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
        const Vec<A> h = load(hidden + c) + load(bias + c);
        store(out + c, gelu<kNarrow<S>>(h));
      }
    });
  }
}

template <class S>
void bias_gelu_backward(const BiasGelu& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  const A* bias = static_cast<const A*>(op.bias);
  for (int64_t block = begin; block < end; ++block) {
    A* sums = static_cast<A*>(op.sums) + block * op.channels;
    clear(sums, op.channels);
    for (int64_t i = block * kRowBlock; i < min_of((block + 1) * kRowBlock, op.rows); ++i) {
      const S* hidden = row_of<const S>(op.hidden, i);
      S *out = row_of<S>(op.out, i), *grad = row_of<S>(op.grad, i);
      for_channels<A>(op.channels, [&](auto count, int64_t c, auto load, auto store) {
        for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
          const Vec<A> h = load(hidden + c) + load(bias + c);
          const GeluWithDerivative<A> f = gelu_with_derivative<kNarrow<S>>(h);
          const Vec<A> g = load(grad + c) * f.derivative;
          store(out + c, f.value);
          store(grad + c, g);
          store(sums + c, load(sums + c) + g);
        }
      });
    }
  }
}

template <class S>
void residual(const Residual& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  const A *bias = static_cast<const A*>(op.bias), *scale = static_cast<const A*>(op.scale);
  for_kept_rows<A>(op.images, begin, end, [&](int64_t i, A keep) {
    const S *x = row_of<const S>(op.x, i), *product = row_of<const S>(op.product, i);
    S* out = row_of<S>(op.out, i);
    for_channels<A>(op.channels, [&](auto count, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
        const Vec<A> factor = scale ? load(scale + c) * keep : splat(keep);
        store(out + c, load(x + c) + factor * (load(product + c) + load(bias + c)));
      }
    });
  });
}

template <class S>
void residual_backward(const Residual& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  for (int64_t block = begin; block < end; ++block) {
    A* sums = static_cast<A*>(op.sums) + block * op.channels;
    clear(sums, op.channels);
    const int64_t last = min_of((block + 1) * kRowBlock, op.rows);
    for_kept_rows<A>(op.images, block * kRowBlock, last, [&](int64_t i, A keep) {
      const S* grad = row_of<const S>(op.x, i);
      for_channels<A>(op.channels, [&](auto count, int64_t c, auto load, auto store) {
        for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
          const Vec<A> kept = load(grad + c) * keep;
          if (op.images.keep) store(row_of<S>(op.out, i) + c, kept);
          store(sums + c, load(sums + c) + kept);
        }
      });
    });
  }
}

template <class S>
void bias_relu(const BiasRelu& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  const A* bias = static_cast<const A*>(op.bias);
  for (int64_t i = begin; i < end; ++i) {
    const S* product = row_of<const S>(op.product, i);
    const S* skip = op.skip.data ? row_of<const S>(op.skip, i) : nullptr;
    S* out = row_of<S>(op.out, i);
    for_channels<A>(op.channels, [&](auto count, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
        Vec<A> y = load(product + c) + load(bias + c);
        if (skip) y += load(skip + c);
        store(out + c, y < 0 ? Vec<A>{} : y);  // a NaN stays one
      }
    });
  }
}

template <class S>
constexpr PointwiseKernels::Kernel kernel() {
  return {layer_norm<S>, layer_norm_backward<S>, bias_gelu<S>, bias_gelu_backward<S>, bias_relu<S>,
          residual<S>,   residual_backward<S>};
}

#define FASTFUSE_KERNEL(S) kernel<S>()

}  // namespace

extern const PointwiseKernels pointwise_kernels = {{FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
