// Host functions of tap_sum: checks, tables, threads, choice of vector body.

#include "cpu/tap_sum.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "tap_sum";

const TapSumKernels& kernels(Dtype dtype) { return tap_sum_kernels_of(isa_of(dtype)); }

// The upsampled map and how a kernel walks over it.
struct Geometry {
  int64_t height, width, kernel_size, padding;
  bool align_corners;
  int64_t out_height() const { return height + 2 * padding - (kernel_size - 1); }
  int64_t out_width() const { return width + 2 * padding - (kernel_size - 1); }

  void check_them() const {
    check_axes(kOp, "size", height, width);
    check_kernel_size(kOp, kernel_size);
    check_at_least(kOp, "padding", 0, padding, 1 << 30);
    check_axes(kOp, "output", out_height(), out_width());
  }
};

// The entries of a TapTable.
template <class A>
struct TapEntries {
  std::vector<int32_t> begin{0};
  std::vector<int64_t> offset;
  std::vector<A> weight;

  void add(int results, int64_t at, int result, A w) {
    if (w == 0) return;
    size_t e = static_cast<size_t>(begin.back());
    while (e < offset.size() && offset[e] != at) ++e;
    if (e == offset.size()) {
      offset.push_back(at);
      weight.insert(weight.end(), results, A(0));
    }
    weight[e * results + result] += w;
  }

  void end_group() {
    check(offset.size() < (size_t{1} << 31), kOp, "size and kernel_size are too large");
    begin.push_back(static_cast<int32_t>(offset.size()));
  }

  // For groups of outputs: what they read of taps and sources, which are strides apart.
  TapEntries(int results, const Sampling& axis, const Geometry& g, int64_t out_size,
             int64_t tap_stride, int64_t source_stride, double scale) {
    const A* upper_weight = static_cast<const A*>(axis.weight);
    for (int64_t q = 0; q < out_size; ++q) {
      const int result = static_cast<int>(q % results);
      for (int64_t tap = 0; tap < g.kernel_size; ++tap) {
        const int64_t u = q + tap - g.padding;
        if (u < 0 || u >= axis.out) continue;
        const A w = axis.lower[u] == axis.upper[u] ? A(0) : upper_weight[u];
        const auto at = [&](int64_t source) { return tap * tap_stride + source * source_stride; };
        add(results, at(axis.lower[u]), result, static_cast<A>((A(1) - w) * scale));
        add(results, at(axis.upper[u]), result, static_cast<A>(w * scale));
      }
      if (result == results - 1 || q == out_size - 1) end_group();
    }
  }

  // For every source, in groups of its taps: the outputs, which are a stride apart, that read them.
  TapEntries(int results, const AdjointSampling& axis, const Geometry& g, int64_t out_size,
             int64_t out_stride) {
    const A* weights = static_cast<const A*>(axis.weight);
    for (int64_t s = 0; s < axis.in; ++s)
      for (int64_t tap = 0; tap < g.kernel_size; tap += results) {
        for (int64_t q = axis.first[s] - tap - results + 1 + g.padding;
             q < axis.first[s] + axis.count[s] - tap + g.padding; ++q)
          for (int result = 0; result < results && tap + result < g.kernel_size; ++result) {
            const int64_t i = q + tap + result - g.padding - axis.first[s];
            if (q >= 0 && q < out_size && i >= 0 && i < axis.count[s])
              add(results, q * out_stride, result, weights[axis.offset[s] + i]);
          }
        end_group();
      }
  }

  TapTable view() const { return {begin.data(), offset.data(), weight.data()}; }
};

struct EntryTables {
  std::deque<TapEntries<float>> entries32;
  std::deque<TapEntries<double>> entries64;

  template <class... Arguments>
  TapTable add(Dtype dtype, const Arguments&... arguments) {
    return dtype == kFloat64 ? entries64.emplace_back(arguments...).view()
                             : entries32.emplace_back(arguments...).view();
  }
};

template <class Op>
void run(const TapSumKernel<Op>& kernel, const Op& op, int64_t elements) {
  const int64_t units = kernel.units(op);
  if (units == 0 || elements == 0) return;
  for_units(
      units, grain_of(units, elements, sizes().grain), kernel.scratch(op),
      [&](int64_t begin, int64_t end, void* scratch) { kernel.body(op, begin, end, scratch); });
}

void describe(TapSum& op, const Tensor& out, const Geometry& g) {
  op.batch = out.size(0);
  op.channels = out.size(1);
  op.kernel_size = g.kernel_size;
  op.padding = g.padding;
  op.height = g.height;
  op.width = g.width;
  op.out = image(out);
  op.ring_bytes = sizes().ring_bytes;
}

void check_taps(const Tensor& taps, const Tensor& out, const Geometry& g) {
  check_image(kOp, "taps", taps);
  check(taps.scalar_type() == out.scalar_type(), kOp, "taps and output must share a dtype");
  check(taps.size(0) == out.size(0) && taps.size(1) == g.kernel_size * g.kernel_size * out.size(1),
        kOp, "taps must have the output's N and k * k times its channels");
  check_axes(kOp, "taps", taps.size(2), taps.size(3));
}

Taps taps_of(const Tensor& taps, int64_t channels, double scale) {
  return {image(taps), channels * taps.stride(1), scale};
}

// The values of an optional vector in the accumulation dtype, contiguous.
std::optional<Tensor> constants(const std::optional<Tensor>& values, const char* argument,
                                Dtype dtype, int64_t length) {
  if (!values) return values;
  check(values->is_cpu() && values->dim() == 1 && values->size(0) == length, kOp, argument,
        " must be a 1-D CPU tensor of ", length, " values");
  check(values->scalar_type() == compute_type(dtype), kOp, argument,
        " must be float64 for float64, else float32");
  return torch::stable::contiguous(*values);
}

double value_of(const std::optional<Tensor>& values, int64_t index) {
  if (!values) return 1;
  return values->scalar_type() == ScalarType::Double ? values->const_data_ptr<double>()[index]
                                                     : values->const_data_ptr<float>()[index];
}

const void* data_of(const std::optional<Tensor>& values) {
  return values ? values->const_data_ptr() : nullptr;
}

void sum_into(Tensor& out, std::vector<Tensor> taps, std::optional<Tensor> scales,
              std::optional<Tensor> offsets, std::optional<Tensor> bias, bool accumulate,
              const Geometry& g, bool channels_last, bool fresh) {
  g.check_them();
  check_image(kOp, "out", out);
  const Dtype dtype = dtype_of(kOp, "taps", out);
  check(out.size(2) == g.out_height() && out.size(3) == g.out_width(), kOp,
        "out must be of the size that size, kernel_size and padding give");
  check(has_unit_stride(out, channels_last), kOp, "out must have unit stride along its layout");
  const int64_t channels = out.size(1), k = g.kernel_size;
  scales = constants(scales, "scales", dtype, 1 + static_cast<int64_t>(taps.size()));
  offsets = constants(offsets, "offsets", dtype, k * k * channels);
  bias = constants(bias, "bias", dtype, channels);

  Tables tables(dtype);
  EntryTables entries;
  std::vector<TapSumLevel> levels;
  int64_t elements = out.numel();
  for (size_t i = 0; i < taps.size(); ++i) {
    check_taps(taps[i], out, g);
    taps[i] = with_unit_stride(taps[i], channels_last);
    TapSumLevel level{};
    level.taps = taps_of(taps[i], channels, value_of(scales, 1 + static_cast<int64_t>(i)));
    const auto& [image, stride, scale] = level.taps;
    const Sampling y = tables.axis(image.height, g.height, g.align_corners);
    const Sampling x = tables.axis(image.width, g.width, g.align_corners);
    level.first =
        channels_last
            ? entries.add(dtype, kColumnsAtOnce, x, g, g.out_width(), stride, image.stride_w, 1.0)
            : entries.add(dtype, 1, y, g, g.out_height(), k * stride, image.stride_h, scale);
    level.second = channels_last ? y : x;
    levels.push_back(level);
    elements += taps[i].numel();
  }
  TapSumForward op{};
  describe(op, out, g);
  op.levels = levels.data();
  op.num_levels = static_cast<int64_t>(levels.size());
  op.accumulate = accumulate;
  op.base_scale = value_of(scales, 0);
  op.offsets = data_of(offsets);
  op.bias = data_of(bias);
  op.stream =
      fresh && worth_streaming(op.out, channels, bytes_of(out), out.element_size(), channels_last);
  if (out.numel() > 0) run(kernels(dtype).forward[channels_last][dtype], op, elements);
}

void gather_into(Tensor& grad_taps, Tensor grad_output, const std::optional<Tensor>& scale,
                 const Geometry& g, bool channels_last, bool fresh) {
  g.check_them();
  check_image(kOp, "grad_output", grad_output);
  const Dtype dtype = dtype_of(kOp, "grad_output", grad_output);
  check(grad_output.size(2) == g.out_height() && grad_output.size(3) == g.out_width(), kOp,
        "grad_output must be of the size that size, kernel_size and padding give");
  check_taps(grad_taps, grad_output, g);
  check(has_unit_stride(grad_taps, channels_last), kOp,
        "grad_taps must have unit stride along its layout");
  const std::optional<Tensor> factor = constants(scale, "scale", dtype, 1);
  grad_output = with_unit_stride(grad_output, channels_last);

  Tables tables(dtype);
  EntryTables entries;
  TapSumBackward op{};
  describe(op, grad_output, g);
  op.taps = taps_of(grad_taps, op.channels, value_of(factor, 0));
  const Image& taps = op.taps.image;
  op.y = tables.adjoint_axis(taps.height, g.height, g.align_corners);
  op.x = tables.adjoint_axis(taps.width, g.width, g.align_corners);
  if (channels_last)
    op.columns = entries.add(dtype, kTapsAtOnce, op.x, g, g.out_width(), grad_output.stride(3));
  op.ring_rows = *std::max_element(op.y.count, op.y.count + taps.height) + g.kernel_size - 1;
  op.stream = fresh && worth_streaming(taps, op.channels, bytes_of(grad_taps),
                                       grad_taps.element_size(), channels_last);
  run(kernels(dtype).backward[channels_last][dtype], op, grad_taps.numel() + grad_output.numel());
}

Tensor forward(Tensor taps, std::optional<Tensor> offsets, int64_t height, int64_t width,
               int64_t kernel_size, int64_t padding, bool align_corners, bool channels_last) {
  const Geometry g{height, width, kernel_size, padding, align_corners};
  g.check_them();
  check_image(kOp, "taps", taps);
  const int64_t taps_per_channel = kernel_size * kernel_size;
  check(taps.size(1) % taps_per_channel == 0, kOp, "taps must have k * k * C channels; got ",
        taps.size(1));
  const Dtype dtype = dtype_of(kOp, "taps", taps);
  if (offsets && dtype != kFloat64) offsets = torch::stable::to(*offsets, ScalarType::Float);
  Tensor out =
      empty_output({taps.size(0), taps.size(1) / taps_per_channel, g.out_height(), g.out_width()},
                   taps, channels_last);
  sum_into(out, {taps}, std::nullopt, offsets, std::nullopt, false, g, channels_last, true);
  return out;
}

Tensor backward(Tensor grad_output, int64_t in_height, int64_t in_width, int64_t height,
                int64_t width, int64_t kernel_size, int64_t padding, bool align_corners,
                bool channels_last) {
  const Geometry g{height, width, kernel_size, padding, align_corners};
  g.check_them();
  check_image(kOp, "grad_output", grad_output);
  Tensor grad_taps = empty_output(
      {grad_output.size(0), kernel_size * kernel_size * grad_output.size(1), in_height, in_width},
      grad_output, channels_last);
  gather_into(grad_taps, grad_output, std::nullopt, g, channels_last, true);
  return grad_taps;
}

void forward_into(Tensor out, std::vector<Tensor> taps, std::optional<Tensor> scales,
                  std::optional<Tensor> offsets, std::optional<Tensor> bias, bool accumulate,
                  int64_t height, int64_t width, int64_t kernel_size, int64_t padding,
                  bool align_corners, bool channels_last) {
  sum_into(out, taps, scales, offsets, bias, accumulate,
           {height, width, kernel_size, padding, align_corners}, channels_last, false);
}

void backward_into(Tensor grad_taps, Tensor grad_output, std::optional<Tensor> scale,
                   int64_t height, int64_t width, int64_t kernel_size, int64_t padding,
                   bool align_corners, bool channels_last) {
  gather_into(grad_taps, grad_output, scale, {height, width, kernel_size, padding, align_corners},
              channels_last, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("tap_sum", TORCH_BOX(&forward));
  m.impl("tap_sum_backward", TORCH_BOX(&backward));
  m.impl("tap_sum_into", TORCH_BOX(&forward_into));
  m.impl("tap_sum_backward_into", TORCH_BOX(&backward_into));
}

}  // namespace fastfuse
