// Launches of depthwise_conv2d: parts, and which kernel runs.
#include <algorithm>

#include "cuda/depthwise_conv2d.h"
#include "cuda/depthwise_conv2d_kernels.cuh"
#include "cuda/depthwise_conv2d_weight_kernels.cuh"

namespace fastfuse::cuda {
namespace {

// Parts are those of a device of so many processors of warps, whichever runs them: so sums are
// added in an order that depends on shapes alone.
constexpr int kWarpProcessors = 4 * 132;

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

// As even parts as there are warps at once: one or two a processor. Two hide each other's latency.
DepthwiseParts cut(const DepthwiseSizes& sizes, int width, int channels_of_thread) {
  DepthwiseParts p{};
  p.height = sizes.height;
  p.width = sizes.width;
  p.dilation = sizes.dilation;
  p.residues_y = std::min(sizes.dilation, sizes.height);
  p.residues_x = std::min(sizes.dilation, sizes.width);
  p.rows = ceil_div(sizes.height, sizes.dilation);
  p.all_rows = sizes.batch * p.residues_y * p.rows;
  p.channels = sizes.channels;
  p.channel_blocks = ceil_div(sizes.channels, kChannels);
  const int strips = ceil_div(ceil_div(sizes.width, sizes.dilation), width);
  const int max_strips = kMaxThreads / kChannels * channels_of_thread;
  p.column_tiles = ceil_div(strips, max_strips);
  const int warps = ceil_div(ceil_div(strips, p.column_tiles), channels_of_thread);
  p.strips = warps * channels_of_thread;

  const int64_t columns = int64_t{p.column_tiles} * p.residues_x;
  const int64_t warps_of_row = columns * p.channel_blocks * warps;
  // In rows of multiply-adds: what else a row takes is an eighth, and a part's begin another row.
  const auto cost = [&](int rows) { return 9 * rows + sizes.kernel_size - 1 + 8; };
  const auto part_rows = [&](int warps_at_once) {
    const int64_t parts = std::max<int64_t>(warps_at_once * kWarpProcessors / warps_of_row, 1);
    return static_cast<int>(divide_up(p.all_rows, std::min<int64_t>(parts, p.all_rows)));
  };
  // One warp a processor leaves it waiting, say a fifth of the time.
  p.part_rows = 2 * 4 * cost(part_rows(2)) < 5 * cost(part_rows(1)) ? part_rows(2) : part_rows(1);
  p.parts = ceil_div(p.all_rows, p.part_rows);
  p.chunks = static_cast<int>(columns * p.parts);
  return p;
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
    const DepthwiseForward<T> p{
        cut(*sizes, kWidth, 2),
        {static_cast<T*>(out), sizes->out, sizes->dilation},
        {static_cast<const T*>(x), sizes->x, sizes->dilation},
        {static_cast<const T*>(addend), sizes->addend, sizes->dilation},
        static_cast<const T*>(weight),
        bias,
        sizes->bias_dtype == kFloat32,
        sizes->flip != 0,
    };
    const ForwardMemory<T, K, kWidth> memory(p.parts.strips * kWidth, addend != nullptr);
    return launch(depthwise_conv2d_kernel<T, K, kWidth>, p.parts.chunks * p.parts.channel_blocks,
                  p.parts.strips * ForwardStrips<T, kWidth>::kThreads, memory.size * sizeof(T),
                  stream, p);
  });
}

int32_t fastfuse_depthwise_conv2d_chunks(const DepthwiseSizes* sizes) {
  return with_width<1>(*sizes, [&](auto width) { return cut(*sizes, width, 1).chunks; });
}

int fastfuse_depthwise_conv2d_backward_weight(const DepthwiseSizes* sizes, float* partials,
                                              void* grad_weight, void* grad_bias,
                                              const void* grad_output, const void* x,
                                              cudaStream_t stream) {
  return dispatch<1>(*sizes, [&](auto element, auto kernel_size, auto width) -> int {
    using T = decltype(element);
    constexpr int K = kernel_size, kWidth = width;
    const DepthwiseBackwardWeight<T> p{
        cut(*sizes, kWidth, 1),
        {static_cast<const T*>(x), sizes->x, sizes->dilation},
        {static_cast<const T*>(grad_output), sizes->out, sizes->dilation},
        partials,
    };
    const WeightMemory<T, K, kWidth> memory(p.parts.strips);
    const cudaError_t error = launch(
        depthwise_conv2d_weight_kernel<T, K, kWidth>, p.parts.chunks * p.parts.channel_blocks,
        p.parts.strips * WeightStrips<T, kWidth>::kThreads, memory.size * sizeof(T), stream, p);
    if (error != cudaSuccess) return error;
    return launch(depthwise_conv2d_reduce_kernel<T>, dim3(K * K + 1, p.parts.channel_blocks),
                  kChannels * kParts, 0, stream, static_cast<T*>(grad_weight),
                  static_cast<T*>(grad_bias), partials, p.parts.chunks, p.parts.channels, K * K);
  });
}
