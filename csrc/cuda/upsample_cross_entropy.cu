// Launches of upsample_cross_entropy: tiles, and which kernel runs.
#include <algorithm>
#include <type_traits>

#include "cuda/upsample_cross_entropy.h"
#include "cuda/upsample_cross_entropy_backward.cuh"

namespace fastfuse::cuda {
namespace {

// Bytes of a block at most, unless its tile is one row: a multiprocessor holds three.
constexpr size_t kSharedBytes = 72 << 10;

// Rows of a tile of backward at most; fewer, if there are not so many warps in all.
constexpr int kMaxRows = 16, kWarps = 8 * 132;

int ceil_div(int n, int d) { return (n + d - 1) / d; }

CrossEntropyTarget target_of(const CrossEntropySizes& sizes, const int64_t* labels,
                             const float* weight, const float* weight_sum) {
  return {labels, weight, weight_sum, sizes.ignore_index, sizes.label_smoothing};
}

// Rows of a tile, at most `rows`.
template <class Bytes>
int tile_rows(int rows, const Bytes& bytes) {
  while (rows > 1 && bytes(rows) > kSharedBytes) rows /= 2;
  return rows;
}

// Calls launch with an element of the dtype and the ratio, as types.
template <class Launch>
cudaError_t dispatch(const CrossEntropySizes& sizes, const Launch& launch) {
  const auto with_ratio = [&](auto element) {
    switch (sizes.ratio) {
      case 2:
        return launch(element, std::integral_constant<int, 2>());
      case 4:
        return launch(element, std::integral_constant<int, 4>());
      case 8:
        return launch(element, std::integral_constant<int, 8>());
      default:
        return cudaErrorInvalidValue;
    }
  };
  switch (sizes.dtype) {
    case kFloat32:
      return with_ratio(float());
    case kBFloat16:
      return with_ratio(__nv_bfloat16());
    case kFloat16:
      return with_ratio(__half());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace fastfuse::cuda

using namespace fastfuse::cuda;

int fastfuse_upsample_cross_entropy(const CrossEntropySizes* sizes, float* loss, float* logsumexp,
                                    const void* logits, const int64_t* target, const float* weight,
                                    const float* weight_sum, cudaStream_t stream) {
  const int pitch = pitch_of(sizes->classes);
  const auto bytes = [&](int rows) { return sizeof(float) * forward_shared_floats(rows, pitch); };
  const int rows = tile_rows(kTile, bytes);
  const CrossEntropyForward args{logits,
                                 sizes->logits,
                                 target_of(*sizes, target, weight, weight_sum),
                                 loss,
                                 logsumexp,
                                 sizes->classes,
                                 sizes->in_height,
                                 sizes->in_width,
                                 rows,
                                 ceil_div(sizes->in_height + 1, rows),
                                 ceil_div(sizes->in_width + 1, kTile),
                                 pitch};
  const dim3 grid(sizes->batch * args.tiles_y * args.tiles_x);
  return dispatch(*sizes, [&](auto element, auto ratio) {
    using T = decltype(element);
    constexpr int R = decltype(ratio)::value;
    const auto kernel = sizes->classes_innermost ? upsample_cross_entropy_forward<T, R, true>
                                                 : upsample_cross_entropy_forward<T, R, false>;
    return launch(kernel, grid, dim3(kForwardThreads), bytes(rows), stream, args);
  });
}

int fastfuse_upsample_cross_entropy_backward(const CrossEntropySizes* sizes, void* grad_logits,
                                             const float* grad, const void* logits,
                                             const int64_t* target, const float* weight,
                                             const float* weight_sum, const float* logsumexp,
                                             cudaStream_t stream) {
  const bool smooths = sizes->label_smoothing > 0;
  const int groups = std::min(ceil_div(sizes->classes, 32), kMaxGroups);
  const int splits = groups > 2 ? 1 : 4 / groups;
  return dispatch(*sizes, [&](auto element, auto ratio) {
    using T = decltype(element);
    constexpr int R = decltype(ratio)::value;
    const auto bytes = [&](int rows) {
      return BackwardTile<R>::bytes(rows, sizes->classes, smooths);
    };
    const int64_t warps_of_rows =
        int64_t{sizes->batch} * ceil_div(sizes->in_width, kTileX) * groups * splits;
    int rows = tile_rows(kMaxRows, bytes);
    while (rows > 4 && warps_of_rows * ceil_div(sizes->in_height, rows) < kWarps) rows /= 2;
    const CrossEntropyBackward args{grad_logits,
                                    sizes->grad_logits,
                                    logits,
                                    sizes->logits,
                                    target_of(*sizes, target, weight, weight_sum),
                                    logsumexp,
                                    grad,
                                    sizes->grad_image,
                                    sizes->grad_row,
                                    sizes->grad_column,
                                    sizes->classes,
                                    sizes->in_height,
                                    sizes->in_width,
                                    rows,
                                    ceil_div(sizes->in_height, rows),
                                    ceil_div(sizes->in_width, kTileX),
                                    groups,
                                    splits,
                                    sizes->classes_innermost};
    const dim3 grid(sizes->batch * args.tiles_y * args.tiles_x);
    return launch(upsample_cross_entropy_backward<T, R>, grid, dim3(32 * groups * splits),
                  bytes(rows), stream, args);
  });
}
