// What the host functions of the Winograd transforms tell their vector bodies.
#pragma once

#include <cstdint>

#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// F(4x4, 3x3): tile (y, x) of an image's tiles_y x tiles_x makes the 4 x 4 outputs from (4y, 4x) on
// out of the 6 x 6 inputs from there on, less the padding. Each of a transformed tile's elements
// has a matrix [tile][channel] of its own.
constexpr int64_t kWinogradOutputs = 4, kWinogradInputs = 6;
constexpr int64_t kWinogradElements = kWinogradInputs * kWinogradInputs;

struct Winograd {
  Image image;  // channels_last: input, output, or output's gradient; tiles and bias are wider
  int64_t channels, tiles_y, tiles_x, padding;
  int64_t first;  // of the tiles, counted over all images
  void* elements[kWinogradElements];
  int64_t stride_tile;
  const void* bias;   // (channels,) or null
  const void* zeros;  // `channels` zeros, which stand for pixels outside
  void* nowhere;      // room for `channels` values of pixels outside
};

using WinogradBody = void (*)(const Winograd&, int64_t begin, int64_t end);

struct WinogradKernels {
  struct Kernel {
    WinogradBody input;           // image to tiles
    WinogradBody output;          // tiles to image
    WinogradBody output_adjoint;  // image to tiles
  } kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(WinogradKernels, winograd_kernels)

}  // namespace fastfuse
