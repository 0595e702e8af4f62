// Host functions of upsample_equalize_concat: checks, tables, threads, choice of vector body.

#include "cpu/upsample_equalize_concat.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "upsample_equalize_concat";

const UpsampleEqualizeConcatKernels& kernels(Dtype dtype) {
  return upsample_equalize_concat_kernels_of(isa_of(dtype));
}

// One value per level, from an optional float32 or float64 tensor.
std::vector<double> per_level(const std::optional<Tensor>& values, const char* argument,
                              size_t num_levels, double otherwise) {
  std::vector<double> result(num_levels, otherwise);
  if (!values) return result;
  check(
      values->is_cpu() && values->dim() == 1 && values->size(0) == static_cast<int64_t>(num_levels),
      kOp, argument, " must be a 1-D CPU tensor of ", num_levels, " values");
  const auto read = [&](const auto* data) {
    for (size_t i = 0; i < num_levels; ++i) result[i] = data[i * values->stride(0)];
  };
  if (values->scalar_type() == ScalarType::Double) {
    read(values->const_data_ptr<double>());
  } else {
    check(values->scalar_type() == ScalarType::Float, kOp, argument, " must be float32 or float64");
    read(values->const_data_ptr<float>());
  }
  return result;
}

// Every thread does the same share of every level, so that the work is even whatever the levels.
void run(const UpsampleEqualizeConcatKernel& kernel, const std::vector<EqualizedLevel>& levels,
         Dtype dtype) {
  constexpr int64_t kMaxShares = 4096;
  constexpr int64_t kTurn = 16;  // shares of one level before the next level's turn: with
                                 // channels_last all levels write to (or read from) the same pages
  int64_t elements = 0, scratch = 0;
  for (const EqualizedLevel& level : levels) {
    elements += level.batch * level.channels * level.target.height * level.target.width;
    scratch = std::max(scratch, kernel.scratch(level));
  }
  const int64_t shares = std::clamp<int64_t>(elements / sizes().grain, 1, kMaxShares);
  const auto body = [&](int64_t begin, int64_t end, void* memory) {
    for (int64_t first = begin; first < end; first += kTurn) {
      const int64_t last = std::min(first + kTurn, end);
      for (const EqualizedLevel& level : levels) {
        const auto unit = [&, units = kernel.units(level)](int64_t share) {
          return units / shares * share + units % shares * share / shares;
        };
        kernel.body(level, unit(first), unit(last), memory);
      }
    }
  };
  for_units(shares, 1, scratch * compute_size(dtype), body);
}

Tensor forward(std::vector<Tensor> features, int64_t height, int64_t width,
               std::optional<Tensor> mean, std::optional<Tensor> std, bool align_corners,
               bool channels_last) {
  check(!features.empty(), kOp, "features must not be empty");
  check_axes(kOp, "size", height, width);
  const Dtype dtype = dtype_of(kOp, "features", features[0]);
  const std::vector<double> means = per_level(mean, "mean", features.size(), 0.0);
  const std::vector<double> stds = per_level(std, "std", features.size(), 1.0);

  check_image(kOp, "features", features[0]);
  const int64_t batch = features[0].size(0);
  int64_t channels = 0;
  for (Tensor& feature : features) {
    check_image(kOp, "features", feature);
    check(feature.size(0) == batch, kOp, "features must share N");
    check(feature.scalar_type() == features[0].scalar_type(), kOp, "features must share a dtype");
    check_axes(kOp, "features", feature.size(2), feature.size(3));
    feature = with_unit_stride(feature, channels_last);
    channels += feature.size(1);
  }
  Tensor output = empty_output({batch, channels, height, width}, features[0], channels_last);
  if (output.numel() == 0) return output;

  Tables tables(dtype);
  std::vector<EqualizedLevel> levels;
  int64_t offset = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    EqualizedLevel level{};
    level.batch = batch;
    level.channels = features[i].size(1);
    level.source = image(features[i]);
    level.target = channels_from(image(output), offset, output.element_size());
    level.mean = means[i];
    level.inverse_std = 1.0 / stds[i];
    level.stream = worth_streaming(level.target, level.channels, bytes_of(output),
                                   output.element_size(), channels_last);
    level.y = tables.axis(level.source.height, height, align_corners);
    level.x = tables.axis(level.source.width, width, align_corners);
    offset += level.channels;
    if (level.channels > 0) levels.push_back(level);
  }
  run(kernels(dtype).forward[channels_last][dtype], levels, dtype);
  return output;
}

// The gradients of the levels whose channels start at `offsets` in grad_output.
std::vector<Tensor> backward(Tensor grad_output, std::vector<int64_t> offsets,
                             std::vector<int64_t> channels, std::vector<int64_t> heights,
                             std::vector<int64_t> widths, std::optional<Tensor> std,
                             bool align_corners, bool channels_last) {
  check_image(kOp, "grad_output", grad_output);
  const size_t num_levels = offsets.size();
  check(
      channels.size() == num_levels && heights.size() == num_levels && widths.size() == num_levels,
      kOp, "offsets, channels, heights and widths must have one entry per level");
  const Dtype dtype = dtype_of(kOp, "grad_output", grad_output);
  const std::vector<double> stds = per_level(std, "std", num_levels, 1.0);
  const int64_t batch = grad_output.size(0);
  const int64_t height = grad_output.size(2), width = grad_output.size(3);
  check_axes(kOp, "grad_output", height, width);
  grad_output = with_unit_stride(grad_output, channels_last);

  Tables tables(dtype);
  std::vector<Tensor> gradients;
  std::vector<EqualizedLevel> levels;
  for (size_t i = 0; i < num_levels; ++i) {
    check(offsets[i] >= 0 && channels[i] >= 0 && offsets[i] + channels[i] <= grad_output.size(1),
          kOp, "grad_output must have the levels' channels");
    check_axes(kOp, "heights and widths", heights[i], widths[i]);
    gradients.push_back(
        empty_output({batch, channels[i], heights[i], widths[i]}, grad_output, channels_last));
    if (gradients[i].numel() == 0) continue;
    EqualizedLevel level{};
    level.batch = batch;
    level.channels = channels[i];
    level.source = image(gradients[i]);
    level.target = channels_from(image(grad_output), offsets[i], grad_output.element_size());
    level.inverse_std = 1.0 / stds[i];
    level.stream = worth_streaming(level.source, level.channels, bytes_of(gradients[i]),
                                   gradients[i].element_size(), channels_last);
    level.adjoint_y = tables.adjoint_axis(heights[i], height, align_corners);
    if (channels_last)  // walks along the target
      level.x = tables.axis(widths[i], width, align_corners);
    else
      level.adjoint_x = tables.adjoint_axis(widths[i], width, align_corners);
    levels.push_back(level);
  }
  run(kernels(dtype).backward[channels_last][dtype], levels, dtype);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("upsample_equalize_concat", TORCH_BOX(&forward));
  m.impl("upsample_equalize_concat_backward", TORCH_BOX(&backward));
}

}  // namespace fastfuse
