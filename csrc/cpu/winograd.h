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

// A weight's taps, [tap][output][input] with any strides.
struct WinogradTaps {
  void* data;
  int64_t tap, output, input;
  bool flipped;  // in reverse order
};

// image = what becomes of transformed tiles, (36, count, inputs), with a weight. A unit is a panel
// of output channels and a group of tiles.
struct WinogradProduct {
  Winograd to;  // its elements are those of the inputs
  int64_t count, inputs;
  WinogradTaps taps;
};

// taps = [taps +] what they get of transformed inputs, (36, count, inputs), and of the output's
// adjoint, (36, count, outputs). A unit is a panel of input channels and a group of outputs.
struct WinogradGradient {
  int64_t count, inputs, outputs;
  void *tiles[kWinogradElements], *gradients[kWinogradElements];
  int64_t stride_tile, stride_gradient;
  WinogradTaps taps;
  bool add;
};

constexpr int64_t kWinogradGroup = 96;        // of tiles: their products fit the second-level cache
constexpr int64_t kWinogradOutputGroup = 48;  // of outputs, likewise

struct WinogradKernels {
  struct Kernel {
    WinogradBody input;           // image to tiles
    WinogradBody output_adjoint;  // image to tiles
    void (*product)(const WinogradProduct&, int64_t begin, int64_t end, void* scratch);
    void (*gradient)(const WinogradGradient&, int64_t begin, int64_t end, void* scratch);
    int64_t panel;                          // channels
    int64_t product_bytes, gradient_bytes;  // of scratch memory
  } kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(WinogradKernels, winograd_kernels)

}  // namespace fastfuse
