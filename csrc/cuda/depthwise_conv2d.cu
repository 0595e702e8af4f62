// Launches of depthwise_conv2d: tiles, and which kernel runs.
#include "cuda/depthwise_conv2d.h"

#include <algorithm>

#include "cuda/depthwise_conv2d_kernels.cuh"

namespace fastfuse::cuda {
namespace {

// Tiles are cut for a device of so many processors of warps, whichever runs them: so sums are added
// in an order that depends on shapes alone.
constexpr int kWarpProcessors = 4 * 132;

// What a row of input costs a thread without its multiply-adds, in rows of multiply-adds: an eighth
// with 8 columns. So do a tile's first instructions, about two rows.
constexpr int kRowCost = 8, kTileCost = 2;

// Columns of a strip: those that leave the fewest beyond the image, for a cost of one more each.
int columns_of_strip(int width) {
  int best = 0, least = 0;
  for (const int columns : {8, 7, 4}) {
    const int strips = (ceil_div(width, columns) + 1) / 2 * 2;  // warps have two
    if (best == 0 || strips * (columns + 1) < least) {
      best = columns;
      least = strips * (columns + 1);
    }
  }
  return best;
}

DepthwiseTiles cut(const DepthwiseSizes& sizes, int columns) {
  DepthwiseTiles t{};
  t.height = sizes.height;
  t.width = sizes.width;
  t.dilation = sizes.dilation;
  t.residues_y = std::min(sizes.dilation, sizes.height);
  t.residues_x = std::min(sizes.dilation, sizes.width);
  t.channels = sizes.channels;
  t.channel_blocks = ceil_div(sizes.channels, kChannels);
  const int strips = ceil_div(ceil_div(sizes.width, sizes.dilation), columns);
  t.column_tiles = ceil_div(strips, kMaxStrips);
  t.strips = (ceil_div(strips, t.column_tiles) + 1) / 2 * 2;
  // Rows: few tiles for few halos, many to keep all processors busy to the end.
  const int rows = ceil_div(sizes.height, sizes.dilation);
  const int64_t above = int64_t{sizes.batch} * t.residues_y * t.residues_x * t.column_tiles;
  const int64_t warps = above * t.channel_blocks * t.strips / 2;
  int64_t least = 0;
  for (int row_tiles = 1; row_tiles <= rows; ++row_tiles) {
    const int tile_rows = ceil_div(rows, row_tiles);
    const int64_t rounds = (warps * row_tiles + kWarpProcessors - 1) / kWarpProcessors;
    const int64_t cost =
        rounds * (kRowCost * (tile_rows + kTileCost) + tile_rows + sizes.kernel_size - 1);
    if (least == 0 || cost < least) {
      least = cost;
      t.tile_rows = tile_rows;
    }
  }
  t.row_tiles = ceil_div(rows, t.tile_rows);
  t.tiles = static_cast<int>(above * t.row_tiles);
  return t;
}

template <class T, int K, int Columns>
int launch_forward(DepthwiseForward<T> p, const DepthwiseSizes& sizes, cudaStream_t stream) {
  p.tiles = cut(sizes, Columns);
  const int columns = p.tiles.strips * Columns;
  const size_t shared = sizeof(T) * ForwardMemory<T, K, Columns>(columns, p.addend != nullptr).size;
  return launch(depthwise_conv2d_kernel<T, K, Columns>, p.tiles.tiles * p.tiles.channel_blocks,
                p.tiles.strips * kPairs, shared, stream, p);
}

template <class T, int K>
int launch_forward(const DepthwiseForward<T>& p, const DepthwiseSizes& sizes,
                   cudaStream_t stream) {
  switch (columns_of_strip(ceil_div(sizes.width, sizes.dilation))) {
    case 8: return launch_forward<T, K, 8>(p, sizes, stream);
    case 7: return launch_forward<T, K, 7>(p, sizes, stream);
    default: return launch_forward<T, K, 4>(p, sizes, stream);
  }
}

// Calls f with a null pointer to an element and with the kernel size as a type.
template <class F>
int dispatch(const DepthwiseSizes& sizes, F f) {
  const auto with_size = [&](auto* element) {
    switch (sizes.kernel_size) {
      case 3: return f(element, std::integral_constant<int, 3>());
      case 5: return f(element, std::integral_constant<int, 5>());
      default: return f(element, std::integral_constant<int, 7>());
    }
  };
  switch (sizes.dtype) {
    case kFloat32: return with_size(static_cast<float*>(nullptr));
    case kBFloat16: return with_size(static_cast<__nv_bfloat16*>(nullptr));
    default: return with_size(static_cast<__half*>(nullptr));
  }
}

}  // namespace
}  // namespace fastfuse::cuda

using namespace fastfuse::cuda;

int fastfuse_depthwise_conv2d(const DepthwiseSizes* sizes, void* out, const void* x,
                              const void* weight, const void* bias, const void* addend,
                              cudaStream_t stream) {
  return dispatch(*sizes, [&](auto* element, auto kernel_size) -> int {
    using T = std::remove_pointer_t<decltype(element)>;
    DepthwiseForward<T> p{};
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
    return launch_forward<T, decltype(kernel_size)::value>(p, *sizes, stream);
  });
}
