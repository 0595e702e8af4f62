// Launches of depthwise_conv2d: tiles, and which kernel runs.
#include <algorithm>

#include "cuda/depthwise_conv2d.h"
#include "cuda/depthwise_conv2d_kernels.cuh"
#include "cuda/depthwise_conv2d_weight_kernels.cuh"

namespace fastfuse::cuda {
namespace {

// Tiles are cut for a device of so many processors of warps, whichever runs them: so sums are added
// in an order that depends on shapes alone.
constexpr int kWarpProcessors = 4 * 132;
constexpr int kWarpsOfProcessor = 2;  // that it holds at least

// What a row of input costs a thread besides multiply-adds: an eighth of those. A tile's begin
// costs about two rows.
constexpr int kRowCost = 8, kTileCost = 2;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The widths that strips may have for a thread of one channel; with two it has half as many
// columns.
constexpr int kWidths[] = {16, 14, 8};

// The index of the one that computes the least beyond the image, where a strip costs a column more.
int choose_width(int columns, int channels_of_thread) {
  const auto cost = [&](int index) {
    const int width = kWidths[index] / channels_of_thread;
    const int64_t warps = divide_up(divide_up(columns, width), channels_of_thread);
    return warps * (width + 1);
  };
  int best = 0;
  for (const int index : {1, 2}) {
    if (cost(index) < cost(best)) best = index;
  }
  return best;
}

// Cuts images into tiles that blocks compute in turn, in at most max_chunks parts. Few rows of
// tiles mean few halos, many keep all processors busy to the end.
DepthwiseTiles cut(const DepthwiseSizes& sizes, int width, int channels_of_thread,
                   int (*max_chunks)(int warps) = nullptr) {
  DepthwiseTiles t{};
  t.height = sizes.height;
  t.width = sizes.width;
  t.dilation = sizes.dilation;
  t.residues_y = std::min(sizes.dilation, sizes.height);
  t.residues_x = std::min(sizes.dilation, sizes.width);
  t.channels = sizes.channels;
  t.channel_blocks = ceil_div(sizes.channels, kChannels);
  const int strips = ceil_div(ceil_div(sizes.width, sizes.dilation), width);
  const int max_strips = kMaxThreads / kChannels * channels_of_thread;
  t.column_tiles = ceil_div(strips, max_strips);
  const int warps = ceil_div(ceil_div(strips, t.column_tiles), channels_of_thread);
  t.strips = warps * channels_of_thread;

  const int rows = ceil_div(sizes.height, sizes.dilation);
  const int64_t columns = int64_t{sizes.batch} * t.residues_y * t.residues_x * t.column_tiles;
  int64_t least = 0;
  for (int row_tiles = 1; row_tiles <= rows; ++row_tiles) {
    const int tile_rows = ceil_div(rows, row_tiles);
    const int64_t tiles = columns * row_tiles;
    const int64_t chunks =
        max_chunks ? std::min<int64_t>(max_chunks(t.channel_blocks * warps), tiles) : tiles;
    const int64_t rounds = divide_up(chunks * t.channel_blocks * warps, kWarpProcessors);
    const int64_t cost = rounds * divide_up(tiles, chunks) *
                         (kRowCost * (tile_rows + kTileCost) + tile_rows + sizes.kernel_size - 1);
    if (least == 0 || cost < least) {
      least = cost;
      t.tile_rows = tile_rows;
      t.chunks = static_cast<int>(chunks);
    }
  }
  t.row_tiles = ceil_div(rows, t.tile_rows);
  t.tiles = static_cast<int>(columns * t.row_tiles);
  t.chunks = std::min(t.chunks, t.tiles);
  return t;
}

// Tiles of the weight's gradient: as many chunks as run at once.
DepthwiseTiles cut_for_weight(const DepthwiseSizes& sizes, int width) {
  return cut(sizes, width, 1,
             [](int warps) { return std::max(kWarpsOfProcessor * kWarpProcessors / warps, 1); });
}

int columns(const DepthwiseSizes& sizes) { return ceil_div(sizes.width, sizes.dilation); }

template <int Channels, class F>
int with_width(const DepthwiseSizes& sizes, F f) {
  switch (choose_width(columns(sizes), Channels)) {
    case 0:
      return f(std::integral_constant<int, kWidths[0] / Channels>());
    case 1:
      return f(std::integral_constant<int, kWidths[1] / Channels>());
    default:
      return f(std::integral_constant<int, kWidths[2] / Channels>());
  }
}

// Calls f with an element, the kernel size and the width of strips, all as types.
template <int Channels, class F>
int dispatch(const DepthwiseSizes& sizes, F f) {
  const auto with_element = [&](auto element) {
    return with_width<Channels>(sizes, [&](auto width) {
      switch (sizes.kernel_size) {
        case 3:
          return f(element, std::integral_constant<int, 3>(), width);
        case 5:
          return f(element, std::integral_constant<int, 5>(), width);
        default:
          return f(element, std::integral_constant<int, 7>(), width);
      }
    });
  };
  switch (sizes.dtype) {
    case kFloat32:
      return with_element(float());
    case kBFloat16:
      return with_element(__nv_bfloat16());
    default:
      return with_element(__half());
  }
}

}  // namespace
}  // namespace fastfuse::cuda

using namespace fastfuse::cuda;

int fastfuse_depthwise_conv2d(const DepthwiseSizes* sizes, void* out, const void* x,
                              const void* weight, const void* bias, const void* addend,
                              cudaStream_t stream) {
  return dispatch<2>(*sizes, [&](auto element, auto kernel_size, auto width) -> int {
    using T = decltype(element);
    constexpr int K = kernel_size, kWidth = width;
    DepthwiseForward<T> p{};
    p.tiles = cut(*sizes, kWidth, 2);
    p.x_strides = sizes->x;
    p.out_strides = sizes->out;
    p.addend_strides = sizes->addend;
    p.out = static_cast<T*>(out);
    p.x = static_cast<const T*>(x);
    p.weight = static_cast<const T*>(weight);
    p.addend = static_cast<const T*>(addend);
    p.bias = bias;
    p.bias_is_float = sizes->bias_dtype == kFloat32;
    p.flip = sizes->flip != 0;
    const ForwardMemory<T, K, kWidth> memory(p.tiles.strips * kWidth, addend != nullptr);
    return launch(depthwise_conv2d_kernel<T, K, kWidth>, p.tiles.tiles * p.tiles.channel_blocks,
                  p.tiles.strips * ForwardStrips<T, kWidth>::kThreads, memory.size * sizeof(T),
                  stream, p);
  });
}

int32_t fastfuse_depthwise_conv2d_chunks(const DepthwiseSizes* sizes) {
  return with_width<1>(*sizes, [&](auto width) { return cut_for_weight(*sizes, width).chunks; });
}

int fastfuse_depthwise_conv2d_backward_weight(const DepthwiseSizes* sizes, float* partials,
                                              void* grad_weight, void* grad_bias,
                                              const void* grad_output, const void* x,
                                              cudaStream_t stream) {
  return dispatch<1>(*sizes, [&](auto element, auto kernel_size, auto width) -> int {
    using T = decltype(element);
    constexpr int K = kernel_size, kWidth = width;
    DepthwiseBackwardWeight<T> p{};
    p.tiles = cut_for_weight(*sizes, kWidth);
    p.x_strides = sizes->x;
    p.grad_strides = sizes->out;
    p.x = static_cast<const T*>(x);
    p.grad_output = static_cast<const T*>(grad_output);
    p.partials = partials;
    const WeightMemory<T, K, kWidth> memory(p.tiles.strips);
    const cudaError_t error = launch(
        depthwise_conv2d_weight_kernel<T, K, kWidth>, p.tiles.chunks * p.tiles.channel_blocks,
        p.tiles.strips * WeightStrips<T, kWidth>::kThreads, memory.size * sizeof(T), stream, p);
    if (error != cudaSuccess) return error;
    return launch(depthwise_conv2d_reduce_kernel<T>, dim3(K * K + 1, p.tiles.channel_blocks),
                  kChannels * kParts, 0, stream, static_cast<T*>(grad_weight),
                  static_cast<T*>(grad_bias), partials, p.tiles.chunks, p.tiles.channels, K * K);
  });
}
