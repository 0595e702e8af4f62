// Host function of upsample_add: checks, tables, threads, choice of vector body.

#include "cpu/upsample_add.h"

#include <torch/csrc/stable/library.h>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "upsample_add";

const UpsampleAddKernels& kernels(Dtype dtype) { return upsample_add_kernels_of(isa_of(dtype)); }

Tensor forward(Tensor x, Tensor skip, bool align_corners, bool channels_last) {
  check_image(kOp, "x", x);
  check_image(kOp, "skip", skip);
  check(x.size(0) == skip.size(0) && x.size(1) == skip.size(1), kOp, "x and skip must share N, C");
  check(x.scalar_type() == skip.scalar_type(), kOp, "x and skip must share a dtype");
  check_axes(kOp, "x", x.size(2), x.size(3));
  check_axes(kOp, "skip", skip.size(2), skip.size(3));
  const Dtype dtype = dtype_of(kOp, "x", x);
  x = with_unit_stride(x, channels_last);
  skip = with_unit_stride(skip, channels_last);
  const int64_t height = skip.size(2), width = skip.size(3);
  Tensor output = empty_output({x.size(0), x.size(1), height, width}, x, channels_last);
  if (output.numel() == 0) return output;

  Tables tables(dtype);
  UpsampleAdd work{};
  work.batch = x.size(0);
  work.channels = x.size(1);
  work.source = image(x);
  work.target = image(output);
  work.skip = image(skip);
  work.stream = worth_streaming(work.target, work.channels, bytes_of(output), output.element_size(),
                                channels_last);
  work.y = tables.axis(work.source.height, height, align_corners);
  work.x = tables.axis(work.source.width, width, align_corners);

  const UnitsKernel<UpsampleAdd>& kernel = kernels(dtype).forward[channels_last][dtype];
  const int64_t units = kernel.units(work);
  for_units(
      units, grain_of(output.numel() / units), kernel.scratch(work) * compute_size(dtype),
      [&](int64_t begin, int64_t end, void* scratch) { kernel.body(work, begin, end, scratch); });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) { m.impl("upsample_add", TORCH_BOX(&forward)); }

}  // namespace fastfuse
