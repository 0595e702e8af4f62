// Host functions of the pointwise steps: checks, threads, choice of vector body.

#include "cpu/pointwise.h"

#include <torch/csrc/stable/library.h>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

const PointwiseKernels::Kernel& kernel(Dtype dtype) {
  return pointwise_kernels_of(isa_of(dtype)).kernels[dtype];
}

// An op's first matrix, which the others and the vectors have to fit.
class Matrix {
 public:
  Matrix(const char* op, const char* argument, const Tensor& tensor) : op_(op) {
    check(tensor.is_cpu() && tensor.dim() == 2, op, argument, " must be a CPU matrix");
    dtype_ = dtype_of(op, argument, tensor);
    rows_ = tensor.size(0);
    channels_ = tensor.size(1);
  }
  Dtype dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t channels() const { return channels_; }

  Rows matrix(const char* argument, const Tensor& tensor) const {
    check(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows_ &&
              tensor.size(1) == channels_ && dtype_of(op_, argument, tensor) == dtype_,
          op_, argument, " must be a matrix of ", rows_, " rows and ", channels_,
          " channels in the input's dtype");
    check(tensor.stride(1) == 1 || channels_ <= 1 || rows_ == 0, op_, argument,
          " must have unit stride along channels");
    return {tensor.data_ptr(), tensor.stride(0)};
  }
  Rows matrix(const char* argument, const std::optional<Tensor>& tensor) const {
    return tensor ? matrix(argument, *tensor) : Rows{};
  }
  void* vector(const char* argument, const Tensor& tensor, int64_t length) const {
    check(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == length &&
              (tensor.stride(0) == 1 || length <= 1) &&
              tensor.scalar_type() == compute_type(dtype_),
          op_, argument, " must be a contiguous vector of ", length,
          " values in the accumulation dtype");
    return tensor.data_ptr();
  }
  void* vector(const char* argument, const Tensor& tensor) const {
    return vector(argument, tensor, channels_);
  }
  void* vector(const char* argument, const std::optional<Tensor>& tensor) const {
    return tensor ? vector(argument, *tensor) : nullptr;
  }

  // Bytes of two rows of whole vectors, whatever the instruction set.
  int64_t two_rows() const {
    constexpr int64_t kVector = 64;
    return 2 * (channels_ * compute_size(dtype_) + kVector);
  }

  // body(begin, end) over the rows, or body(begin, end, scratch) with so many bytes.
  template <class... Arguments>
  void for_rows(Arguments... bytes_and_body) const {
    if (channels_ > 0) for_units(rows_, grain_of(channels_), bytes_and_body...);
  }

  // body(sums, begin, end) over blocks of rows, each with `count` vectors of sums; these are added
  // in order to `totals`.
  template <class Body>
  void for_blocks(int count, void* const* totals, Body body) const {
    if (rows_ == 0 || channels_ == 0) return;
    const int64_t blocks = ceil_div(rows_, kRowBlock);
    const Scratch sums(blocks * count * channels_ * compute_size(dtype_));
    for_units(blocks, 1, [&](int64_t begin, int64_t end) { body(sums.get(), begin, end); });
    const auto add = [&](auto* partial, auto zero) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int i = 0; i < count; ++i, partial += channels_) {
          auto* total = static_cast<decltype(zero)*>(totals[i]);
          for (int64_t c = 0; c < channels_; ++c) total[c] += partial[c];
        }
    };
    if (dtype_ == kFloat64)
      add(static_cast<const double*>(sums.get()), 0.0);
    else
      add(static_cast<const float*>(sums.get()), 0.0f);
  }

 private:
  const char* op_;
  Dtype dtype_;
  int64_t rows_, channels_;
};

LayerNorm describe(const Matrix& m, const Tensor& x, const Tensor& weight, const Tensor& bias,
                   double eps, bool gelu) {
  LayerNorm op{};
  op.rows = m.rows();
  op.channels = m.channels();
  op.x = m.matrix("x", x);
  op.weight = m.vector("norm_weight", weight);
  op.bias = m.vector("norm_bias", bias);
  op.eps = eps;
  op.gelu = gelu;
  return op;
}

void layer_norm_into(Tensor out, Tensor x, Tensor weight, Tensor bias, double eps,
                     std::optional<Tensor> skip, bool gelu) {
  const Matrix m("layer_norm_into", "x", x);
  LayerNorm op = describe(m, x, weight, bias, eps, gelu);
  op.out = m.matrix("out", out);
  op.skip = m.matrix("skip", skip);
  m.for_rows(m.two_rows(),
             [&, body = kernel(m.dtype()).layer_norm](int64_t begin, int64_t end, void* scratch) {
               body(op, begin, end, scratch);
             });
}

void layer_norm_backward_into(Tensor grad_x, Tensor grad_weight, Tensor grad_bias,
                              Tensor grad_output, Tensor x, Tensor weight, Tensor bias, double eps,
                              bool gelu) {
  const Matrix m("layer_norm_backward_into", "x", x);
  LayerNormBackward op{};
  op.forward = describe(m, x, weight, bias, eps, gelu);
  op.grad_output = m.matrix("grad_output", grad_output);
  op.grad_x = m.matrix("grad_x", grad_x);
  void* const totals[] = {m.vector("grad_weight", grad_weight), m.vector("grad_bias", grad_bias)};
  m.for_blocks(2, totals, [&](void* sums, int64_t begin, int64_t end) {
    const Scratch scratch(m.two_rows());
    LayerNormBackward mine = op;
    mine.sums = sums;
    kernel(m.dtype()).layer_norm_backward(mine, begin, end, scratch.get());
  });
}

void bias_gelu_into(Tensor out, Tensor hidden, Tensor bias) {
  const Matrix m("bias_gelu_into", "hidden", hidden);
  BiasGelu op{};
  op.rows = m.rows();
  op.channels = m.channels();
  op.hidden = m.matrix("hidden", hidden);
  op.out = m.matrix("out", out);
  op.bias = m.vector("bias", bias);
  m.for_rows([&, body = kernel(m.dtype()).bias_gelu](int64_t begin, int64_t end) {
    body(op, begin, end);
  });
}

void bias_gelu_backward_into(Tensor grad, Tensor out, Tensor grad_bias, Tensor hidden,
                             Tensor bias) {
  const Matrix m("bias_gelu_backward_into", "hidden", hidden);
  BiasGelu op{};
  op.rows = m.rows();
  op.channels = m.channels();
  op.hidden = m.matrix("hidden", hidden);
  op.out = m.matrix("out", out);
  op.grad = m.matrix("grad", grad);
  op.bias = m.vector("bias", bias);
  void* const totals[] = {m.vector("grad_bias", grad_bias)};
  m.for_blocks(1, totals, [&](void* sums, int64_t begin, int64_t end) {
    BiasGelu mine = op;
    mine.sums = sums;
    kernel(m.dtype()).bias_gelu_backward(mine, begin, end);
  });
}

void bias_relu_into(Tensor out, Tensor product, Tensor bias, std::optional<Tensor> skip) {
  const Matrix m("bias_relu_into", "product", product);
  BiasRelu op{};
  op.rows = m.rows();
  op.channels = m.channels();
  op.product = m.matrix("product", product);
  op.skip = m.matrix("skip", skip);
  op.out = m.matrix("out", out);
  op.bias = m.vector("bias", bias);
  m.for_rows([&, body = kernel(m.dtype()).bias_relu](int64_t begin, int64_t end) {
    body(op, begin, end);
  });
}

// The images of the rows: `first` and those after it, `pixels` rows each.
void describe_images(const char* name, const Matrix& m, const std::optional<Tensor>& keep,
                     int64_t pixels, int64_t first, Residual& op) {
  check_at_least(name, "pixels", 1, pixels);
  check_at_least(name, "first", 0, first);
  op.rows = m.rows();
  op.channels = m.channels();
  op.pixels = pixels;
  op.first = first;
  if (!keep) return;
  op.keep = m.vector("keep", *keep, keep->dim() == 1 ? keep->size(0) : -1);
  check(m.rows() == 0 || (first + m.rows() - 1) / pixels < keep->size(0), name,
        "keep must have a value for every image");
}

void residual_into(Tensor out, Tensor x, Tensor product, Tensor bias, std::optional<Tensor> scale,
                   std::optional<Tensor> keep, int64_t pixels, int64_t first) {
  const Matrix m("residual_into", "x", x);
  Residual op{};
  describe_images("residual_into", m, keep, pixels, first, op);
  op.x = m.matrix("x", x);
  op.product = m.matrix("product", product);
  op.out = m.matrix("out", out);
  op.bias = m.vector("bias", bias);
  op.scale = m.vector("scale", scale);
  m.for_rows(
      [&, body = kernel(m.dtype()).residual](int64_t begin, int64_t end) { body(op, begin, end); });
}

void residual_backward_into(Tensor out, Tensor sums, Tensor grad, std::optional<Tensor> keep,
                            int64_t pixels, int64_t first) {
  const Matrix m("residual_backward_into", "grad", grad);
  Residual op{};
  describe_images("residual_backward_into", m, keep, pixels, first, op);
  op.x = m.matrix("grad", grad);
  op.out = m.matrix("out", out);
  void* const totals[] = {m.vector("sums", sums)};
  m.for_blocks(1, totals, [&](void* partial, int64_t begin, int64_t end) {
    Residual mine = op;
    mine.sums = partial;
    kernel(m.dtype()).residual_backward(mine, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("layer_norm_into", TORCH_BOX(&layer_norm_into));
  m.impl("layer_norm_backward_into", TORCH_BOX(&layer_norm_backward_into));
  m.impl("bias_gelu_into", TORCH_BOX(&bias_gelu_into));
  m.impl("bias_gelu_backward_into", TORCH_BOX(&bias_gelu_backward_into));
  m.impl("bias_relu_into", TORCH_BOX(&bias_relu_into));
  m.impl("residual_into", TORCH_BOX(&residual_into));
  m.impl("residual_backward_into", TORCH_BOX(&residual_backward_into));
}

}  // namespace fastfuse
