// An example for the tests of the proof: a depthwise 7 x 7 convolution, channels last, whose tiles
// come to shared memory by asynchronous copies while the tile before is summed.
#include "cuda/elements.h"

namespace fastfuse::cuda {

struct Image {
  int height, width, channels;
};

constexpr int kTileHeight = 4, kTileWidth = 8, kChannels = 16, kTaps = 7, kThreads = 64;
constexpr int kHaloHeight = kTileHeight + kTaps - 1, kHaloWidth = kTileWidth + kTaps - 1;
constexpr int kTile = kHaloHeight * kHaloWidth * kChannels;

// A block: a tile of an image, blockIdx.z, and all channels, so many at a time. A thread: a row of
// a tile's pixels, of one channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    staged_depthwise(const T* __restrict__ input, const float* __restrict__ weight,
                     T* __restrict__ output, Image image) {
  constexpr int kVector = 16 / sizeof(T);
  T* tiles = dynamic_shared<T>();  // [2, kHaloHeight, kHaloWidth, kChannels]
  const int64_t first = int64_t(blockIdx.z) * image.height * image.width;
  const int top = blockIdx.y * kTileHeight, left = blockIdx.x * kTileWidth;

  const auto fetch = [&](int part) {
    for (int i = threadIdx.x; i < kTile / kVector; i += kThreads) {
      const int channel = i % (kChannels / kVector) * kVector;
      const int pixel = i / (kChannels / kVector);
      const int y = top + pixel / kHaloWidth - kTaps / 2, x = left + pixel % kHaloWidth - kTaps / 2;
      const bool there = y >= 0 && y < image.height && x >= 0 && x < image.width;
      const int64_t from = there ? (first + int64_t(y) * image.width + x) * image.channels +
                                       part * kChannels + channel
                                 : 0;
      copy_async<16>(&tiles[part % 2 * kTile + i * kVector], &input[from], there);
    }
    commit_copies();
  };

  const int parts = image.channels / kChannels;
  const int channel = threadIdx.x % kChannels, row = threadIdx.x / kChannels;
  fetch(0);
  for (int part = 0; part < parts; ++part) {
    if (part + 1 < parts) {
      fetch(part + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();  // the tile of other threads' copies is there
    float sums[kTileWidth] = {};
    for (int i = 0; i < kTaps; ++i) {
      const T* in = &tiles[part % 2 * kTile + (row + i) * kHaloWidth * kChannels + channel];
      float pixels[kHaloWidth];
#pragma unroll
      for (int x = 0; x < kHaloWidth; ++x) pixels[x] = widen(in[x * kChannels]);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const float tap =
            __ldg(&weight[(i * kTaps + j) * image.channels + part * kChannels + channel]);
#pragma unroll
        for (int x = 0; x < kTileWidth; ++x) sums[x] = fmaf(pixels[x + j], tap, sums[x]);
      }
    }
    for (int x = 0; x < kTileWidth; ++x)
      if (top + row < image.height && left + x < image.width)
        output[(first + int64_t(top + row) * image.width + left + x) * image.channels +
               part * kChannels + channel] = narrow<T>(sums[x]);
    __syncthreads();  // the tile has been read: the next copies may write there
  }
}

template <class T>
cudaError_t run(const void* input, const void* weight, void* output, int images, Image image,
                cudaStream_t stream) {
  const dim3 grid((image.width + kTileWidth - 1) / kTileWidth,
                  (image.height + kTileHeight - 1) / kTileHeight, images);
  return launch(staged_depthwise<T>, grid, kThreads, 2 * kTile * sizeof(T), stream,
                static_cast<const T*>(input), static_cast<const float*>(weight),
                static_cast<T*>(output), image);
}

}  // namespace fastfuse::cuda

FASTFUSE_API int fastfuse_staged_depthwise(int dtype, const void* input, const void* weight,
                                           void* output, int images, int height, int width,
                                           int channels, cudaStream_t stream) {
  using namespace fastfuse::cuda;
  const auto run_for = dtype == kFloat32 ? run<float> : run<__nv_bfloat16>;
  return run_for(input, weight, output, images, {height, width, channels}, stream);
}
