// The gradient of the logits.
//
// With v, L, t of a target pixel, g its gradient, class weights w and smoothing e:
//   d / d v[c] = exp(v[c] - L) f - (1 - e) g w[t] [c = t] - e / C g w[c],
//   f = (1 - e) g w[t] + e / C g sum w,
// and that of a source pixel is the weighted sum over the target pixels that read it. A block has a
// tile of source pixels, whose gradient it sums in shared memory, every value in a fixed order:
// first what labels take away, a thread a pixel, then the exponentials, a lane a class. Warps walk
// over cells, those around the tile too; what a cell's pixels do to its four corners follows from
// sums that polynomials in the ratios of neighbours give.
#pragma once

#include "cuda/upsample_cross_entropy_forward.cuh"

namespace fastfuse::cuda {

constexpr int kTileX = 8;  // source pixels
constexpr int kCellsX = kTileX + 1;
constexpr int kMaxGroups = 8;  // warps that have classes of their own

// Base-2 logarithms. Exponentials are made of products where those of a cell are within kLeast of
// the largest log-sum-exp there, and these are within kSpread of each other: so that a product of
// R - 1 ratios and f is finite. Where all are below kNothing they are nothing.
constexpr float kLeast = -70, kSpread = 25, kNothing = -66;

struct CrossEntropyBackward {
  void* grad_logits;
  LogitsStrides out;
  const void* logits;
  LogitsStrides strides;
  CrossEntropyTarget target;
  const float* logsumexp;
  const float* grad;
  int64_t grad_image, grad_row, grad_column;
  int classes, in_height, in_width;
  int tile_rows;  // source pixels
  int tiles_y, tiles_x;
  int groups, splits;  // warps by classes, and by rows of cells
  int classes_innermost;
};

// Shared memory: sums (pixel, class); of target pixels by cells f, what the label takes away, the
// gradient if there is smoothing, the label; of cells the largest log-sum-exp; of source pixels the
// sum of gradients.
template <int R>
struct BackwardTile {
  static constexpr int kFactors = R * R + 4, kOthers = R * R + 1;  // no bank conflicts
  float *sums, *factors, *taken, *grads, *references, *grad_sums;
  int16_t* labels;

  __host__ __device__ static constexpr size_t bytes(int rows, int classes, bool smooths) {
    const size_t cells = size_t(rows + 1) * kCellsX;
    return 4 * (size_t(rows) * kTileX * (classes + 1) +
                cells * (kFactors + kOthers * (smooths ? 2 : 1) + 1)) +
           2 * cells * kOthers;
  }
  __device__ BackwardTile(float* memory, int rows, int classes, bool smooths) {
    const int cells = (rows + 1) * kCellsX;
    factors = memory;  // at multiples of 16 bytes
    sums = factors + cells * kFactors;
    taken = sums + rows * kTileX * classes;
    grads = taken + cells * kOthers;
    references = grads + (smooths ? cells * kOthers : 0);
    grad_sums = references + cells;
    labels = reinterpret_cast<int16_t*>(grad_sums + rows * kTileX);
  }
};

// Of factors, so that weights of pixels, times 2 R along either axis, are integers.
template <int R>
constexpr float kFactorScale = 0.25f / (R * R);

// Where a block is: its first source pixel, how many it has, and target pixels of its image.
struct BackwardPlace {
  int64_t image;
  int y, x, rows, columns;
  const int64_t* labels;
  const float* logsumexp;
  const float* grad;
};

// The largest log-sum-exp of a cell, in base 2; NaN if others are too far below.
template <int R>
__device__ __forceinline__ float reference_of(const CrossEntropyBackward& args,
                                              const float* logsumexp, int cell_y, int cell_x) {
  const int height = R * args.in_height, width = R * args.in_width;
  float top = -INFINITY, low = INFINITY;
#pragma unroll 2
  for (int j = 0; j < R; ++j) {
    const float* row = logsumexp + clamp(R * cell_y - R / 2 + j, height) * width;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const float value = row[clamp(R * cell_x - R / 2 + i, width)];
      top = fmaxf(top, value);
      low = fminf(low, value);
    }
  }
  return (top - low) * kLog2E <= kSpread ? top * kLog2E : NAN;
}

// What one target pixel does, to shared memory: the k-th of a cell.
template <int R>
__device__ __forceinline__ void load_pixel(const CrossEntropyBackward& args,
                                           const BackwardPlace& place, const BackwardTile<R>& tile,
                                           int cell, int k, int y, int x) {
  const int height = R * args.in_height, width = R * args.in_width;
  float factor = 0, taken = 0, g = 0;
  int label = 0;
  if (y >= 0 && y < height && x >= 0 && x < width) {
    const CrossEntropyTarget& target = args.target;
    const int at = y * width + x;
    const int64_t found = place.labels[at];
    const bool is_class = found >= 0 && found < args.classes;
    if (is_class) label = static_cast<int>(found);
    if (found != target.ignore_index)
      g = is_class ? place.grad[y * args.grad_row + x * args.grad_column] : NAN;
    taken = g;
    if (target.weight) taken *= target.weight[label];
    factor = taken;
    if (target.smoothing > 0) {
      taken *= 1 - target.smoothing;
      const float factors = target.weight_sum ? *target.weight_sum : args.classes;
      factor = fmaf(g * (target.smoothing / args.classes), factors, taken);
    }
    const float reference = tile.references[cell];
    if (reference == reference) factor *= exp2_fast(fmaf(-kLog2E, place.logsumexp[at], reference));
  }
  tile.factors[cell * tile.kFactors + k] = factor * kFactorScale<R>;
  tile.taken[cell * tile.kOthers + k] = taken;
  tile.labels[cell * tile.kOthers + k] = static_cast<int16_t>(label);
  if (args.target.smoothing > 0) tile.grads[cell * tile.kOthers + k] = g;
}

// Of a target pixel, the i-th of the 2 R around a source pixel.
template <int R>
__device__ __forceinline__ float adjoint_weight(int i, int source, int size) {
  const bool is_before = i < R;
  const bool is_border = is_before ? source == 0 : source == size - 1;
  return is_border ? 1 : is_before ? weight_of<R>(i) : 1 - weight_of<R>(i - R);
}

// Takes from a source pixel's sums what the labels around it take, one after the other; gives the
// weighted sum of gradients.
template <int R>
__device__ __forceinline__ float take_labels(const CrossEntropyBackward& args,
                                             const BackwardTile<R>& tile, int row, int column,
                                             int y, int x, float* sums) {
  float total = 0;
  for (int j = 0; j < 2 * R; ++j) {
    const float weight_y = adjoint_weight<R>(j, y, args.in_height);
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      const float weight = weight_y * adjoint_weight<R>(i, x, args.in_width);
      const int cell = (row + j / R) * kCellsX + column + i / R;
      const int at = cell * tile.kOthers + j % R * R + i % R;
      sums[tile.labels[at]] -= weight * tile.taken[at];
      if (args.target.smoothing > 0) total = fmaf(weight, tile.grads[at], total);
    }
  }
  return total;
}

// Sums over a cell's pixels of f exp(v - L): those, times the column i, times R less the row j, and
// times both. A polynomial in the ratio of neighbours and its derivative give a row.
struct Moments {
  float all = 0, by_column = 0, by_row = 0, by_both = 0;

  __device__ __forceinline__ void end_row() {
    by_row += all;
    by_both += by_column;
  }
};

template <int R>
__device__ __forceinline__ Moments moments(const Corners& at, float reference,
                                           const float* factors) {
  Moments sums;
  for_rows<R, R>(exponents<R>(at, reference), 0, [&](int j, float first, float ratio) {
    float factor[R];
    load<(R < 4 ? R : 4)>(factors + j * R, reinterpret_cast<float (&)[R < 4 ? R : 4]>(factor));
    if constexpr (R > 4) load<4>(factors + j * R + 4, reinterpret_cast<float (&)[4]>(factor[4]));
    float value = factor[R - 1], derivative = value;
#pragma unroll
    for (int i = R - 2; i >= 1; --i) {
      value = fmaf(value, ratio, factor[i]);
      derivative = fmaf(derivative, ratio, value);
    }
    value = fmaf(value, ratio, factor[0]);
    if (j == 0) {
      sums.all = sums.by_row = first * value;
      sums.by_column = sums.by_both = first * ratio * derivative;
    } else {
      sums.all = fmaf(first, value, sums.all);
      sums.by_column = fmaf(first * ratio, derivative, sums.by_column);
      sums.end_row();
    }
  });
  return sums;
}

// The same, an exponential for each pixel.
template <int R>
__device__ Moments moments_directly(const Corners& at, float reference, const float* factors,
                                    const CrossEntropyBackward& args, const float* logsumexp,
                                    int cell_y, int cell_x) {
  Moments sums;
  if (R * fmaxf(fmaxf(at.a, at.b), fmaxf(at.c, at.d)) - reference < kNothing) return sums;
  const int height = R * args.in_height, width = R * args.in_width;
#pragma unroll 1
  for (int j = 0; j < R; ++j) {
    const int y = clamp(R * cell_y - R / 2 + j, height);
#pragma unroll 1
    for (int i = 0; i < R; ++i) {
      const int x = clamp(R * cell_x - R / 2 + i, width);
      const float value = R * between(at, weight_of<R>(j), weight_of<R>(i));
      const float log2_sum = reference != reference ? kLog2E * logsumexp[y * width + x] : reference;
      const float term = factors[j * R + i] * exp2_fast(value - log2_sum);
      sums.all += term;
      sums.by_column = fmaf(i, term, sums.by_column);
    }
    sums.end_row();
  }
  return sums;
}

// What the moments of a cell are for its corners.
template <int R>
__device__ __forceinline__ Corners to_corners(const Moments& sums) {
  // Weights times 2 R are 2 i + 1 for the right, 2 (R - j) - 1 for what is above.
  const float right = fmaf(2, sums.by_column, sums.all);
  const float right_by_row = fmaf(2, sums.by_both, sums.by_row);
  const float above = fmaf(2, sums.by_row, -sums.all);
  const float b = fmaf(2, right_by_row, -right), a = fmaf(2 * R, above, -b);
  const float left = fmaf(2 * R, sums.all, -right);
  return {a, b, fmaf(2 * R, left, -a), fmaf(2 * R, right, -b)};
}

// A class of N rows of the tile's cells, from left to right.
template <int N, class T, int R>
__device__ __forceinline__ void walk_rows(const CrossEntropyBackward& args,
                                          const BackwardPlace& place, const BackwardTile<R>& tile,
                                          int class_, int row) {
  const bool is_class = class_ < args.classes;
  const T* logits = static_cast<const T*>(args.logits) + place.image * args.strides.image +
                    min(class_, args.classes - 1) * args.strides.channel +
                    place.x * args.strides.column;
  const int stride = args.strides.column, classes = args.classes;
  // The columns of a row that there are, counted from the tile's first.
  const int first_column = place.x == 0 ? 0 : -1, last_column = args.in_width - 1 - place.x;
  // Of the rows of source pixels above, between and below.
  const T* logits_of[N + 1];
  float* sums_of[N + 1];
  float right[N + 1], low[N], carried[N + 1];
  T next[N + 1];
#pragma unroll
  for (int k = 0; k <= N; ++k) {
    logits_of[k] = logits + clamp(place.y + row + k - 1, args.in_height) * args.strides.row;
    sums_of[k] = tile.sums + clamp(row + k - 1, place.rows) * kTileX * classes + class_;
    right[k] = widen(logits_of[k][first_column * stride]) * kScale<R>;
    next[k] = logits_of[k][0];
    if (k > 0) low[k - 1] = fminf(right[k - 1], right[k]);
  }
  // Of the tile or, at the image's border, the pixels that stand for those beyond it.
  const bool has_first = is_class && (row > 0 || place.y == 0);
  const bool has_last =
      is_class && (row + N <= place.rows || place.y + place.rows == args.in_height);
  const auto add = [&](const float (&values)[N + 1]) {
#pragma unroll
    for (int k = 0; k <= N; ++k)
      if (k == 0 ? has_first : k == N ? has_last : is_class) *sums_of[k] += values[k];
  };

  const float* factors = tile.factors + row * kCellsX * tile.kFactors;
  const float* references = tile.references + row * kCellsX;
  int column = 0;
  // What the next cells have for their left and right sides.
  const auto next_cells = [&](float (&to_left)[N + 1], float (&to_right)[N + 1]) {
    const int offset = min(column + 1, last_column) * stride;
    float left[N + 1];
#pragma unroll
    for (int k = 0; k <= N; ++k) {
      left[k] = right[k];
      right[k] = widen(next[k]) * kScale<R>;
      next[k] = logits_of[k][offset];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Corners at{left[k], right[k], left[k + 1], right[k + 1]};
      const float reference = references[k * kCellsX];
      const float* of_cell = factors + k * kCellsX * tile.kFactors;
      const float low_left = low[k];
      low[k] = fminf(at.b, at.d);
      const Corners to =
          to_corners<R>(fmaf(R, fminf(low_left, low[k]), -reference) >= kLeast
                            ? moments<R>(at, reference, of_cell)
                            : moments_directly<R>(at, reference, of_cell, args, place.logsumexp,
                                                  place.y + row + k, place.x + column));
      to_left[k] = k == 0 ? to.a : to_left[k] + to.a;
      to_right[k] = k == 0 ? to.b : to_right[k] + to.b;
      to_left[k + 1] = to.c;
      to_right[k + 1] = to.d;
    }
    factors += tile.kFactors;
    ++references;
    ++column;
  };
  float to_left[N + 1];
  next_cells(to_left, carried);
#pragma unroll
  for (int k = 0; k <= N; ++k)  // the image's first pixel is on both sides of its cell
    if (place.x == 0) carried[k] += to_left[k];
#pragma unroll 1
  while (column <= place.columns) {
    float to_right[N + 1];
    next_cells(to_left, to_right);
#pragma unroll
    for (int k = 0; k <= N; ++k) {
      to_left[k] += carried[k];
      carried[k] = to_right[k];
    }
    add(to_left);
#pragma unroll
    for (int k = 0; k <= N; ++k) sums_of[k] += classes;
  }
  if (place.columns == last_column + 1) {  // so is the last, of the cell behind it
#pragma unroll
    for (int k = 0; k <= N; ++k) sums_of[k] -= classes;
    add(carried);
  }
}

// Takes from a tile's sums what smoothing takes of every class.
template <int R>
__device__ __forceinline__ void take_shares(const CrossEntropyBackward& args,
                                            const BackwardPlace& place,
                                            const BackwardTile<R>& tile) {
  const float share = args.target.smoothing / args.classes;
  const float* weight = args.target.weight;
  for (int p = threadIdx.x / 32; p < place.rows * kTileX; p += blockDim.x / 32) {
    if (p % kTileX >= place.columns) continue;
    for (int c = threadIdx.x % 32; c < args.classes; c += 32)
      tile.sums[p * args.classes + c] -= tile.grad_sums[p] * (weight ? share * weight[c] : share);
  }
}

// The tile's gradient to memory.
template <class T, bool kClassesInnermost, int R>
__device__ __forceinline__ void store_sums(const CrossEntropyBackward& args,
                                           const BackwardPlace& place,
                                           const BackwardTile<R>& tile) {
  // Threads lie along what is contiguous: classes, or eight columns.
  constexpr int kPixels = kClassesInnermost ? 1 : kTileX, kClasses = 32 / kPixels, kAtOnce = 5;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = lane / kPixels;
  const int row_stride = args.out.row, column_stride = args.out.column;
  const int64_t stride = kClassesInnermost ? kClasses : kClasses * args.out.channel;
  T* out = static_cast<T*>(args.grad_logits) + place.image * args.out.image +
           place.y * args.out.row + place.x * args.out.column + begin * args.out.channel;
  for (int p = warp * kPixels + lane % kPixels; p < place.rows * kTileX;
       p += blockDim.x / 32 * kPixels) {
    if (p % kTileX >= place.columns) continue;
    const float* sums = tile.sums + p * args.classes + begin;
    T* to = out + p / kTileX * row_stride + p % kTileX * column_stride;
#pragma unroll 1
    for (int left = args.classes - begin; left > 0; left -= kAtOnce * kClasses) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (i * kClasses < left) to[i * stride] = narrow<T>(sums[i * kClasses]);
      to += kAtOnce * stride;
      sums += kAtOnce * kClasses;
    }
  }
}

template <class T, int R>
__global__ void __launch_bounds__(32 * kMaxGroups, 3)
    upsample_cross_entropy_backward(const CrossEntropyBackward args) {
  const int tile_x = blockIdx.x % args.tiles_x, tile_y = blockIdx.x / args.tiles_x % args.tiles_y;
  const int64_t image = blockIdx.x / args.tiles_x / args.tiles_y;
  const int64_t pixels = int64_t{R * args.in_height} * (R * args.in_width);
  const BackwardPlace place{image,
                            tile_y * args.tile_rows,
                            tile_x * kTileX,
                            min(args.tile_rows, args.in_height - tile_y * args.tile_rows),
                            min(kTileX, args.in_width - tile_x * kTileX),
                            args.target.labels + image * pixels,
                            args.logsumexp + image * pixels,
                            args.grad + image * args.grad_image};
  const bool smooths = args.target.smoothing > 0;
  const BackwardTile<R> tile(dynamic_shared<float>(), args.tile_rows, args.classes, smooths);
  const int threads = blockDim.x, cells = (place.rows + 1) * kCellsX;

  constexpr float kZeros[4] = {};
  for (int i = 4 * threadIdx.x; i < place.rows * kTileX * args.classes; i += 4 * threads)
    store(kZeros, tile.sums + i);
  for (int cell = threadIdx.x; cell < cells; cell += threads)
    tile.references[cell] =
        reference_of<R>(args, place.logsumexp, place.y + cell / kCellsX, place.x + cell % kCellsX);
  __syncthreads();
  // Threads lie along a row of the target.
  for (int k = threadIdx.x; k < cells * R * R; k += threads) {
    const int row = k / (R * kCellsX), column = k % (R * kCellsX);
    load_pixel<R>(args, place, tile, row / R * kCellsX + column / R, row % R * R + column % R,
                  R * place.y - R / 2 + row, R * place.x - R / 2 + column);
  }
  __syncthreads();
  for (int p = threadIdx.x; p < place.rows * kTileX; p += threads) {
    const int row = p / kTileX, column = p % kTileX;
    if (column >= place.columns) continue;
    tile.grad_sums[p] = take_labels<R>(args, tile, row, column, place.y + row, place.x + column,
                                       tile.sums + p * args.classes);
  }
  __syncthreads();

  if (smooths) {
    take_shares(args, place, tile);
    __syncthreads();
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split_rows = max(2, (place.rows + args.splits) / args.splits);
  const int begin = min(warp / args.groups * split_rows, place.rows + 1);
  const int end = min(begin + split_rows, place.rows + 1);
  for (int class_ = warp % args.groups * 32; class_ < args.classes; class_ += 32 * args.groups) {
    if (begin < end) walk_rows<1, T>(args, place, tile, class_ + lane, begin);
    // What is above a split's first row is the last of the split before, which has two at least.
    if (args.splits > 1) __syncthreads();
    int row = begin + 1;
    for (; row + 1 < end; row += 2) walk_rows<2, T>(args, place, tile, class_ + lane, row);
    if (row < end) walk_rows<1, T>(args, place, tile, class_ + lane, row);
  }
  __syncthreads();

  if (args.classes_innermost)
    store_sums<T, true>(args, place, tile);
  else
    store_sums<T, false>(args, place, tile);
}

}  // namespace fastfuse::cuda
