// What the host functions of the Winograd transforms tell their vector bodies.
#pragma once

#include <cstdint>

#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// F(2x2, 3x3): tile (y, x) of an image's tiles_y x tiles_x makes the 2 x 2 outputs from (2y, 2x) on
// out of the 4 x 4 inputs from there on, less the padding. `tiles` is [16][tile][channel].
struct Winograd {
  Image image;  // channels_last: input, output, or output's gradient
  int64_t channels, tiles_y, tiles_x, padding;
  int64_t first;  // of the tiles, counted over all images
  void* tiles;
  int64_t stride_element, stride_tile;
  const void* bias;   // (channels,) or null
  const void* zeros;  // `channels` zeros, which stand for pixels outside
  void* nowhere;      // room for `channels` values of pixels outside
};

using WinogradBody = void (*)(const Winograd&, int64_t begin, int64_t end);

struct WinogradKernels {
  WinogradBody input[2];           // float64, float32: image to tiles
  WinogradBody output[2];          // tiles to image
  WinogradBody output_adjoint[2];  // image to tiles
};

#define FASTFUSE_DECLARE(isa) FASTFUSE_DECLARE_KERNELS(isa, WinogradKernels, winograd_kernels)
FASTFUSE_FOR_EACH_ISA(FASTFUSE_DECLARE)
#undef FASTFUSE_DECLARE

}  // namespace fastfuse
