// Loss and log-sum-exp of every target pixel.
//
// A block has a tile of cells. It brings their source pixels to shared memory, and takes each
// pixel's largest logit off its classes: a number that a softmax does not see, interpolated as they
// are. Then four threads walk over a cell's classes, with a sum for each of its target pixels.
#pragma once

#include "cuda/upsample_cross_entropy_cells.cuh"

namespace fastfuse::cuda {

constexpr int kForwardThreads = 256;
constexpr int kTile = 8;               // cells of a tile along x, at most; along y the launch says
constexpr int kTileWidth = kTile + 1;  // source pixels
constexpr int kLanes = 4;              // threads of a cell
constexpr int kStep = 2 * kLanes;      // classes, two a thread

// Exponentials are made of products where all base-2 logarithms are from here up. Elsewhere, and
// where a sum is as small, of neighbours that contradict each other, a pixel's classes are walked
// again for the largest value.
constexpr float kLowest = -120, kSmallestSum = 1e-30f;
constexpr float kNoClass = -1000;  // a value whose exponential is zero

struct CrossEntropyTarget {
  const int64_t* labels;
  const float* weight;      // or null
  const float* weight_sum;  // or null
  int64_t ignore_index;
  float smoothing;
};

struct CrossEntropyForward {
  const void* logits;
  LogitsStrides strides;
  CrossEntropyTarget target;
  float* loss;
  float* logsumexp;
  int classes, in_height, in_width;
  int tile_rows;  // of cells
  int tiles_y, tiles_x;
  int pitch;  // of pixels in shared memory
};

// An odd multiple of 8 floats, so that neither four pixels side by side nor the lanes of one meet.
__host__ __device__ constexpr int pitch_of(int classes) { return (classes + 8) / 16 * 16 + 8; }

// Of a tile: the values (pixel, class), and of each pixel three numbers.
__host__ __device__ constexpr int forward_shared_floats(int rows, int pitch) {
  return (rows + 1) * kTileWidth * (pitch + 3);
}

// The rows of R pixels that a thread has of its cell: half of them, if they are many.
template <int R>
constexpr int kRowsAtOnce = R > 4 ? R / 2 : R;

// sums += the exponentials of a row: first * ratio^i.
template <int R>
__device__ __forceinline__ void add_row(float first, float ratio, float* sums) {
  float even = first, odd = first * ratio;
  const float square = ratio * ratio;
  sums[0] += even;
  sums[1] += odd;
#pragma unroll
  for (int i = 2; i < R; i += 2) {
    sums[i] = fmaf(even, square, sums[i]);
    sums[i + 1] = fmaf(odd, square, sums[i + 1]);
    even *= square;
    odd *= square;
  }
}

// Sums of the threads of a cell; each gets a quarter of the N pixels, in their order.
template <int N>
__device__ __forceinline__ void share(float (&sums)[N], int lane) {
  const bool is_upper = lane & 2, is_odd = lane & 1;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float given = is_upper ? sums[i] : sums[i + N / 2];
    sums[i] = (is_upper ? sums[i + N / 2] : sums[i]) + __shfl_xor_sync(~0u, given, 2);
  }
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const float given = is_odd ? sums[i] : sums[i + N / 4];
    sums[i] = (is_odd ? sums[i + N / 4] : sums[i]) + __shfl_xor_sync(~0u, given, 1);
  }
}

__device__ __forceinline__ Corners corners(const float* pixel, int pitch) {
  const float* below = pixel + kTileWidth * pitch;
  return {pixel[0], pixel[pitch], below[0], below[pitch]};
}

// log2 of a pixel's sum of exponentials, whatever the values.
template <int R>
__device__ float log2_sum_exp(const float* values, int pitch, int classes, float weight_y,
                              float weight_x) {
  float top = -INFINITY, sum = 0;
#pragma unroll 1
  for (int c = 0; c < classes; ++c)
    top = fmaxf(top, between(corners(values + c, pitch), weight_y, weight_x));
#pragma unroll 1
  for (int c = 0; c < classes; ++c)
    sum += exp2_fast(R * (between(corners(values + c, pitch), weight_y, weight_x) - top));
  return fmaf(R, top, log2f(sum));
}

// The tile's source pixels (rows x columns), of which the first is (y, x), to shared memory.
template <class T, bool kClassesInnermost>
__device__ __forceinline__ void load_tile(const CrossEntropyForward& args, const T* image, int y,
                                          int x, int rows, int columns, float* values) {
  // Threads lie along what is contiguous: classes, or eight columns.
  constexpr int kPixels = kClassesInnermost ? 1 : 8, kClasses = 32 / kPixels, kAtOnce = 5;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = lane / kPixels;
  const T* from = image + clamp(y, args.in_height) * args.strides.row +
                  clamp(x, args.in_width) * args.strides.column + begin * args.strides.channel;
  const int row_stride = args.strides.row, column_stride = args.strides.column;
  const int64_t stride = kClassesInnermost ? kClasses : kClasses * args.strides.channel;
  for (int p = warp * kPixels + lane % kPixels; p < rows * kTileWidth;
       p += kForwardThreads / 32 * kPixels) {
    const int row = p / kTileWidth, column = p % kTileWidth;
    if (column >= columns) continue;
    const T* pixel = from + (clamp(y + row, args.in_height) - max(y, 0)) * row_stride +
                     (clamp(x + column, args.in_width) - max(x, 0)) * column_stride;
    float* to = values + p * args.pitch + begin;
#pragma unroll 1
    for (int left = args.classes - begin; left > 0; left -= kAtOnce * kClasses) {
      T loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (i * kClasses < left) loaded[i] = pixel[i * stride];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (i * kClasses < left) to[i * kClasses] = widen(loaded[i]);
      pixel += kAtOnce * stride;
      to += kAtOnce * kClasses;
    }
    if (begin == 0 && args.classes % 2 != 0)  // the pair of the last
      values[p * args.pitch + args.classes] = values[p * args.pitch];
  }
}

struct PixelNumbers {
  float *top, *lowest, *weighted;  // of each source pixel
};

// Takes the largest logit off those of each pixel, and scales them.
template <int R>
__device__ __forceinline__ void shift_pixels(const CrossEntropyForward& args, int rows, int columns,
                                             float* values, PixelNumbers numbers) {
  const int lane = threadIdx.x % kLanes, classes = args.classes;
  constexpr int kPixels = kForwardThreads / kLanes;
  for (int first = 0; first < rows * kTileWidth; first += kPixels) {
    const int p = first + threadIdx.x / kLanes;
    const bool there = p < rows * kTileWidth && p % kTileWidth < columns;
    float* pixel = values + p * args.pitch;
    const int begin = there ? 2 * lane : classes;
    float top = -INFINITY, lowest = INFINITY, weighted = 0;
#pragma unroll 4
    for (int c = begin; c < classes; c += kStep) {
      float pair[2];
      load(pixel + c, pair);  // of an odd number of classes, the first is there twice
      top = fmaxf(top, fmaxf(pair[0], pair[1]));
    }
    for (int lanes = 1; lanes < kLanes; lanes *= 2)
      top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
#pragma unroll 4
    for (int c = begin; c < classes; c += kStep) {
      float pair[2];
      load(pixel + c, pair);
      pair[0] = (pair[0] - top) * kScale<R>;
      pair[1] = (pair[1] - top) * kScale<R>;
      lowest = fminf(lowest, fminf(pair[0], pair[1]));
      if (c + 1 >= classes) pair[1] = kNoClass;
      store(pair, pixel + c);
    }
    if (args.target.smoothing > 0)
      for (int c = begin; c < classes; c += kStep)
        for (int i = c; i < min(c + 2, classes); ++i)
          weighted = fmaf(args.target.weight ? args.target.weight[i] : 1, pixel[i], weighted);
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, lanes));
      weighted += __shfl_xor_sync(~0u, weighted, lanes);
    }
    if (there && lane == 0) {
      numbers.top[p] = top;
      numbers.lowest[p] = lowest;
      numbers.weighted[p] = weighted;
    }
  }
}

// Of one target pixel, from the log2 of its sum of shifted exponentials.
template <int R>
__device__ __forceinline__ float loss_of(const CrossEntropyTarget& target, int classes,
                                         int64_t label, float log2_sum, const float* values,
                                         int pitch, const float* weighted, float weight_y,
                                         float weight_x) {
  if (label == target.ignore_index) return 0;
  if (label < 0 || label >= classes) return NAN;
  const float value = between(corners(values + label, pitch), weight_y, weight_x);
  float loss = kLn2 * fmaf(-R, value, log2_sum);
  if (target.weight) loss *= target.weight[label];
  if (target.smoothing > 0) {
    const float factors = target.weight_sum ? *target.weight_sum : classes;
    const float others =
        kLn2 * fmaf(log2_sum, factors, -R * between(corners(weighted, 1), weight_y, weight_x));
    loss = (1 - target.smoothing) * loss + others * (target.smoothing / classes);
  }
  return loss;
}

template <class T, int R, bool kClassesInnermost>
__global__ void __launch_bounds__(kForwardThreads, R > 4 ? 3 : 4)
    upsample_cross_entropy_forward(const CrossEntropyForward args) {
  constexpr int kRows = kRowsAtOnce<R>, kParts = R / kRows;
  constexpr int kPixels = kRows * R / kLanes;  // of a thread in the end, in one row
  constexpr int kPack = R / 2;                 // those at once in the image or not
  const int tile_x = blockIdx.x % args.tiles_x, tile_y = blockIdx.x / args.tiles_x % args.tiles_y;
  const int64_t image = blockIdx.x / args.tiles_x / args.tiles_y;
  const int cell_x = tile_x * kTile, cell_y = tile_y * args.tile_rows;
  const int columns = min(kTile, args.in_width + 1 - cell_x);
  const int rows = min(args.tile_rows, args.in_height + 1 - cell_y);
  const int pixels = (args.tile_rows + 1) * kTileWidth, pitch = args.pitch;
  float* values = dynamic_shared<float>();
  float* top = values + pixels * pitch;
  const PixelNumbers numbers{top, top + pixels, top + 2 * pixels};

  load_tile<T, kClassesInnermost>(args,
                                  static_cast<const T*>(args.logits) + image * args.strides.image,
                                  cell_y - 1, cell_x - 1, rows + 1, columns + 1, values);
  __syncthreads();
  shift_pixels<R>(args, rows + 1, columns + 1, values, numbers);
  __syncthreads();

  const int lane = threadIdx.x % kLanes, height = R * args.in_height, width = R * args.in_width;
  const int units = rows * columns * kParts;
  constexpr int kUnits = kForwardThreads / kLanes;
  for (int warp_unit = threadIdx.x / 32 * (32 / kLanes); warp_unit < units; warp_unit += kUnits) {
    const int unit = warp_unit + threadIdx.x % 32 / kLanes;
    const int cell = min(unit, units - 1) / kParts, row = cell / columns, column = cell % columns;
    const int part = kParts == 1 ? 0 : unit % kParts;
    const int pixel = row * kTileWidth + column;
    const float* above = values + pixel * pitch;
    const float* below = above + kTileWidth * pitch;
    float sums[kRows * R] = {};
#pragma unroll 1
    for (int c = 2 * lane; c < args.classes; c += kStep) {
      float at[4][2];
      load<2>(above + c, at[0]);
      load<2>(above + pitch + c, at[1]);
      load<2>(below + c, at[2]);
      load<2>(below + pitch + c, at[3]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        for_rows<R, kRows>(
            exponents<R>({at[0][i], at[1][i], at[2][i], at[3][i]}, 0), kRows * part,
            [&](int j, float first, float ratio) { add_row<R>(first, ratio, sums + j * R); });
    }
    share(sums, lane);

    const int j = kRows * part + lane * kPixels / R, i = lane * kPixels % R;
    const int y = R * (cell_y + row) - R / 2 + j, x = R * (cell_x + column) - R / 2 + i;
    const Corners lowest = corners(numbers.lowest + pixel, 1);
    const bool is_safe = R * fminf(fminf(lowest.a, lowest.b), fminf(lowest.c, lowest.d)) >= kLowest;
    const float weight_y = weight_of<R>(j);
#pragma unroll
    for (int pack = 0; pack < kPixels; pack += kPack) {
      if (unit >= units || y < 0 || y >= height || x + pack < 0 || x + pack >= width) continue;
      const int64_t at = (image * height + y) * width + x + pack;
      float loss[kPack], logsumexp[kPack];
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const float weight_x = weight_of<R>(i + pack + k), sum = sums[pack + k];
        const float log2_sum =
            is_safe && sum >= kSmallestSum
                ? log2f(sum)
                : log2_sum_exp<R>(above, pitch, args.classes, weight_y, weight_x);
        loss[k] = loss_of<R>(args.target, args.classes, args.target.labels[at + k], log2_sum, above,
                             pitch, numbers.weighted + pixel, weight_y, weight_x);
        logsumexp[k] =
            fmaf(kLn2, log2_sum, between(corners(numbers.top + pixel, 1), weight_y, weight_x));
      }
      store(loss, args.loss + at);
      store(logsumexp, args.logsumexp + at);
    }
  }
}

}  // namespace fastfuse::cuda
