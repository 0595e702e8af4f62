// Host functions of the pointwise steps: checks, threads, choice of vector body.

#include "cpu/pointwise.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/matrix.h"

namespace fastfuse {
namespace {

const PointwiseKernels::Kernel& kernel(Dtype dtype) {
  return pointwise_kernels_of(isa_of(dtype)).kernels[dtype];
}

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

void residual_into(Tensor out, Tensor x, Tensor product, Tensor bias, std::optional<Tensor> scale,
                   std::optional<Tensor> keep, int64_t pixels, int64_t first) {
  const Matrix m("residual_into", "x", x);
  Residual op{};
  op.rows = m.rows();
  op.channels = m.channels();
  op.images = m.images(keep, pixels, first);
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
  op.rows = m.rows();
  op.channels = m.channels();
  op.images = m.images(keep, pixels, first);
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
