// Host functions of Winograd's algorithm: checks, threads, choice of vector body.

#include "cpu/winograd.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "winograd";
constexpr const char* kTilesExpected =
    "tiles must be (36, tiles, channels) in the accumulation dtype, with unit stride";

const WinogradKernels& kernels(Dtype dtype) { return winograd_kernels_of(isa_of(dtype)); }

const WinogradKernels::Kernel& kernel(const Tensor& image) {
  const Dtype dtype = dtype_of(kOp, "image", image);
  return kernels(dtype).kernels[dtype];
}

struct Outputs {
  int64_t height, width;
};

// The matrices [tile][channel] of a transformed tile's elements.
struct Elements {
  int64_t count;  // of tiles
  int64_t channels, stride_tile;
  void* data[kWinogradElements];
};

Elements elements_of(const Tensor& tiles, ScalarType type) {
  check(tiles.is_cpu() && tiles.dim() == 3 && tiles.size(0) == kWinogradElements &&
            tiles.scalar_type() == type && tiles.stride(2) == 1,
        kOp, kTilesExpected);
  Elements found{tiles.size(1), tiles.size(2), tiles.stride(1), {}};
  const int64_t step = tiles.stride(0) * static_cast<int64_t>(tiles.element_size());
  for (int64_t i = 0; i < kWinogradElements; ++i)
    found.data[i] = static_cast<char*>(tiles.data_ptr()) + i * step;
  return found;
}

WinogradTaps taps_of(const Tensor& taps, int64_t outputs, int64_t inputs, ScalarType type,
                     bool flipped) {
  check(taps.is_cpu() && taps.dim() == 3 && taps.size(0) == 9 && taps.size(1) == outputs &&
            taps.size(2) == inputs && taps.scalar_type() == type,
        kOp, "taps must be (9, ", outputs, ", ", inputs, ") in the accumulation dtype");
  return {taps.data_ptr(), taps.stride(0), taps.stride(1), taps.stride(2), flipped};
}

void check_image_tensor(const Tensor& image) {
  check_image(kOp, "image", image);
  check(has_unit_stride(image, true), kOp, "image must be channels_last");
}

// The tiles of an image from `first` on, of those that make `outputs`.
Winograd describe(const Tensor& image_tensor, const Elements& elements, int64_t first,
                  Outputs outputs, int64_t padding) {
  Winograd w{};
  w.image = image(image_tensor);
  w.channels = image_tensor.size(1);
  w.tiles_y = ceil_div(outputs.height, kWinogradOutputs);
  w.tiles_x = ceil_div(outputs.width, kWinogradOutputs);
  w.padding = padding;
  w.first = first;
  check(first >= 0 && first + elements.count <= image_tensor.size(0) * w.tiles_y * w.tiles_x, kOp,
        "first and tiles must lie in the image");
  std::copy_n(elements.data, kWinogradElements, w.elements);
  w.stride_tile = elements.stride_tile;
  return w;
}

// `body` from an image to tiles.
void transform(WinogradBody body, const Tensor& image, const Tensor& tiles, int64_t first,
               Outputs outputs, int64_t padding) {
  const Elements elements = elements_of(tiles, compute_type(image));
  check(elements.channels == image.size(1), kOp, kTilesExpected);
  Winograd w = describe(image, elements, first, outputs, padding);
  if (elements.count == 0 || w.channels == 0) return;
  const int64_t bytes = w.channels * compute_size(dtype_of(kOp, "image", image));
  const Scratch zeros(bytes);
  std::memset(zeros.get(), 0, bytes);
  w.zeros = zeros.get();
  for_units(elements.count, grain_of(kWinogradElements * w.channels),
            [&](int64_t begin, int64_t end) { body(w, begin, end); });
}

void input(Tensor tiles, Tensor image, int64_t first, int64_t height, int64_t width,
           int64_t padding) {
  check_image_tensor(image);
  transform(kernel(image).input, image, tiles, first, {height, width}, padding);
}

void output_adjoint(Tensor tiles, Tensor image, int64_t first) {
  check_image_tensor(image);
  transform(kernel(image).output_adjoint, image, tiles, first, {image.size(2), image.size(3)}, 0);
}

// Multiply-adds of a unit, by which threads are woken: `values` of the grain each stand for a few.
constexpr int64_t kProductsPerValue = 8;

void product(Tensor image, Tensor tiles, Tensor taps, bool flipped, int64_t first,
             std::optional<Tensor> bias) {
  check_image_tensor(image);
  const ScalarType type = compute_type(image);
  const int64_t channels = image.size(1);
  check(!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == channels &&
                  bias->scalar_type() == type),
        kOp, "bias must have one value per channel, in the accumulation dtype");
  const Elements elements = elements_of(tiles, type);
  WinogradProduct op{};
  op.to = describe(image, elements, first, {image.size(2), image.size(3)}, 0);
  op.count = elements.count;
  op.inputs = elements.channels;
  op.taps = taps_of(taps, channels, op.inputs, type, flipped);
  check(op.inputs > 0, kOp, "tiles must have channels");
  if (op.count == 0 || channels == 0) return;
  const std::optional<Tensor> dense =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  op.to.bias = dense ? dense->const_data_ptr() : nullptr;
  const WinogradKernels::Kernel& found = kernel(image);
  const int64_t group = std::min(op.count, kWinogradGroup);
  const int64_t values = kWinogradElements * group * found.panel * op.inputs / kProductsPerValue;
  for_units(ceil_div(op.count, kWinogradGroup) * ceil_div(channels, found.panel), grain_of(values),
            found.product_bytes, [&](int64_t begin, int64_t end, void* scratch) {
              found.product(op, begin, end, scratch);
            });
}

void gradient(Tensor taps, Tensor tiles, Tensor gradients, bool add) {
  const Dtype dtype = dtype_of(kOp, "taps", taps);
  const ScalarType type = taps.scalar_type();
  check(dtype == kFloat64 || dtype == kFloat32, kOp, "taps must be float64 or float32");
  const Elements inputs = elements_of(tiles, type), outputs = elements_of(gradients, type);
  check(inputs.count == outputs.count, kOp, "tiles and gradients must be as many");
  WinogradGradient op{};
  op.count = inputs.count;
  op.inputs = inputs.channels;
  op.outputs = outputs.channels;
  std::copy_n(inputs.data, kWinogradElements, op.tiles);
  std::copy_n(outputs.data, kWinogradElements, op.gradients);
  op.stride_tile = inputs.stride_tile;
  op.stride_gradient = outputs.stride_tile;
  op.taps = taps_of(taps, op.outputs, op.inputs, type, false);
  op.add = add;
  check(op.count > 0, kOp, "there must be tiles");
  if (op.inputs == 0 || op.outputs == 0) return;
  const WinogradKernels::Kernel& found = kernels(dtype).kernels[dtype];
  const int64_t group = std::min(op.outputs, kWinogradOutputGroup);
  const int64_t values = kWinogradElements * group * found.panel * op.count / kProductsPerValue;
  for_units(ceil_div(op.outputs, kWinogradOutputGroup) * ceil_div(op.inputs, found.panel),
            grain_of(values), found.gradient_bytes, [&](int64_t begin, int64_t end, void* scratch) {
              found.gradient(op, begin, end, scratch);
            });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("winograd_input", TORCH_BOX(&input));
  m.impl("winograd_product", TORCH_BOX(&product));
  m.impl("winograd_gradient", TORCH_BOX(&gradient));
  m.impl("winograd_output_adjoint", TORCH_BOX(&output_adjoint));
}

}  // namespace fastfuse
