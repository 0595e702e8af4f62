// Host function of upsample_argmax: checks, tables, threads, choice of vector body.

#include "cpu/upsample_argmax.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/logits_host.h"

namespace fastfuse {
namespace {

const UpsampleArgmaxKernels::Kernel& kernel(Dtype dtype) {
  return upsample_argmax_kernels_of(isa_of(dtype)).kernels[dtype];
}

void run(const char* op, const Tensor& given, int64_t height, int64_t width, bool align_corners,
         const Tensor& labels, const Tensor* confidence) {
  if (labels.numel() == 0) return;
  const LogitsOf logits(op, given, height, width, align_corners);
  UpsampleArgmax work{};
  work.logits = logits.view;
  work.labels = static_cast<int64_t*>(labels.data_ptr());
  work.confidence = confidence ? confidence->data_ptr() : nullptr;
  const UpsampleArgmaxKernels::Kernel& chosen = kernel(logits.dtype);
  const int64_t bytes = chosen.scratch(work.logits) * compute_size(logits.dtype);
  logits.for_target_rows(bytes, [&](int64_t begin, int64_t end, void* scratch) {
    chosen.body(work, begin, end, scratch);
  });
}

Tensor labels(Tensor logits, int64_t height, int64_t width, bool align_corners) {
  constexpr const char* kOp = "upsample_argmax";
  Tensor found = pixels(kOp, logits, height, width, ScalarType::Long);
  run(kOp, logits, height, width, align_corners, found, nullptr);
  return found;
}

std::tuple<Tensor, Tensor> labels_and_confidence(Tensor logits, int64_t height, int64_t width,
                                                 bool align_corners) {
  constexpr const char* kOp = "upsample_argmax_confidence";
  Tensor found = pixels(kOp, logits, height, width, ScalarType::Long);
  Tensor confidence = pixels(kOp, logits, height, width, compute_type(logits));
  run(kOp, logits, height, width, align_corners, found, &confidence);
  return {found, confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&labels));
  m.impl("upsample_argmax_confidence", TORCH_BOX(&labels_and_confidence));
}

}  // namespace fastfuse
