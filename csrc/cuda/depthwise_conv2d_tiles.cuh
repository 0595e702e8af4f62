// How depthwise_conv2d cuts images into tiles, and how rows of a tile come to shared memory.
#pragma once

#include <type_traits>

#include "cuda/depthwise_conv2d.h"
#include "cuda/elements.h"

namespace fastfuse::cuda {

// A block has kChannels channels of a tile; a thread has one or two of them, of a strip of the
// tile's columns.
constexpr int kChannels = 32, kMaxThreads = 128, kWarp = 32;
// That a multiprocessor holds at once.
template <int K>
constexpr int kBlocks = K == 3 ? 3 : 2;
// Rows of a tile in shared memory: one is computed with while the others arrive.
constexpr int kSlots = 4;

// A dilated convolution is one without dilation of each of dilation x dilation images, those of
// every dilation-th row and column: its residues. The rows of all residues with the same columns
// make one column, of which a block has a part, some of its columns and channels.
struct DepthwiseParts {
  int height, width, dilation;
  int residues_y, residues_x;
  int rows, all_rows;  // of the highest residue; of the batch's residues with the same columns
  int part_rows, parts;
  int column_tiles, strips;
  int channels, channel_blocks;
  int chunks;  // parts of all columns
};

struct Part {
  int chunk;
  int channel, channels;  // the block's first, and how many follow
  int x, width;           // of the residues
  int column;             // the first
  int begin, end;         // of rows
};

// A part's rows in one residue.
struct Tile {
  int image, y, height;
  int begin, end;
};

inline __device__ __host__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int Columns>
__device__ __forceinline__ Part find_part(const DepthwiseParts& parts) {
  int index = blockIdx.x;
  const auto next = [&index](int size) {
    const int digit = index % size;
    index /= size;
    return digit;
  };
  Part part;
  part.channel = next(parts.channel_blocks) * kChannels;
  part.channels = parts.channels - part.channel;
  part.chunk = index;
  part.column = next(parts.column_tiles) * parts.strips * Columns;
  part.x = next(parts.residues_x);
  part.width = ceil_div(parts.width - part.x, parts.dilation);
  part.begin = index * parts.part_rows;
  part.end = min(part.begin + parts.part_rows, parts.all_rows);
  return part;
}

// The tile from a row of a part on, which moves on to the next. It may be empty: residues that are
// lower than others are taken for as high.
__device__ __forceinline__ Tile next_tile(const DepthwiseParts& parts, const Part& part, int& row) {
  const int residue = row / parts.rows;
  Tile tile;
  tile.image = residue / parts.residues_y;
  tile.y = residue % parts.residues_y;
  tile.height = ceil_div(parts.height - tile.y, parts.dilation);
  tile.begin = row - residue * parts.rows;
  tile.end = min(tile.begin + part.end - row, tile.height);
  row += parts.rows - tile.begin;
  return tile;
}

// A tensor and its strides: between images, residues' starts, and rows and pixels of a residue.
template <class T>
struct Dilated {
  T* tensor;
  int64_t image, start_row, row;
  int start_pixel, pixel;

  Dilated(T* tensor, const ImageStrides& strides, int dilation)
      : tensor(tensor),
        image(strides.image),
        start_row(strides.row),
        row(strides.row * dilation),
        start_pixel(static_cast<int>(strides.pixel)),
        pixel(start_pixel * dilation) {}

  // A pixel's first channel of a part's.
  __device__ T* at(const Part& part, const Tile& tile, int y, int x) const {
    return tensor + tile.image * image + tile.y * start_row + int64_t{part.x} * start_pixel +
           part.channel + y * row + int64_t{x} * pixel;
  }
};

// One or two neighbouring elements. A bfloat16 is the upper half of a float: one instruction.
template <class T, int Width>
__device__ __forceinline__ void load_channels(const T* from, float (&to)[Width]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    using Bits = std::conditional_t<Width == 2, uint32_t, uint16_t>;
    const uint32_t bits = *reinterpret_cast<const Bits*>(from);
    to[0] = __uint_as_float(__byte_perm(bits, 0, 0x1044));
    if constexpr (Width == 2) to[1] = __uint_as_float(__byte_perm(bits, 0, 0x3244));
  } else {
    load<Width>(from, to);
  }
}

// Rows of pixels in shared memory, in strips of Columns columns, where threads have Width channels.
//
// With two channels, half of a warp has another strip. In 16 bits a half reads half of the banks,
// and a pixel left free behind each strip of an even number makes it the other half.
template <class T, int Width, int Columns>
struct Strips {
  using Element = T;
  static constexpr int kWidth = Width, kColumns = Columns;
  static constexpr int kThreads = kChannels / Width;  // of a strip
  static constexpr int kFree = Width == 2 && sizeof(T) == 2 && Columns % 2 == 0;

  static __device__ __host__ int position(int column) {
    return (column + (kFree ? column / Columns : 0)) * kChannels;
  }
  static __device__ __host__ int size(int columns) { return position(columns - 1) + kChannels; }

  // Of a thread: its strip, the first of its channels, and where they are in a row.
  static __device__ int strip() { return threadIdx.x / kThreads; }
  static __device__ int channel() { return threadIdx.x % kThreads * Width; }
  static __device__ int offset() { return strip() * ((Columns + kFree) * kChannels) + channel(); }

  // Neighbouring pixels from the start of a strip on.
  template <int Count>
  static __device__ __forceinline__ void load(const T* from, float (&values)[Count][Width]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) load_channels(from + position(i), values[i]);
  }
};

// Copies a residue's rows to shared memory, one after the other and from a column on, which may lie
// outside: 16 bytes at a time, in the order of threads. What is outside of the image is left as it
// is.
template <class Row, int Halo>
class RowCopies {
  using T = typename Row::Element;

 public:
  __device__ RowCopies(const Dilated<const T>& image, const Part& part, const Tile& tile, int y,
                       int columns)
      : row_(image.row), step_(step() * image.pixel) {
    const int first = part.column - Halo / 2;
    const int vector = threadIdx.x % kVectors * kVector;
    int i = threadIdx.x / kVectors;
    while (first + i < 0) i += step();
    begin_ = first + i;
    end_ = vector < part.channels ? min(first + columns + Halo, part.width) : 0;
    to_ = Row::position(i) + vector;
    next_ = image.at(part, tile, y, begin_) + vector;
  }

  __device__ __forceinline__ void copy_next(T* shared) {
    T* to = shared + to_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (begin_ + i * step() < end_) copy_async<16>(to, next_ + int64_t{i} * step_);
      to += Row::position(step());
    }
    next_ += row_;
  }

 private:
  static constexpr int kVector = 16 / sizeof(T), kVectors = kChannels / kVector;
  // A thread's copies if there is a single warp; it has fewer if there are more.
  static constexpr int kCopies =
      ((Row::kWidth * Row::kColumns + Halo) * kVectors + kWarp - 1) / kWarp;

  // Pixels that all threads copy together: a multiple of a strip's where that matters.
  static __device__ int step() { return blockDim.x / kVectors; }

  const T* next_;
  int64_t row_;
  int begin_, end_, to_, step_;
};

// By all threads.
template <class T>
__device__ __forceinline__ void fill_zeros(T* begin, T* end) {
  constexpr int kVector = 16 / sizeof(T);
  for (T* to = begin + threadIdx.x * kVector; to < end; to += blockDim.x * kVector) {
    *reinterpret_cast<float4*>(to) = make_float4(0, 0, 0, 0);
  }
}

}  // namespace fastfuse::cuda
