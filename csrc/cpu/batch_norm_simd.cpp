// Vector bodies of batch norms with the ReLUs behind them: each row is read once for its moments,
// once to be normalized, and in backward once for the sums and once for the gradient.

#include "cpu/batch_norm.h"
#include "cpu/integers.h"
#include "cpu/rows_bodies.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

// A NaN stays one, and is let through backward, as in PyTorch.
template <class A>
FASTFUSE_INLINE Vec<A> where_positive(Vec<A> y, Vec<A> value) {
  return y <= 0 ? Vec<A>{} : value;
}

// Squares are summed less a block's first row: not less than its mean, but what cancels is then no
// more than a share of the sum itself.
template <class S>
void row_moments(const RowMoments& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRowBlock, last = min_of(first + kRowBlock, op.rows);
    A* means = static_cast<A*>(op.moments) + 2 * block * op.channels;
    A* squares = means + op.channels;
    const S* origin = row_of<const S>(op.x, first);
    clear(means, 2 * op.channels);
    for_row_groups(first, last, [&](auto count, int64_t i) {
      const S* x = row_of<const S>(op.x, i);
      for_channels<A>(op.channels, [&](auto vectors, int64_t c, auto load, auto store) {
        for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
          const Vec<A> from = load(origin + c);
          Vec<A> sum = load(means + c), square = load(squares + c);
          FASTFUSE_UNROLL
          for (int r = 0; r < decltype(count)::value; ++r) {
            const Vec<A> d = load(x + r * op.x.stride + c) - from;
            sum += d;
            square += d * d;
          }
          store(means + c, sum);
          store(squares + c, square);
        }
      });
    });
    const A each = A(1) / static_cast<A>(last - first);
    for_channels<A>(op.channels, [&](auto vectors, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
        const Vec<A> sum = load(means + c), mean = sum * each;
        store(means + c, load(origin + c) + mean);
        store(squares + c, load(squares + c) - sum * mean);
      }
    });
  }
}

template <class S>
void norm_relu(const NormRelu& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  const A *scale = static_cast<const A*>(op.scale), *offset = static_cast<const A*>(op.offset);
  for_kept_rows<A>(op.images, begin, end, [&](int64_t i, A keep) {
    const S* x = row_of<const S>(op.x, i);
    const S* skip = op.skip.data ? row_of<const S>(op.skip, i) : nullptr;
    S* out = row_of<S>(op.out, i);
    for_channels<A>(op.channels, [&](auto vectors, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
        Vec<A> y = load(x + c) * load(scale + c) + load(offset + c);
        if (skip) y = load(skip + c) + keep * y;
        store(out + c, where_positive<A>(y, y));
      }
    });
  });
}

template <class S>
void norm_relu_backward(const NormReluBackward& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  const NormRelu& f = op.forward;
  const A *scale = static_cast<const A*>(f.scale), *offset = static_cast<const A*>(f.offset);
  const A* mean = static_cast<const A*>(op.mean);
  const bool known = op.result.data, writes = f.out.data;
  for (int64_t block = begin; block < end; ++block) {
    A* sums = static_cast<A*>(op.sums) + 2 * block * f.channels;
    A* products = sums + f.channels;
    clear(sums, 2 * f.channels);
    const int64_t first = block * kRowBlock, last = min_of(first + kRowBlock, f.rows);
    for_images<A>(f.images, first, last, [&](int64_t from, int64_t to, A keep) {
      for_row_groups(from, to, [&](auto count, int64_t i) {
        for_channels<A>(f.channels, [&](auto vectors, int64_t c, auto load, auto store) {
          for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
            Vec<A> sum = {}, product = {};
            FASTFUSE_UNROLL
            for (int r = 0; r < decltype(count)::value; ++r) {
              const Vec<A> x = load(row_of<const S>(f.x, i + r) + c);
              Vec<A> y;
              if (known)
                y = load(row_of<const S>(op.result, i + r) + c);
              else
                y = x * load(scale + c) + load(offset + c);
              if (writes) store(row_of<S>(f.out, i + r) + c, where_positive<A>(y, y));
              const Vec<A> g =
                  where_positive<A>(y, load(row_of<const S>(op.grad_output, i + r) + c));
              store(row_of<S>(op.grad, i + r) + c, g);
              sum += g;
              product += g * (x - load(mean + c));
            }
            store(sums + c, load(sums + c) + keep * sum);
            store(products + c, load(products + c) + keep * product);
          }
        });
      });
    });
  }
}

template <class S>
void norm_backward(const NormBackward& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  const A *mean = static_cast<const A*>(op.mean), *scale = static_cast<const A*>(op.scale);
  const A *slope = static_cast<const A*>(op.slope), *offset = static_cast<const A*>(op.offset);
  for_kept_rows<A>(op.images, begin, end, [&](int64_t i, A keep) {
    const S *x = row_of<const S>(op.x, i), *grad = row_of<const S>(op.grad, i);
    S* grad_x = row_of<S>(op.grad_x, i);
    for_channels<A>(op.channels, [&](auto vectors, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
        Vec<A> y = keep * load(grad + c) * load(scale + c);
        if (slope) y += (load(x + c) - load(mean + c)) * load(slope + c) + load(offset + c);
        store(grad_x + c, y);
      }
    });
  });
}

template <class S>
constexpr BatchNormKernels::Kernel kernel() {
  return {row_moments<S>, norm_relu<S>, norm_relu_backward<S>, norm_backward<S>};
}

#define FASTFUSE_KERNEL(S) kernel<S>()

}  // namespace

extern const BatchNormKernels batch_norm_kernels = {{FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
