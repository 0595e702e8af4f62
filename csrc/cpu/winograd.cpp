// Host functions of the Winograd transforms: checks, threads, choice of vector body.

#include "cpu/winograd.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/host.h"
#include "cpu/isa.h"

namespace fastfuse {
namespace {

constexpr const char* kOp = "winograd";

const WinogradKernels& kernels() {
  switch (current_isa()) {
#define FASTFUSE_CASE(isa) FASTFUSE_KERNEL_CASE(isa, winograd_kernels)
    FASTFUSE_FOR_EACH_ISA(FASTFUSE_CASE)
#undef FASTFUSE_CASE
  }
  return portable::winograd_kernels;
}

struct Outputs {
  int64_t height, width;
};

// `bodies` on the tiles (16, count, channels) of an image, of those that make `outputs`.
void run(const WinogradBody (&bodies)[2], const Tensor& image_tensor, const Tensor& tiles,
         int64_t first, Outputs outputs, int64_t padding, const std::optional<Tensor>& bias) {
  check_image(kOp, "image", image_tensor);
  const Dtype dtype = dtype_of(kOp, "image", image_tensor);
  check(dtype == kFloat32 || dtype == kFloat64, kOp, "image must be float32 or float64");
  const int64_t channels = image_tensor.size(1);
  check(tiles.is_cpu() && tiles.dim() == 3 && tiles.size(0) == 16 && tiles.size(2) == channels &&
            tiles.scalar_type() == image_tensor.scalar_type() && tiles.stride(2) == 1,
        kOp, "tiles must be (16, tiles, channels) in the image's dtype, with unit stride");
  check(has_unit_stride(image_tensor, true), kOp, "image must be channels_last");
  check(!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == channels &&
                  bias->scalar_type() == image_tensor.scalar_type()),
        kOp, "bias must have one value per channel, in the image's dtype");

  Winograd w{};
  w.image = image(image_tensor);
  w.channels = channels;
  w.tiles_y = (outputs.height + 1) / 2;
  w.tiles_x = (outputs.width + 1) / 2;
  w.padding = padding;
  w.first = first;
  const int64_t count = tiles.size(1);
  check(first >= 0 && first + count <= image_tensor.size(0) * w.tiles_y * w.tiles_x, kOp,
        "first and tiles must lie in the image");
  if (count == 0 || channels == 0) return;
  w.tiles = tiles.data_ptr();
  w.stride_element = tiles.stride(0);
  w.stride_tile = tiles.stride(1);
  const std::optional<Tensor> dense =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  w.bias = dense ? dense->const_data_ptr() : nullptr;

  constexpr int64_t kGrain = 16384;  // values worth waking a thread for
  const int64_t bytes = channels * compute_size(dtype);
  const Scratch zeros(bytes);
  std::memset(zeros.get(), 0, bytes);
  w.zeros = zeros.get();
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / (16 * channels)),
                              [&](int64_t begin, int64_t end) {
                                const Scratch nowhere(bytes);
                                Winograd mine = w;
                                mine.nowhere = nowhere.get();
                                bodies[dtype == kFloat32](mine, begin, end);
                              });
}

void input(Tensor tiles, Tensor image, int64_t first, int64_t height, int64_t width,
           int64_t padding) {
  run(kernels().input, image, tiles, first, {height, width}, padding, std::nullopt);
}

void output(Tensor image, Tensor tiles, int64_t first, std::optional<Tensor> bias) {
  run(kernels().output, image, tiles, first, {image.size(2), image.size(3)}, 0, bias);
}

void output_adjoint(Tensor tiles, Tensor image, int64_t first) {
  run(kernels().output_adjoint, image, tiles, first, {image.size(2), image.size(3)}, 0,
      std::nullopt);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse, CPU, m) {
  m.impl("winograd_input", TORCH_BOX(&input));
  m.impl("winograd_output", TORCH_BOX(&output));
  m.impl("winograd_output_adjoint", TORCH_BOX(&output_adjoint));
}

}  // namespace fastfuse
