// Host functions of the MLP of blocks: checks, threads, choice of vector body.

#include "cpu/mlp.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/matrix.h"

namespace fastfuse {
namespace {

const MlpKernels::Kernel& kernel(Dtype dtype) {
  return mlp_kernels_of(isa_of(dtype)).kernels[dtype];
}

// A weight, (outputs, inputs) without gaps in the accumulation dtype.
void* weight_of(const Matrix& m, const char* argument, const Tensor& weight, int64_t outputs,
                int64_t inputs) {
  check(weight.is_cpu() && weight.dim() == 2 && weight.size(0) == outputs &&
            weight.size(1) == inputs && weight.is_contiguous() &&
            weight.scalar_type() == compute_type(m.dtype()),
        m.op(), argument, " must be a contiguous (", outputs, ", ", inputs,
        ") matrix in the accumulation dtype");
  return weight.data_ptr();
}

// A matrix of the hidden tensor, (rows, hidden) with unit stride.
Rows hidden_of(const Matrix& m, const char* argument, const std::optional<Tensor>& tensor,
               int64_t hidden) {
  if (!tensor) return {};
  const Matrix own(m.op(), argument, *tensor);
  check(own.rows() == m.rows() && own.channels() == hidden && own.dtype() == m.dtype() &&
            tensor->stride(1) == 1,
        m.op(), argument, " must be a matrix of ", m.rows(), " rows and ", hidden,
        " channels in the input's dtype");
  return {tensor->data_ptr(), tensor->stride(0)};
}

struct Pixels {
  const std::optional<Tensor>&keep, &norm_weight, &norm_bias;
  double eps;
  int64_t pixels;
};

Mlp describe(const Matrix& m, const Tensor& inputs, const std::optional<Tensor>& kept,
             const Tensor& fc1_weight, const Tensor& fc1_bias, const Pixels& p) {
  Mlp op{};
  op.rows = m.rows();
  op.channels = m.channels();
  check(fc1_bias.dim() == 1, m.op(), "fc1_bias must be a vector");
  op.hidden = fc1_bias.size(0);
  check(op.channels > 0 && op.hidden > 0, m.op(), "x must have channels, and fc1_weight outputs");
  op.tile_bytes = sizes().mlp_bytes;
  op.inputs = m.matrix("inputs", inputs);
  op.kept = hidden_of(m, "kept", kept, op.hidden);
  op.images = m.images(p.keep, p.pixels, 0);
  check(p.norm_weight.has_value() == p.norm_bias.has_value(), m.op(),
        "norm_weight and norm_bias must be both given, or neither");
  op.norm_weight = m.vector("norm_weight", p.norm_weight);
  op.norm_bias = m.vector("norm_bias", p.norm_bias);
  op.eps = p.eps;
  op.fc1_weight = weight_of(m, "fc1_weight", fc1_weight, op.hidden, op.channels);
  op.fc1_bias = m.vector("fc1_bias", fc1_bias, op.hidden);
  return op;
}

int64_t panels_of(const Mlp& op, const MlpKernels::Kernel& found) {
  return ceil_div(op.rows, found.panel);
}

void mlp_into(Tensor out, std::optional<Tensor> kept, Tensor x, Tensor inputs,
              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
              Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias,
              std::optional<Tensor> scale, std::optional<Tensor> keep, int64_t pixels) {
  const Matrix m("mlp_into", "x", x);
  Mlp op =
      describe(m, inputs, kept, fc1_weight, fc1_bias, {keep, norm_weight, norm_bias, eps, pixels});
  op.x = m.matrix("x", x);
  op.out = m.matrix("out", out);
  op.fc2_weight = weight_of(m, "fc2_weight", fc2_weight, op.channels, op.hidden);
  op.fc2_bias = m.vector("fc2_bias", fc2_bias);
  op.scale = m.vector("scale", scale);
  const MlpKernels::Kernel& found = kernel(m.dtype());
  const int64_t panels = panels_of(op, found);
  const int64_t work = 2 * op.rows * op.channels * op.hidden;
  for_units(panels, grain_of(panels, work, sizes().depthwise_grain),
            [&](int64_t begin, int64_t end) {
              const Scratch scratch(found.forward_bytes(op, end - begin));
              found.forward(op, begin, end, scratch.get());
            });
}

// A weight of a backward pass, (columns, rows) without gaps.
void transpose(const MlpKernels::Kernel& found, const Transposition& op) {
  for_units(ceil_div(op.columns, found.panel), grain_of(found.panel * op.rows),
            [&](int64_t begin, int64_t end) { found.transpose(op, begin, end); });
}

// Where the parameters' gradients go.
struct Gradients {
  void *norm_weight, *norm_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};

// The sums of parts, in order. The second weight's are added where the first part's are.
template <class A>
void add_parts(const Gradients& to, A* sums, const MlpSums& at, int64_t parts, const Mlp& op) {
  const auto add = [&](void* totals, int64_t from, int64_t count) {
    A* const total = static_cast<A*>(totals);
    for (int64_t i = 0; i < count; ++i) {
      A value = sums[from + i];
      for (int64_t p = 1; p < parts; ++p) value += sums[p * at.values + from + i];
      total[i] = value;
    }
  };
  if (to.fc1)
    for_units(op.hidden, grain_of(op.channels * parts), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t fc1 = at.fc1 + n * at.stride, fc2 = at.fc2 + n * at.stride;
        add(static_cast<A*>(to.fc1) + n * op.channels, fc1, op.channels);
        if (parts > 1) add(sums + fc2, fc2, op.channels);
      }
    });
  add(to.fc1_bias, at.fc1_bias, op.hidden);
  add(to.fc2_bias, at.fc2_bias, op.channels);
  if (!to.norm_weight) return;
  add(to.norm_weight, at.norm_weight, op.channels);
  add(to.norm_bias, at.norm_bias, op.channels);
}

void mlp_backward_into(Tensor grad_inputs, std::optional<Tensor> grad_norm_weight,
                       std::optional<Tensor> grad_norm_bias, std::optional<Tensor> grad_fc1_weight,
                       Tensor grad_fc1_bias, std::optional<Tensor> grad_fc2_weight,
                       Tensor grad_fc2_bias, Tensor grad, Tensor inputs, std::optional<Tensor> kept,
                       std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                       double eps, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,
                       std::optional<Tensor> scale, std::optional<Tensor> keep, int64_t pixels) {
  const Matrix m("mlp_backward_into", "grad", grad);
  MlpBackward op{};
  Mlp& f = op.forward =
      describe(m, inputs, kept, fc1_weight, fc1_bias, {keep, norm_weight, norm_bias, eps, pixels});
  op.grad = m.matrix("grad", grad);
  op.grad_inputs = m.matrix("grad_inputs", grad_inputs);
  f.fc2_weight = weight_of(m, "fc2_weight", fc2_weight, f.channels, f.hidden);
  f.scale = m.vector("scale", scale);
  op.of_parameters = grad_fc1_weight.has_value();
  check(op.of_parameters == grad_fc2_weight.has_value(), m.op(),
        "grad_fc1_weight and grad_fc2_weight must be both given, or neither");
  check((f.norm_weight != nullptr) == (grad_norm_weight && grad_norm_bias), m.op(),
        "grad_norm_weight and grad_norm_bias must be given with the norm");
  Gradients to{};
  to.norm_weight = m.vector("grad_norm_weight", grad_norm_weight);
  to.norm_bias = m.vector("grad_norm_bias", grad_norm_bias);
  to.fc1_bias = m.vector("grad_fc1_bias", grad_fc1_bias, f.hidden);
  to.fc2_bias = m.vector("grad_fc2_bias", grad_fc2_bias);
  if (op.of_parameters) {
    to.fc1 = weight_of(m, "grad_fc1_weight", *grad_fc1_weight, f.hidden, f.channels);
    to.fc2 = weight_of(m, "grad_fc2_weight", *grad_fc2_weight, f.channels, f.hidden);
  }
  const MlpKernels::Kernel& found = kernel(m.dtype());
  const int64_t size = compute_size(m.dtype()), weight_bytes = f.channels * f.hidden * size;
  const Scratch fc1_transposed(weight_bytes), fc2_transposed(weight_bytes);
  transpose(found, {fc1_transposed.get(), f.fc1_weight, nullptr, f.hidden, f.channels, f.channels});
  transpose(found, {fc2_transposed.get(), f.fc2_weight, f.scale, f.channels, f.hidden, f.hidden});
  op.fc1_transposed = fc1_transposed.get();
  op.fc2_transposed = fc2_transposed.get();

  const MlpSums at = found.sums(f, op.of_parameters);
  const int64_t panels = panels_of(f, found);
  const int64_t parts = std::max<int64_t>(1, std::min(sizes().mlp_parts, panels));
  const Scratch sums(parts * at.values * size);
  advise_huge_pages(sums.get(), parts * at.values * size);
  const int64_t work = 5 * f.rows * f.channels * f.hidden;
  for_units(parts, grain_of(parts, work, sizes().depthwise_grain), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * panels / parts, last = (part + 1) * panels / parts;
      const Scratch scratch(found.backward_bytes(f, last - first));
      char* const mine = static_cast<char*>(sums.get()) + part * at.values * size;
      found.backward(op, first, last, mine, scratch.get());
    }
  });
  if (m.dtype() == kFloat64)
    add_parts(to, static_cast<double*>(sums.get()), at, parts, f);
  else
    add_parts(to, static_cast<float*>(sums.get()), at, parts, f);
  if (op.of_parameters)
    transpose(found, {to.fc2, static_cast<const char*>(sums.get()) + at.fc2 * size, nullptr,
                      f.hidden, f.channels, at.stride});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("mlp_into", TORCH_BOX(&mlp_into));
  m.impl("mlp_backward_into", TORCH_BOX(&mlp_backward_into));
}

}  // namespace fastfuse
