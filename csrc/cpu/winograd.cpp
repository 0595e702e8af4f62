// Host functions of the Winograd transforms: checks, threads, choice of vector body.

#include "cpu/winograd.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

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
  int64_t stride_tile;
  void* data[kWinogradElements];
};

void check_matrix(const Tensor& matrix, const Tensor& image) {
  check(matrix.is_cpu() && matrix.dim() == 2 && matrix.size(1) == image.size(1) &&
            matrix.scalar_type() == compute_type(image) && matrix.stride(1) == 1,
        kOp, kTilesExpected);
}

Elements elements_of(const Tensor& tiles, const Tensor& image) {
  check(tiles.dim() == 3 && tiles.size(0) == kWinogradElements, kOp, kTilesExpected);
  check_matrix(torch::stable::select(tiles, 0, 0), image);
  Elements found{tiles.size(1), tiles.stride(1), {}};
  const int64_t step = tiles.stride(0) * static_cast<int64_t>(tiles.element_size());
  for (int64_t i = 0; i < kWinogradElements; ++i)
    found.data[i] = static_cast<char*>(tiles.data_ptr()) + i * step;
  return found;
}

Elements elements_of(const std::vector<Tensor>& matrices, const Tensor& image) {
  check(matrices.size() == kWinogradElements, kOp, "tiles must be 36 matrices");
  Elements found{matrices[0].size(0), matrices[0].stride(0), {}};
  for (int64_t i = 0; i < kWinogradElements; ++i) {
    check_matrix(matrices[i], image);
    check(matrices[i].size(0) == found.count && matrices[i].stride(0) == found.stride_tile, kOp,
          "tiles must be 36 matrices of one size");
    found.data[i] = matrices[i].data_ptr();
  }
  return found;
}

void check_image_tensor(const Tensor& image) {
  check_image(kOp, "image", image);
  check(has_unit_stride(image, true), kOp, "image must be channels_last");
}

// `body` on the tiles of an image from `first` on, of those that make `outputs`.
void run(WinogradBody body, const Tensor& image_tensor, const Elements& elements, int64_t first,
         Outputs outputs, int64_t padding, const std::optional<Tensor>& bias) {
  const Dtype dtype = dtype_of(kOp, "image", image_tensor);
  const int64_t channels = image_tensor.size(1);
  check(!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == channels &&
                  bias->scalar_type() == compute_type(dtype)),
        kOp, "bias must have one value per channel, in the accumulation dtype");

  Winograd w{};
  w.image = image(image_tensor);
  w.channels = channels;
  w.tiles_y = ceil_div(outputs.height, kWinogradOutputs);
  w.tiles_x = ceil_div(outputs.width, kWinogradOutputs);
  w.padding = padding;
  w.first = first;
  const int64_t count = elements.count;
  check(first >= 0 && first + count <= image_tensor.size(0) * w.tiles_y * w.tiles_x, kOp,
        "first and tiles must lie in the image");
  if (count == 0 || channels == 0) return;
  std::copy_n(elements.data, kWinogradElements, w.elements);
  w.stride_tile = elements.stride_tile;
  const std::optional<Tensor> dense =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  w.bias = dense ? dense->const_data_ptr() : nullptr;

  const int64_t bytes = channels * compute_size(dtype);
  const Scratch zeros(bytes);
  std::memset(zeros.get(), 0, bytes);
  w.zeros = zeros.get();
  for_units(count, grain_of(kWinogradElements * channels), bytes,
            [&](int64_t begin, int64_t end, void* nowhere) {
              Winograd mine = w;
              mine.nowhere = nowhere;
              body(mine, begin, end);
            });
}

void input(Tensor tiles, Tensor image, int64_t first, int64_t height, int64_t width,
           int64_t padding) {
  check_image_tensor(image);
  run(kernel(image).input, image, elements_of(tiles, image), first, {height, width}, padding,
      std::nullopt);
}

void output(Tensor image, std::vector<Tensor> products, int64_t first, std::optional<Tensor> bias) {
  check_image_tensor(image);
  run(kernel(image).output, image, elements_of(products, image), first,
      {image.size(2), image.size(3)}, 0, bias);
}

void output_adjoint(Tensor tiles, Tensor image, int64_t first) {
  check_image_tensor(image);
  run(kernel(image).output_adjoint, image, elements_of(tiles, image), first,
      {image.size(2), image.size(3)}, 0, std::nullopt);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("winograd_input", TORCH_BOX(&input));
  m.impl("winograd_output", TORCH_BOX(&output));
  m.impl("winograd_output_adjoint", TORCH_BOX(&output_adjoint));
}

}  // namespace fastfuse
