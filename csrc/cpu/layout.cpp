// Host function of copy_layout: an image from contiguous to channels_last memory, or back.

#include "cpu/layout.h"

#include <torch/csrc/stable/library.h>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "copy_layout";

const LayoutKernels& kernels() { return layout_kernels_of(current_isa()); }

Tensor copy(Tensor image, bool channels_last) {
  check_image(kOp, "image", image);
  const Dtype dtype = dtype_of(kOp, "image", image);
  const int64_t channels = image.size(1), pixels = image.size(2) * image.size(3);
  // Dense in the other layout: dimensions of size one may have any stride.
  const auto dense = [&](std::initializer_list<int> order) {
    int64_t expected = 1;
    for (int dim : order) {
      if (image.size(dim) != 1 && image.stride(dim) != expected) return false;
      expected *= image.size(dim);
    }
    return true;
  };
  check(image.numel() == 0 || (channels_last ? dense({3, 2, 1, 0}) : dense({1, 3, 2, 0})), kOp,
        "image must be dense in the other layout");
  Tensor output =
      empty_output({image.size(0), channels, image.size(2), image.size(3)}, image, channels_last);
  if (image.numel() == 0) return output;

  LayoutCopy op{};
  op.from = image.const_data_ptr();
  op.to = output.data_ptr();
  op.images = image.size(0);
  op.rows = channels_last ? channels : pixels;
  op.columns = channels_last ? pixels : channels;
  const LayoutBody body = kernels().copy[dtype == kFloat64 ? 2 : dtype == kFloat32 ? 1 : 0];
  for_units(op.images * ceil_div(op.columns, kLayoutColumns), grain_of(op.rows * kLayoutColumns),
            [&](int64_t begin, int64_t end) { body(op, begin, end); });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) { m.impl("copy_layout", TORCH_BOX(&copy)); }

}  // namespace fastfuse
