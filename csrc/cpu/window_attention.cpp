// Host functions of window_attention: checks, sums of blocks, threads, choice of vector body.

#include "cpu/window_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int64_t kMaxTokens = int64_t{1} << 24;  // of a window
constexpr int64_t kBlocks = 16;                   // of windows, whose sums are apart, at most

const WindowAttentionKernels::Kernel& kernel(Dtype dtype) {
  return window_attention_kernels_of(isa_of(dtype)).kernels[dtype];
}

// The arguments, checked.
struct Call {
  Dtype dtype;
  WindowAttention op{};
  std::vector<AttentionWindows> branches;
  std::optional<Scratch> bias;  // of whole vectors

  Call(const Tensor& qkv, const std::optional<Tensor>& qkv_bias, const std::optional<Tensor>& table,
       const std::optional<Tensor>& local_weight, const std::optional<Tensor>& local_bias,
       int64_t heads, const std::vector<int64_t>& windows, int64_t shift, bool centered) {
    check(qkv.is_cpu() && qkv.dim() == 4 && qkv.is_contiguous(), kOp,
          "qkv must be a contiguous CPU tensor (N, H, W, 3 C)");
    dtype = dtype_of(kOp, "qkv", qkv);
    op.batch = qkv.size(0);
    op.height = qkv.size(1);
    op.width = qkv.size(2);
    op.channels = qkv.size(3) / 3;
    op.qkv = qkv.data_ptr();
    op.shift = shift;
    check_axes(kOp, "qkv", op.height, op.width);
    const int64_t number = static_cast<int64_t>(windows.size()) / 2;
    check(number >= 1 && windows.size() % 2 == 0, kOp, "windows must be pairs of sizes");
    check_at_least(kOp, "heads", 1, heads);
    check(shift == 0 || !centered, kOp, "shift must be 0 where padding is on all sides");
    check(qkv.size(3) % 3 == 0 && op.channels % heads == 0 && heads % number == 0, kOp,
          "heads must divide the channels of queries, and windows the heads");
    op.head_size = op.channels / heads;
    for (int64_t i = 0; i < number; ++i) {
      AttentionWindows branch{};
      branch.window_height = size_of(windows[2 * i], op.height);
      branch.window_width = size_of(windows[2 * i + 1], op.width);
      check(branch.tokens() <= kMaxTokens, kOp, "windows must have at most 2^24 tokens");
      check_at_least(kOp, "shift", 0, shift, std::min(branch.window_height, branch.window_width));
      branch.height = round_up(op.height, branch.window_height);
      branch.width = round_up(op.width, branch.window_width);
      branch.top = first(branch.height, op.height, shift, centered);
      branch.left = first(branch.width, op.width, shift, centered);
      branch.heads = heads / number;
      branch.first_head = i * branch.heads;
      branches.push_back(branch);
    }
    op.qkv_bias = data(qkv_bias, "qkv_bias", {3 * op.channels});
    op.pads_with_bias = !centered;
    op.local_weight = data(local_weight, "local_weight", {9, op.channels});
    op.local_bias = data(local_bias, "local_bias", {op.channels});
    check(!local_bias || local_weight, kOp, "local_bias must come with a local_weight");
    if (!table) return;
    const int64_t tokens = branches[0].tokens();
    check(number == 1, kOp, "bias must come with windows of one shape");
    const auto* from = static_cast<const char*>(data(table, "bias", {heads, tokens, tokens}));
    const int64_t row = tokens * compute_size(dtype), to_row = stride() * compute_size(dtype);
    bias.emplace(heads * tokens * to_row);
    auto* to = static_cast<char*>(bias->get());
    for (int64_t i = 0; i < heads * tokens; ++i, from += row, to += to_row) {
      std::memcpy(to, from, row);
      std::memset(to + row, 0, to_row - row);
    }
    op.bias = bias->get();
  }

  // Of rows of logits.
  int64_t stride() const { return round_up(branches[0].tokens(), kernel(dtype).lanes); }

 private:
  static int64_t size_of(int64_t size, int64_t extent) {
    check_at_least(kOp, "windows", 0, size, int64_t{1} << 31);
    return size ? size : extent;
  }
  static int64_t first(int64_t padded, int64_t size, int64_t shift, bool centered) {
    return centered ? (padded - (padded - size) / 2) % padded : shift;
  }
  const void* data(const std::optional<Tensor>& tensor, const char* argument,
                   std::vector<int64_t> sizes) const {
    if (!tensor) return nullptr;
    bool fits = tensor->is_cpu() && tensor->is_contiguous() &&
                tensor->scalar_type() == compute_type(dtype) &&
                tensor->dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i)
      fits = tensor->size(static_cast<int64_t>(i)) == sizes[i];
    check(fits, kOp, argument,
          " must be a contiguous CPU tensor of the right size in the accumulation dtype");
    return tensor->data_ptr();
  }
};

Tensor forward(Tensor qkv, std::optional<Tensor> qkv_bias, std::optional<Tensor> bias,
               std::optional<Tensor> local_weight, std::optional<Tensor> local_bias, int64_t heads,
               std::vector<int64_t> windows, int64_t shift, bool centered) {
  Call call(qkv, qkv_bias, bias, local_weight, local_bias, heads, windows, shift, centered);
  WindowAttention& op = call.op;
  Tensor out = torch::stable::new_empty(qkv, {op.batch, op.height, op.width, op.channels});
  advise_huge_pages(out.data_ptr(), bytes_of(out));
  op.out = out.data_ptr();
  if (out.numel() == 0) return out;
  const WindowAttentionKernels::Kernel& body = kernel(call.dtype);
  for (const AttentionWindows& branch : call.branches) {
    op.in = branch;
    const int64_t tokens = branch.tokens(), parts = ceil_div(tokens, kQueriesOfUnit);
    for_units(
        op.batch * branch.windows() * branch.heads * parts,
        grain_of(std::min(tokens, kQueriesOfUnit) * tokens), body.scratch(op),
        [&](int64_t begin, int64_t end, void* scratch) { body.forward(op, begin, end, scratch); });
  }
  return out;
}

// Adds the sums of all blocks, in order: those of this branch's heads.
template <class A>
void add_sums(const WindowAttentionBackward& all, int64_t stride, A* bias, A* qkv_bias, A* local) {
  const WindowAttention& op = all.forward;
  const int64_t tokens = op.in.tokens(), first = op.in.first_head * op.head_size;
  const int64_t channels = op.in.heads * op.head_size;
  const A* sums = static_cast<const A*>(all.sums);
  for (int64_t block = 0; block < all.blocks; ++block) {
    for (int64_t row = 0; bias && row < op.in.heads * tokens; ++row)
      for (int64_t t = 0; t < tokens; ++t) bias[row * tokens + t] += sums[row * stride + t];
    sums += op.sums_of_bias(stride);
    const auto add = [&](A* total, int64_t rows) {
      if (!total) return;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < channels; ++c)
          total[row * op.channels + first + c] += sums[row * op.channels + first + c];
      sums += rows * op.channels;
    };
    add(qkv_bias, 3);
    add(local, 10);
  }
}

// The gradients of qkv, and of qkv_bias, bias, local_weight and local_bias, (10, C), in the
// accumulation dtype; empty where there is none.
std::vector<Tensor> backward(Tensor grad, Tensor qkv, std::optional<Tensor> qkv_bias,
                             std::optional<Tensor> bias, std::optional<Tensor> local_weight,
                             int64_t heads, std::vector<int64_t> windows, int64_t shift,
                             bool centered) {
  Call call(qkv, qkv_bias, bias, local_weight, std::nullopt, heads, windows, shift, centered);
  WindowAttentionBackward all{};
  all.forward = call.op;
  WindowAttention& op = all.forward;
  check(grad.is_cpu() && grad.dim() == 4 && grad.is_contiguous() && grad.size(0) == op.batch &&
            grad.size(1) == op.height && grad.size(2) == op.width && grad.size(3) == op.channels &&
            dtype_of(kOp, "grad", grad) == call.dtype,
        kOp, "grad must be a contiguous CPU tensor (N, H, W, C) in qkv's dtype");
  Tensor grad_qkv = torch::stable::new_empty(qkv, {op.batch, op.height, op.width, 3 * op.channels});
  advise_huge_pages(grad_qkv.data_ptr(), bytes_of(grad_qkv));
  const auto zeros = [&](bool there, std::vector<int64_t> sizes) {
    if (!there) sizes = {0};
    Tensor sums =
        torch::stable::new_empty(qkv, sizes, std::make_optional(compute_type(call.dtype)));
    return torch::stable::zero_(sums);
  };
  const int64_t tokens = call.branches[0].tokens();
  Tensor grad_qkv_bias = zeros(qkv_bias.has_value(), {3 * op.channels});
  Tensor grad_bias = zeros(bias.has_value(), {heads, tokens, tokens});
  Tensor grad_local = zeros(local_weight.has_value(), {10, op.channels});
  all.grad = grad.data_ptr();
  all.grad_qkv = grad_qkv.data_ptr();
  const WindowAttentionKernels::Kernel& body = kernel(call.dtype);
  for (const AttentionWindows& branch : call.branches) {
    if (grad.numel() == 0) break;
    op.in = branch;
    const int64_t count = op.batch * branch.windows();
    const int64_t stride = round_up(branch.tokens(), body.lanes);
    all.blocks = std::min(count, kBlocks);
    const Scratch sums(all.blocks * op.sums(stride) * compute_size(call.dtype));
    all.sums = sums.get();
    for_units(all.blocks * branch.heads, 1, body.backward_scratch(op),
              [&](int64_t begin, int64_t end, void* scratch) {
                body.backward(all, begin, end, scratch);
              });
    const auto add = [&](auto zero) {
      using A = decltype(zero);
      const auto to = [](const auto& there, Tensor& total) {
        return there ? static_cast<A*>(total.data_ptr()) : nullptr;
      };
      add_sums<A>(all, stride, to(bias, grad_bias), to(qkv_bias, grad_qkv_bias),
                  to(local_weight, grad_local));
    };
    if (call.dtype == kFloat64)
      add(0.0);
    else
      add(0.0f);
  }
  return {grad_qkv, grad_qkv_bias, grad_bias, grad_local};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&forward));
  m.impl("window_attention_backward", TORCH_BOX(&backward));
}

}  // namespace fastfuse
