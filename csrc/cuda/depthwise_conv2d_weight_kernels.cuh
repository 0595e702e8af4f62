// The gradient of depthwise_conv2d's weight and bias.
//
// As forward, with roles exchanged: a thread keeps the sums of a whole kernel, and the k rows of
// the gradient that an input row meets. Those move on by a row for each input row, so a thread has
// one channel and twice the columns: as many multiply-adds for a value that it loads or moves. A
// block adds what its strips have summed, over some tiles, and a second kernel adds what blocks
// have, in fixed orders.
#pragma once

#include "cuda/depthwise_conv2d_tiles.cuh"

namespace fastfuse::cuda {

template <class T>
struct DepthwiseBackwardWeight {
  DepthwiseParts parts;
  Dilated<const T> x, grad_output;
  float* partials;  // (chunks, K * K + 1, channels)
};

template <class T, int Columns>
using WeightStrips = Strips<T, 1, Columns>;

// Where things are in shared memory, in elements: rows of x, rows of the gradient. In the end sums
// of a kernel row take their place.
template <class T, int K, int Columns>
struct WeightMemory {
  int x_row, grad, grad_row, size;

  __device__ __host__ explicit WeightMemory(int strips)
      : x_row(WeightStrips<T, Columns>::size(strips * Columns + K - 1)),
        grad(kSlots * x_row),
        grad_row(WeightStrips<T, Columns>::size(strips * Columns)),
        size(grad + kSlots * grad_row) {
    const int sums = strips * K * kChannels * static_cast<int>(sizeof(float) / sizeof(T));
    if (size < sums) size = sums;
  }
};

// Adds the strips' sums for `Count` taps and stores them, (Count, channels) of `to`.
template <int Count>
__device__ __forceinline__ void add_strips(const float (&sums)[Count][1], float* shared, float* to,
                                           int block_channels, int channels) {
  const int strip = threadIdx.x / kChannels, lane = threadIdx.x % kChannels;
  const int strips = blockDim.x / kChannels;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Count; ++i) shared[(strip * Count + i) * kChannels + lane] = sums[i][0];
  __syncthreads();
  if (lane >= block_channels) return;
  for (int i = strip; i < Count; i += strips) {
    float sum = 0;
    for (int s = 0; s < strips; ++s) sum += shared[(s * Count + i) * kChannels + lane];
    to[i * channels + lane] = sum;
  }
}

template <class T, int K, int Columns>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<K>)
    depthwise_conv2d_weight_kernel(DepthwiseBackwardWeight<T> p) {
  constexpr int kRadius = K / 2;
  using Strip = WeightStrips<T, Columns>;
  const Part part = find_part<Columns>(p.parts);
  const int columns = p.parts.strips * Columns;
  T* const shared = dynamic_shared<T>();
  const WeightMemory<T, K, Columns> memory(p.parts.strips);
  const T* const x_strip = shared + Strip::offset();
  const T* const grad_strip = x_strip + memory.grad;

  float sums[K][K][1] = {}, bias_sums[1][1] = {};
  fill_zeros(shared, shared + memory.size);  // what no copy writes
#pragma unroll 1
  for (int row = part.begin; row < part.end;) {
    const Tile tile = next_tile(p.parts, part, row);
    if (tile.begin >= tile.end) continue;
    // Input row `tile.begin - kRadius + step` meets row `tile.begin + step - ky` of the gradient.
    const int rows = tile.end - tile.begin;
    const int first = tile.begin - kRadius;
    const int steps = min(tile.end + kRadius, tile.height) - first;
    RowCopies<Strip, K - 1> x(p.x, part, tile, max(first, 0), columns);
    RowCopies<Strip, 0> grad(p.grad_output, part, tile, tile.begin, columns);
    const auto copy = [&](int step) {
      if (first + step >= 0 && step < steps) {
        x.copy_next(shared + step % kSlots * memory.x_row);
      }
      if (step < rows) grad.copy_next(shared + memory.grad + step % kSlots * memory.grad_row);
      commit_copies();
    };
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kSlots - 1; ++step) copy(step);

    float grads[K][Columns][1] = {};
#pragma unroll 2  // half of the moves
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kSlots - 2>();
      __syncthreads();
      copy(step + kSlots - 1);
#pragma unroll
      for (int ky = K - 1; ky > 0; --ky) {
#pragma unroll
        for (int i = 0; i < Columns; ++i) grads[ky][i][0] = grads[ky - 1][i][0];
      }
      if (step < rows) {
        Strip::load(grad_strip + step % kSlots * memory.grad_row, grads[0]);
#pragma unroll
        for (const auto& pixel : grads[0]) bias_sums[0][0] += pixel[0];
      }
      if (first + step < 0) continue;
      float in[Columns + K - 1][1];
      Strip::load(x_strip + step % kSlots * memory.x_row, in);
#pragma unroll
      for (int ky = 0; ky < K; ++ky) {
        if (static_cast<unsigned>(step - ky) >= static_cast<unsigned>(rows)) continue;
#pragma unroll
        for (int i = 0; i < Columns; ++i) {
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
            sums[ky][kx][0] = fmaf(in[i + kx][0], grads[ky][i][0], sums[ky][kx][0]);
          }
        }
      }
    }
  }

  wait_for_copies<0>();
  float* const shared_sums = reinterpret_cast<float*>(shared);
  float* to = p.partials + int64_t{part.chunk} * (K * K + 1) * p.parts.channels + part.channel;
#pragma unroll
  for (const auto& row : sums) {
    add_strips<K>(row, shared_sums, to, part.channels, p.parts.channels);
    to += K * p.parts.channels;
  }
  add_strips<1>(bias_sums, shared_sums, to, part.channels, p.parts.channels);
}

// Adds the chunks' sums of one tap, or of the bias: each of kParts rows of threads every kParts-th,
// then the first row theirs.
constexpr int kParts = 8;

template <class T>
__global__ void __launch_bounds__(kChannels* kParts)
    depthwise_conv2d_reduce_kernel(T* grad_weight, T* grad_bias, const float* partials, int chunks,
                                   int channels, int taps) {
  __shared__ float sums[kParts][kChannels];
  const int tap = blockIdx.x, lane = threadIdx.x % kChannels, part = threadIdx.x / kChannels;
  const int channel = blockIdx.y * kChannels + lane;
  float sum = 0;
  if (channel < channels) {
    for (int i = part; i < chunks; i += kParts) {
      sum += partials[(int64_t{i} * (taps + 1) + tap) * channels + channel];
    }
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || channel >= channels) return;
  for (int i = 1; i < kParts; ++i) sum += sums[i][lane];
  if (tap < taps) {
    grad_weight[int64_t{channel} * taps + tap] = narrow<T>(sum);
  } else {
    grad_bias[channel] = narrow<T>(sum);
  }
}

}  // namespace fastfuse::cuda
