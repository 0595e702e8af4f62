// Host functions of batch norms: checks, threads, choice of vector body.

#include "cpu/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cpu/isa.h"
#include "cpu/matrix.h"

namespace fastfuse {
namespace {

const BatchNormKernels::Kernel& kernel(Dtype dtype) {
  return batch_norm_kernels_of(isa_of(dtype)).kernels[dtype];
}

// (2, channels): rows[0] and rows[1], in the accumulation dtype.
void* pair(const char* op, const char* argument, const Tensor& tensor, const Matrix& m) {
  check(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == 2 &&
            tensor.size(1) == m.channels() && tensor.stride(1) == 1 &&
            tensor.stride(0) == m.channels() && tensor.scalar_type() == compute_type(m.dtype()),
        op, argument, " must be (2, channels) in the accumulation dtype, contiguous");
  return tensor.data_ptr();
}

// do(zero of the accumulation type)
template <class Do>
void in_accumulation(Dtype dtype, Do run) {
  if (dtype == kFloat64)
    run(0.0);
  else
    run(0.0f);
}

// A norm's factor and offset of each channel, and what its gradient multiplies x and adds.
class Norm {
 public:
  Norm(const char* op, const Matrix& m, const Tensor& moments, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& bias, double eps)
      : m_(m), eps_(eps), scratch_(4 * m.channels() * compute_size(m.dtype())) {
    moments_ = pair(op, "moments", moments, m);
    weight_ = m.vector("weight", weight);
    bias_ = m.vector("bias", bias);
    in_accumulation(m.dtype(), [&](auto zero) {
      using A = decltype(zero);
      const A *mean = at<A>(moments_, 0), *variance = at<A>(moments_, 1);
      A *scale = at<A>(scratch_.get(), 0), *offset = at<A>(scratch_.get(), 1);
      for (int64_t c = 0; c < m.channels(); ++c) {
        const A w = weight_ ? static_cast<const A*>(weight_)[c] : A(1);
        scale[c] = w / std::sqrt(variance[c] + static_cast<A>(eps));
        offset[c] = (bias_ ? static_cast<const A*>(bias_)[c] : A(0)) - mean[c] * scale[c];
      }
    });
  }

  const void* mean() const { return moments_; }
  const void* scale() const { return part(0); }
  const void* offset() const { return part(1); }
  const void* grad_slope() const { return moves_ ? part(2) : nullptr; }
  const void* grad_offset() const { return part(3); }

  // Of sums over so many rows, (2, channels), or null: where the moments are not the batch's.
  void set_gradient(const void* sums, int64_t rows) {
    moves_ = sums;
    if (!moves_) return;
    in_accumulation(m_.dtype(), [&](auto zero) {
      using A = decltype(zero);
      A *slope = at<A>(scratch_.get(), 2), *offset = at<A>(scratch_.get(), 3);
      const A *scale = at<A>(scratch_.get(), 0), *variance = at<A>(moments_, 1);
      const A *sum = at<A>(sums, 0), *product = at<A>(sums, 1);
      const A each = A(1) / static_cast<A>(rows);
      for (int64_t c = 0; c < m_.channels(); ++c) {
        slope[c] = -scale[c] * (product[c] * each) / (variance[c] + static_cast<A>(eps_));
        offset[c] = -scale[c] * (sum[c] * each);
      }
    });
  }

 private:
  template <class A, class P>
  auto at(P* data, int64_t i) const {
    using Element = std::conditional_t<std::is_const_v<P>, const A, A>;
    return static_cast<Element*>(data) + i * m_.channels();
  }
  const void* part(int64_t i) const {
    return static_cast<const char*>(scratch_.get()) + i * m_.channels() * compute_size(m_.dtype());
  }

  const Matrix& m_;
  double eps_;
  Scratch scratch_;
  const void *moments_, *weight_, *bias_;
  bool moves_ = false;  // whether the moments are those of the rows
};

void row_moments_into(Tensor moments, Tensor x) {
  constexpr const char* kOp = "row_moments_into";
  const Matrix m(kOp, "x", x);
  const int64_t blocks = ceil_div(m.rows(), kRowBlock);
  check(moments.is_cpu() && moments.dim() == 3 && moments.size(0) == blocks &&
            moments.size(1) == 2 && moments.size(2) == m.channels() && moments.is_contiguous() &&
            moments.scalar_type() == compute_type(m.dtype()),
        kOp, "moments must be (", blocks, ", 2, ", m.channels(),
        ") in the accumulation dtype, contiguous");
  if (m.channels() == 0) return;
  const RowMoments op{m.rows(), m.channels(), m.matrix("x", x), moments.data_ptr()};
  for_units(blocks, grain_of(kRowBlock * m.channels()),
            [&, body = kernel(m.dtype()).row_moments](int64_t begin, int64_t end) {
              body(op, begin, end);
            });
}

// In float64, block by block.
template <class A>
void combine(A* out, const A* moments, int64_t blocks, int64_t rows, int64_t channels) {
  const auto count = [&](int64_t b) {
    return static_cast<double>(std::min(kRowBlock, rows - b * kRowBlock));
  };
  std::vector<double> means(channels), squares(channels);
  for (int64_t b = 0; b < blocks; ++b) {
    const A* mean = moments + 2 * b * channels;
    for (int64_t c = 0; c < channels; ++c) means[c] += count(b) * mean[c];
  }
  for (double& mean : means) mean /= static_cast<double>(rows);
  for (int64_t b = 0; b < blocks; ++b) {
    const A *mean = moments + 2 * b * channels, *square = mean + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double d = mean[c] - means[c];
      squares[c] += square[c] + count(b) * d * d;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<A>(means[c]);
    out[channels + c] = static_cast<A>(std::max(squares[c], 0.0) / static_cast<double>(rows));
  }
}

void combine_moments_into(Tensor out, Tensor moments, int64_t rows) {
  constexpr const char* kOp = "combine_moments_into";
  check_at_least(kOp, "rows", 1, rows);
  check(moments.is_cpu() && moments.dim() == 3 && moments.size(1) == 2 &&
            moments.size(0) == ceil_div(rows, kRowBlock) && moments.is_contiguous(),
        kOp, "moments must be those of the blocks of so many rows");
  check(out.is_cpu() && out.dim() == 2 && out.size(0) == 2 && out.size(1) == moments.size(2) &&
            out.is_contiguous() && out.scalar_type() == moments.scalar_type(),
        kOp, "out must be (2, channels) in the dtype of moments, contiguous");
  in_accumulation(dtype_of(kOp, "moments", moments), [&](auto zero) {
    using A = decltype(zero);
    combine(static_cast<A*>(out.data_ptr()), static_cast<const A*>(moments.const_data_ptr()),
            moments.size(0), rows, moments.size(2));
  });
}

void norm_relu_into(Tensor out, Tensor x, Tensor moments, std::optional<Tensor> weight,
                    std::optional<Tensor> bias, double eps, std::optional<Tensor> skip,
                    std::optional<Tensor> keep, int64_t pixels) {
  constexpr const char* kOp = "norm_relu_into";
  const Matrix m(kOp, "x", x);
  const Norm norm(kOp, m, moments, weight, bias, eps);
  const NormRelu op{m.rows(),
                    m.channels(),
                    m.matrix("x", x),
                    m.matrix("skip", skip),
                    m.matrix("out", out),
                    norm.scale(),
                    norm.offset(),
                    m.images(keep, pixels, 0)};
  m.for_rows([&, body = kernel(m.dtype()).norm_relu](int64_t begin, int64_t end) {
    body(op, begin, end);
  });
}

void norm_relu_backward_into(Tensor grad, std::optional<Tensor> out, Tensor sums,
                             Tensor grad_output, Tensor x, Tensor moments,
                             std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                             std::optional<Tensor> result, std::optional<Tensor> keep,
                             int64_t pixels) {
  constexpr const char* kOp = "norm_relu_backward_into";
  const Matrix m(kOp, "x", x);
  const Norm norm(kOp, m, moments, weight, bias, eps);
  NormReluBackward op{};
  op.forward = {m.rows(),     m.channels(),  m.matrix("x", x),         Rows{}, m.matrix("out", out),
                norm.scale(), norm.offset(), m.images(keep, pixels, 0)};
  op.mean = norm.mean();
  op.result = m.matrix("result", result);
  op.grad_output = m.matrix("grad_output", grad_output);
  op.grad = m.matrix("grad", grad);
  void* const total = pair(kOp, "sums", sums, m);
  void* const totals[] = {total,
                          static_cast<char*>(total) + m.channels() * compute_size(m.dtype())};
  m.for_blocks(2, totals, [&](void* partial, int64_t begin, int64_t end) {
    NormReluBackward mine = op;
    mine.sums = partial;
    kernel(m.dtype()).norm_relu_backward(mine, begin, end);
  });
}

void norm_backward_into(Tensor grad_x, Tensor grad, Tensor x, Tensor moments,
                        std::optional<Tensor> weight, double eps, std::optional<Tensor> sums,
                        std::optional<Tensor> keep, int64_t pixels) {
  constexpr const char* kOp = "norm_backward_into";
  const Matrix m(kOp, "x", x);
  Norm norm(kOp, m, moments, weight, std::nullopt, eps);
  norm.set_gradient(sums ? pair(kOp, "sums", *sums, m) : nullptr, m.rows());
  const NormBackward op{m.rows(),
                        m.channels(),
                        m.matrix("x", x),
                        m.matrix("grad", grad),
                        m.matrix("grad_x", grad_x),
                        norm.mean(),
                        norm.scale(),
                        norm.grad_slope(),
                        norm.grad_offset(),
                        m.images(keep, pixels, 0)};
  m.for_rows([&, body = kernel(m.dtype()).norm_backward](int64_t begin, int64_t end) {
    body(op, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("row_moments_into", TORCH_BOX(&row_moments_into));
  m.impl("combine_moments_into", TORCH_BOX(&combine_moments_into));
  m.impl("norm_relu_into", TORCH_BOX(&norm_relu_into));
  m.impl("norm_relu_backward_into", TORCH_BOX(&norm_relu_backward_into));
  m.impl("norm_backward_into", TORCH_BOX(&norm_backward_into));
}

}  // namespace fastfuse
