// Host functions of upsample_cross_entropy: checks, tables, threads, choice of vector body.

#include "cpu/upsample_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/logits_host.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "upsample_cross_entropy";

const UpsampleCrossEntropyKernels::Kernel& kernel(Dtype dtype) {
  return upsample_cross_entropy_kernels_of(isa_of(dtype)).kernels[dtype];
}

// Targets and weights, whose memory must outlive the work.
struct Labels {
  Labels(const Tensor& logits, const Tensor& given, const std::optional<Tensor>& given_weight) {
    check(given.is_cpu() && given.dim() == 3 && given.scalar_type() == ScalarType::Long &&
              given.size(0) == logits.size(0),
          kOp, "target must be an int64 CPU tensor (N, H, W)");
    target = torch::stable::contiguous(given);
    if (!given_weight) return;
    check(given_weight->is_cpu() && given_weight->dim() == 1 &&
              given_weight->size(0) == logits.size(1) &&
              given_weight->scalar_type() == compute_type(logits),
          kOp, "weight must be a CPU tensor (C,) in the accumulation dtype");
    weight = torch::stable::contiguous(*given_weight);
  }

  template <class A>
  double sum(int64_t classes) const {
    double total = 0;
    for (int64_t c = 0; c < classes; ++c)
      total += weight ? static_cast<const A*>(weight->data_ptr())[c] : A(1);
    return total;
  }

  void describe(CrossEntropy& work, const LogitsOf& logits, int64_t ignore_index,
                double smoothing) const {
    work.logits = logits.view;
    work.target = static_cast<const int64_t*>(target.data_ptr());
    work.weight = weight ? weight->data_ptr() : nullptr;
    work.ignore_index = ignore_index;
    work.smoothing = smoothing;
    const int64_t classes = logits.view.classes;
    work.total_weight = logits.dtype == kFloat64 ? sum<double>(classes) : sum<float>(classes);
  }

  Tensor target;
  std::optional<Tensor> weight;
};

std::tuple<Tensor, Tensor> forward(Tensor given, Tensor target, std::optional<Tensor> weight,
                                   int64_t ignore_index, double smoothing, bool align_corners) {
  check_image(kOp, "logits", given);
  const Labels labels(given, target, weight);
  const int64_t height = target.size(1), width = target.size(2);
  Tensor loss = pixels(kOp, given, height, width, compute_type(given));
  Tensor logsumexp = pixels(kOp, given, height, width, compute_type(given));
  if (loss.numel() == 0) return {loss, logsumexp};
  const LogitsOf logits(kOp, given, height, width, align_corners);
  CrossEntropyForward work{};
  labels.describe(work, logits, ignore_index, smoothing);
  work.loss = loss.data_ptr();
  work.logsumexp = logsumexp.data_ptr();
  const UpsampleCrossEntropyKernels::Kernel& chosen = kernel(logits.dtype);
  const int64_t bytes = chosen.forward_scratch(work.logits) * compute_size(logits.dtype);
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_wrong{kNone};
  logits.for_target_rows(bytes, [&](int64_t begin, int64_t end, void* scratch) {
    const int64_t wrong = chosen.forward(work, begin, end, scratch);
    if (wrong < 0) return;
    int64_t known = first_wrong.load();
    while (wrong < known && !first_wrong.compare_exchange_weak(known, wrong)) {
    }
  });
  const int64_t wrong = first_wrong.load();
  if (wrong != kNone)
    check(false, kOp, "target must be classes from 0 to ", given.size(1) - 1,
          " or ignore_index = ", ignore_index, "; got ", work.target[wrong], " at [",
          wrong / (height * width), ", ", wrong / width % height, ", ", wrong % width, "]");
  return {loss, logsumexp};
}

Tensor backward(Tensor grad, Tensor given, Tensor target, std::optional<Tensor> weight,
                Tensor logsumexp, int64_t ignore_index, double smoothing, bool align_corners,
                bool channels_last) {
  check_image(kOp, "logits", given);
  const Labels labels(given, target, weight);
  for (const auto& [argument, tensor] :
       {std::pair{"grad", &grad}, std::pair{"logsumexp", &logsumexp}})
    check(tensor->is_cpu() && tensor->dim() == 3 && tensor->size(0) == target.size(0) &&
              tensor->size(1) == target.size(1) && tensor->size(2) == target.size(2) &&
              tensor->scalar_type() == compute_type(given),
          kOp, argument, " must have target's shape and the accumulation dtype");
  Tensor gradient = empty_output({given.size(0), given.size(1), given.size(2), given.size(3)},
                                 given, channels_last);
  if (gradient.numel() == 0) return gradient;
  if (target.numel() == 0) return torch::stable::fill_(gradient, 0.0);
  const LogitsOf logits(kOp, given, target.size(1), target.size(2), align_corners);
  const Tensor sums = torch::stable::contiguous(logsumexp);
  CrossEntropyBackward work{};
  labels.describe(work, logits, ignore_index, smoothing);
  work.logsumexp = sums.data_ptr();
  work.grad = grad.data_ptr();
  work.stride_n = grad.stride(0);
  work.stride_h = grad.stride(1);
  work.stride_w = grad.stride(2);
  work.gradient = image(gradient);
  work.channels_last = channels_last;
  const UpsampleCrossEntropyKernels::Kernel& chosen = kernel(logits.dtype);
  const int64_t bytes = chosen.backward_scratch(work.logits) * compute_size(logits.dtype);
  const int64_t rows = work.logits.batch * work.logits.y.in;
  const int64_t values = std::max<int64_t>(1, target.numel() / rows) * work.logits.classes;
  for_units(rows, grain_of(values), bytes, [&](int64_t begin, int64_t end, void* scratch) {
    chosen.backward(work, begin, end, scratch);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&forward));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&backward));
}

}  // namespace fastfuse
