// Host functions of depthwise_conv2d: checks, tiles, threads, choice of vector body.

#include "cpu/depthwise_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "depthwise_conv2d";

const DepthwiseKernels& kernels(Dtype dtype) { return depthwise_kernels_of(isa_of(dtype)); }

// Depends on shapes alone, and never on the number of threads: so do the sums' orders.
DepthwiseTiles tiles_of(const Tensor& x, int64_t kernel_size, int64_t dilation, int64_t lanes,
                        Dtype dtype, bool channels_last) {
  constexpr int64_t kCacheLine = 64;
  constexpr int64_t kUnits = 64;   // enough to be even for many threads
  constexpr int64_t kMinRows = 8;  // of a tile, against reading borders twice
  DepthwiseTiles t{};
  t.batch = x.size(0);
  t.channels = x.size(1);
  t.height = x.size(2);
  t.width = x.size(3);
  t.kernel_size = kernel_size;
  t.dilation = dilation;
  // Two vectors where they are within a cache line of channels_last memory.
  const bool narrow = dtype == kBFloat16 || dtype == kFloat16;
  const int64_t pair_bytes = 2 * lanes * (narrow ? 2 : compute_size(dtype));
  const bool pair = channels_last && pair_bytes <= kCacheLine && t.channels > lanes;
  t.group_channels = pair ? 2 * lanes : lanes;
  t.groups = ceil_div(t.channels, t.group_channels);
  t.phases = std::min(dilation, t.height);

  const int64_t reach = kernel_size / 2 * dilation;
  const int64_t fitting =
      sizes().depthwise_ring_bytes / (kernel_size * t.group_channels * compute_size(dtype)) -
      2 * reach;
  t.column_unit = lanes;  // whole cache lines of a contiguous image
  const int64_t columns = ceil_div(t.width, t.column_unit);
  t.column_tiles = std::clamp<int64_t>(ceil_div(t.width, std::max(fitting, lanes)), 1, columns);
  // The last tile may lack all but one column of its last unit.
  const auto narrowest = [&] { return (columns / t.column_tiles - 1) * t.column_unit + 1; };
  while (t.column_tiles > 1 && narrowest() < reach) --t.column_tiles;
  const int64_t units = t.batch * t.groups * t.phases * t.column_tiles;
  const int64_t rows = ceil_div(t.height, dilation);
  t.row_tiles = std::clamp<int64_t>(ceil_div(kUnits, std::max<int64_t>(units, 1)), 1,
                                    std::max<int64_t>(rows / kMinRows, 1));
  return t;
}

void check_arguments(const Tensor& x, int64_t kernel_size, int64_t dilation) {
  check_image(kOp, "x", x);
  check_kernel_size(kOp, kernel_size);
  check_at_least(kOp, "dilation", 1, dilation, 1 << 15);
  if (x.numel() > 0) check_axes(kOp, "x", x.size(2), x.size(3));
}

// Of units that share so many multiply-adds.
int64_t depthwise_grain(int64_t units, int64_t work) {
  return grain_of(units, work, sizes().depthwise_grain);
}

bool same_shape(const Tensor& a, const Tensor& b) {
  for (int dim = 0; dim < 4; ++dim)
    if (a.size(dim) != b.size(dim)) return false;
  return true;
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> addend,
               int64_t dilation, bool flip, bool channels_last) {
  check_image(kOp, "weight", weight);
  const int64_t k = weight.size(2);
  check_arguments(x, k, dilation);
  const Dtype dtype = dtype_of(kOp, "x", x);
  check(weight.size(0) == x.size(1) && weight.size(1) == 1 && weight.size(3) == k &&
            weight.scalar_type() == x.scalar_type(),
        kOp, "weight must have shape (C, 1, k, k) and x's dtype");
  check(!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == x.size(1) &&
                  bias->scalar_type() == x.scalar_type()),
        kOp, "bias must have shape (C,) and x's dtype");
  if (addend) {
    check_image(kOp, "addend", *addend);
    check(same_shape(*addend, x) && addend->scalar_type() == x.scalar_type(), kOp,
          "addend must have x's shape and dtype");
    addend = with_unit_stride(*addend, channels_last);
  }
  Tensor out = empty_output({x.size(0), x.size(1), x.size(2), x.size(3)}, x, channels_last);
  if (out.numel() == 0) return out;
  x = with_unit_stride(x, channels_last);
  weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);

  const DepthwiseKernels::Kernel& kernel = kernels(dtype).kernels[dtype];
  DepthwiseForward op{};
  op.tiles = tiles_of(x, k, dilation, kernel.lanes, dtype, channels_last);
  op.x = image(x);
  op.out = image(out);
  if (addend) op.addend = image(*addend);
  op.weight = weight.const_data_ptr();
  op.bias = bias ? bias->const_data_ptr() : nullptr;
  op.flip = flip;
  const int64_t units = op.tiles.groups * op.tiles.tiles();
  for_units(units, depthwise_grain(units, x.numel() * k * k), kernel.scratch(op.tiles),
            [&](int64_t begin, int64_t end, void* scratch) {
              kernel.forward[channels_last](op, begin, end, scratch);
            });
  return out;
}

std::tuple<Tensor, Tensor> backward_weight(Tensor grad_output, Tensor x, int64_t kernel_size,
                                           int64_t dilation) {
  check_arguments(x, kernel_size, dilation);
  check_image(kOp, "grad_output", grad_output);
  check(same_shape(grad_output, x) && grad_output.scalar_type() == x.scalar_type(), kOp,
        "grad_output must have x's shape and dtype");
  const Dtype dtype = dtype_of(kOp, "x", x);
  const int64_t channels = x.size(1);
  Tensor grad_weight = empty_output({channels, 1, kernel_size, kernel_size}, x, false);
  Tensor grad_bias = torch::stable::new_empty(x, {channels});
  if (channels == 0) return {grad_weight, grad_bias};
  if (x.numel() == 0) return {torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};

  const bool channels_last = has_unit_stride(x, true) && has_unit_stride(grad_output, true);
  x = with_unit_stride(x, channels_last);
  grad_output = with_unit_stride(grad_output, channels_last);
  const DepthwiseKernels::Kernel& kernel = kernels(dtype).kernels[dtype];
  DepthwiseWeightGradient op{};
  op.tiles = tiles_of(x, kernel_size, dilation, kernel.lanes, dtype, channels_last);
  op.x = image(x);
  op.grad_output = image(grad_output);
  constexpr int64_t kUnits = 64;
  op.parts = std::min(ceil_div(kUnits, op.tiles.groups), op.tiles.tiles());
  const int64_t units = op.tiles.groups * op.parts;
  const Scratch sums(units * (kernel_size * kernel_size + 1) * op.tiles.group_channels *
                     compute_size(dtype));
  op.sums = sums.get();
  op.grad_weight = grad_weight.data_ptr();
  op.grad_bias = grad_bias.data_ptr();
  const int64_t taps = kernel_size * kernel_size;
  for_units(units, depthwise_grain(units, x.numel() * taps), kernel.scratch(op.tiles),
            [&](int64_t begin, int64_t end, void* scratch) {
              kernel.sum[channels_last](op, begin, end, scratch);
            });
  for_units(op.tiles.groups, depthwise_grain(op.tiles.groups, op.parts * channels * taps),
            [&](int64_t begin, int64_t end) { kernel.reduce(op, begin, end); });
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&forward));
  m.impl("depthwise_conv2d_backward_weight", TORCH_BOX(&backward_weight));
}

}  // namespace fastfuse
