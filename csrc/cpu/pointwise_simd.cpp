// Vector bodies of the pointwise steps: each row is read, computed and written once, from and to
// caches, between two matrix products.

#include "cpu/integers.h"
#include "cpu/pointwise.h"
#include "cpu/pointwise_rows.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

template <class S>
void layer_norm(const LayerNorm& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const A *weight = static_cast<const A*>(op.weight), *bias = static_cast<const A*>(op.bias);
  A* values = static_cast<A*>(scratch);
  for (int64_t i = begin; i < end; ++i) {
    const S* skip = op.skip.data ? row_of<const S>(op.skip, i) : nullptr;
    layer_norm_row(row_of<S>(op.out, i), row_of<const S>(op.x, i), weight, bias, skip, op.gelu,
                   op.channels, op.eps, values);
  }
}

template <class S>
void layer_norm_backward(const LayerNormBackward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const LayerNorm& f = op.forward;
  const A *weight = static_cast<const A*>(f.weight), *bias = static_cast<const A*>(f.bias);
  for (int64_t block = begin; block < end; ++block) {
    A* sum_weight = static_cast<A*>(op.sums) + 2 * block * f.channels;
    A* sum_bias = sum_weight + f.channels;
    clear(sum_weight, 2 * f.channels);
    for (int64_t i = block * kRowBlock; i < min_of((block + 1) * kRowBlock, f.rows); ++i)
      layer_norm_backward_row(row_of<S>(op.grad_x, i), sum_weight, sum_bias,
                              row_of<const S>(op.grad_output, i), row_of<const S>(f.x, i), weight,
                              bias, f.channels, f.eps, f.gelu, static_cast<A*>(scratch));
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
    residual_row(row_of<S>(op.out, i), row_of<const S>(op.x, i), row_of<const S>(op.product, i),
                 bias, scale, keep, op.channels);
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
