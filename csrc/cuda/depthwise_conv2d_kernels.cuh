// depthwise_conv2d forward, which with a turned kernel is the gradient of its input too.
//
// Multiply-adds bound it, so nearly all instructions should be such. A block goes down the rows of
// its tile, which asynchronous copies bring to shared memory some rows ahead. A thread keeps the
// whole kernel of two channels in registers, and sums for all rows of results that an input row
// contributes to: it is loaded once, for k * k multiply-adds per column.
#pragma once

#include "cuda/depthwise_conv2d_tiles.cuh"

namespace fastfuse::cuda {

template <class T>
struct DepthwiseForward {
  DepthwiseParts parts;
  Dilated<T> out;
  Dilated<const T> x, addend;
  const T* weight;
  const void* bias;
  int32_t bias_is_float, flip;
};

template <class T, int Columns>
using ForwardStrips = Strips<T, 2, Columns>;

// Where things are in shared memory, in elements: rows of x, rows of the addend, and the weights in
// float32.
template <class T, int K, int Columns>
struct ForwardMemory {
  int x_row, addend, addend_row, weights, size;

  __device__ __host__ ForwardMemory(int columns, bool has_addend)
      : x_row(ForwardStrips<T, Columns>::size(columns + K - 1)),
        addend(kSlots * x_row),
        addend_row(ForwardStrips<T, Columns>::size(columns)),
        weights(addend + (has_addend ? kSlots * addend_row : 0)),
        size(weights + kChannels * K * K * static_cast<int>(sizeof(float) / sizeof(T))) {}
};

// The kernels of two channels, from shared memory.
template <int K>
__device__ __forceinline__ void load_weights(const float* shared, bool flip,
                                             float (&weights)[2][K * K]) {
#pragma unroll
  for (int i = 0; i < 2 * K * K; i += 2) {
    float pair[2];
    load<2>(shared + i, pair);
    weights[i / (K * K)][i % (K * K)] = pair[0];
    weights[(i + 1) / (K * K)][(i + 1) % (K * K)] = pair[1];
  }
  if (!flip) return;
#pragma unroll
  for (auto& kernel : weights) {
#pragma unroll
    for (int i = 0; i < K * K / 2; ++i) {
      const float other = kernel[K * K - 1 - i];
      kernel[K * K - 1 - i] = kernel[i];
      kernel[i] = other;
    }
  }
}

// sums_out = sums_in + what an input row gives to one row of results.
template <int K, int Columns>
__device__ __forceinline__ void convolve_row(const float (&in)[Columns + K - 1][2],
                                             const float (&weights)[2][K * K], int ky,
                                             const float (&sums_in)[Columns][2],
                                             float (&sums_out)[Columns][2]) {
#pragma unroll
  for (int kx = 0; kx < K; ++kx) {
#pragma unroll
    for (int i = 0; i < Columns; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float sum = kx == 0 ? sums_in[i][c] : sums_out[i][c];
        sums_out[i][c] = fmaf(in[i + kx][c], weights[c][ky * K + kx], sum);
      }
    }
  }
}

template <class T, int K, int Columns>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<K>)
    depthwise_conv2d_kernel(DepthwiseForward<T> p) {
  constexpr int kRadius = K / 2, kVector = 16 / sizeof(T);
  using Strip = ForwardStrips<T, Columns>;
  const Part part = find_part<Columns>(p.parts);
  const int columns = p.parts.strips * Columns;
  const int channel = Strip::channel(), column = part.column + Strip::strip() * Columns;
  const int written = channel < part.channels ? part.width - column : 0;  // columns of the strip

  using Memory = ForwardMemory<T, K, Columns>;
  T* const shared = dynamic_shared<T>();
  const bool has_addend = p.addend.tensor != nullptr;
  const Memory memory(columns, has_addend);
  T* const x_rows = shared;
  T* const addend_rows = shared + memory.addend;
  float* const shared_weights = reinterpret_cast<float*>(shared + memory.weights);
  fill_zeros(shared, shared + memory.weights);  // what no copy writes
  const int weights_there = min(part.channels, kChannels) * (K * K);
  for (int i = threadIdx.x * kVector; i < kChannels * K * K; i += blockDim.x * kVector) {
    float vector[kVector] = {};
    if (i < weights_there) load<kVector>(p.weight + part.channel * (K * K) + i, vector);
    store<kVector>(vector, shared_weights + i);
  }
  float bias[2] = {0, 0};
  if (p.bias && channel < part.channels) {
    if (p.bias_is_float) {
      load<2>(static_cast<const float*>(p.bias) + part.channel + channel, bias);
    } else {
      load<2>(static_cast<const T*>(p.bias) + part.channel + channel, bias);
    }
  }
  __syncthreads();
  float weights[2][K * K];
  load_weights<K>(shared_weights + channel * (K * K), p.flip, weights);

  float biases[Columns][2];
#pragma unroll
  for (auto& pixel : biases) pixel[0] = bias[0], pixel[1] = bias[1];
#pragma unroll 1
  for (int row = part.begin; row < part.end;) {
    const Tile tile = next_tile(p.parts, part, row);
    if (tile.begin >= tile.end) continue;
    // Input rows [first, last) exist; each is the last for row `y - kRadius` of results, and the
    // first for row `y + kRadius`.
    const int first = max(tile.begin - kRadius, 0), last = min(tile.end + kRadius, tile.height);
    RowCopies<Strip, K - 1> x(p.x, part, tile, first, columns);
    RowCopies<Strip, 0> addend(p.addend, part, tile, tile.begin, columns);
    // Whether row y meets a row of the tile's results with row ky of the kernel.
    const auto is_in_tile = [&](int y, int ky) {
      return static_cast<unsigned>(y + kRadius - ky - tile.begin) <
             static_cast<unsigned>(tile.end - tile.begin);
    };
    const auto copy = [&](int y) {
      if (y < last) x.copy_next(x_rows + y % kSlots * memory.x_row);
      if (has_addend && is_in_tile(y, K - 1)) {
        addend.copy_next(addend_rows + y % kSlots * memory.addend_row);
      }
      commit_copies();
    };
    // Makes row y visible, and its predecessor's memory free for a later one.
    const auto advance = [&](int y) {
      wait_for_copies<kSlots - 2>();
      __syncthreads();
      copy(y + kSlots - 1);
    };
    T* to = p.out.at(part, tile, tile.begin, column) + channel;
    // Stores a row of results, where input row y is the last to contribute.
    const auto finish = [&](float (&totals)[Columns][2], int y) {
      if (has_addend) {
        float addends[Columns][2];
        Strip::load(addend_rows + y % kSlots * memory.addend_row + Strip::offset(), addends);
#pragma unroll
        for (int i = 0; i < Columns; ++i) {
          totals[i][0] += addends[i][0];
          totals[i][1] += addends[i][1];
        }
      }
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        if (i < written) store<2>(totals[i], to + int64_t{i} * p.out.pixel);
      }
      to += p.out.row;
    };

    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kSlots - 1; ++i) copy(first + i);
    // sums[i]: of the row of results that meets row i + 1 of the kernel next.
    float sums[K - 1][Columns][2];
#pragma unroll
    for (auto& row_sums : sums) {
#pragma unroll
      for (auto& pixel : row_sums) pixel[0] = bias[0], pixel[1] = bias[1];
    }
#pragma unroll 1
    for (int y = first; y < last; ++y) {
      advance(y);
      float in[Columns + K - 1][2];
      Strip::load(x_rows + y % kSlots * memory.x_row + Strip::offset(), in);
      // Sums move on by one with the first product; those outside of the tile are of no use.
      if (is_in_tile(y, K - 1)) {
        convolve_row<K, Columns>(in, weights, K - 1, sums[K - 2], sums[K - 2]);
        finish(sums[K - 2], y);
      }
#pragma unroll
      for (int ky = K - 2; ky > 0; --ky) {
        if (is_in_tile(y, ky)) convolve_row<K, Columns>(in, weights, ky, sums[ky - 1], sums[ky]);
      }
      if (is_in_tile(y, 0)) convolve_row<K, Columns>(in, weights, 0, biases, sums[0]);
    }
    // Rows of results that would go on below the image.
#pragma unroll
    for (int i = 0; i < kRadius; ++i) {
      const int y = last + i;
      if (y >= tile.end + kRadius) break;
      advance(y);
      if (is_in_tile(y, K - 1)) finish(sums[K - 2 - i], y);
    }
  }
}

}  // namespace fastfuse::cuda
