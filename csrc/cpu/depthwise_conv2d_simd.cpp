// Vector bodies of depthwise_conv2d. docs/depthwise_conv2d.md has the idea and what bounds it.
//
// Whatever the layout, rows are brought into small dense buffers [column][lane] in the compute
// type: from there on a vector is a pixel's channels, and dilation along x a step between pixels. A
// block is up to kMaxBlock outputs of one x-phase in registers.

#include "cpu/depthwise_conv2d.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

// Outputs of a block: as many as fit the registers beside a row of weights and an input.
#if defined(__AVX512F__)
constexpr int kMaxBlock = 16;
#else
constexpr int kMaxBlock = 8;
#endif

// ---- tiles and their rows -----------------------------------------------------------------------

struct Tile {
  int64_t group, n, phase;
  int64_t row0, row1, rows;  // of a phase's rows
  int64_t x0, x1;            // columns of the output
  int64_t in0, in1;          // those it reads
};

FASTFUSE_INLINE Tile tile_of(const DepthwiseTiles& t, int64_t group, int64_t index) {
  Tile tile;
  tile.group = group;
  const int64_t column = index % t.column_tiles;
  index /= t.column_tiles;
  const int64_t row = index % t.row_tiles;
  index /= t.row_tiles;
  tile.phase = index % t.phases;
  tile.n = index / t.phases;
  tile.rows = (t.height - tile.phase + t.dilation - 1) / t.dilation;
  tile.row0 = tile.rows * row / t.row_tiles;
  tile.row1 = tile.rows * (row + 1) / t.row_tiles;
  const int64_t units = (t.width + t.column_unit - 1) / t.column_unit;
  tile.x0 = units * column / t.column_tiles * t.column_unit;
  tile.x1 = smaller(units * (column + 1) / t.column_tiles * t.column_unit, t.width);
  const int64_t reach = t.kernel_size / 2 * t.dilation;
  tile.in0 = larger(tile.x0 - reach, 0);
  tile.in1 = smaller(tile.x1 + reach, t.width);
  return tile;
}

template <class S>
FASTFUSE_INLINE S* at(const Image& image, int64_t n, int64_t c, int64_t y, int64_t x) {
  return static_cast<S*>(image.data) + n * image.stride_n + c * image.stride_c +
         y * image.stride_h + x * image.stride_w;
}

// A square of a vector by a vector, rows with unit stride.
template <class A, class From, class To>
FASTFUSE_INLINE void copy_transposed(const From* from, int64_t from_stride, To* to,
                                     int64_t to_stride) {
  Vec<A> square[kLanes<A>];
  unrolled<0, kLanes<A>>([&](auto i) __attribute__((always_inline)) {
    square[i.value] = load(from);
    from += from_stride;
  });
  transpose<A>(square);
  unrolled<0, kLanes<A>>([&](auto i) __attribute__((always_inline)) {
    store(to, square[i.value]);
    to += to_stride;
  });
}

// Columns [x0, x1) of a row and `channels` channels from c on, to `vectors` buffers
// [column][lane] that are `distance` apart; lanes without a channel become 0.
template <class S, bool ChannelsLast, class A>
FASTFUSE_INLINE void read_row(const Image& image, int64_t n, int64_t c, int64_t channels, int64_t y,
                              int64_t x0, int64_t x1, A* buffer, int64_t distance) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t v = 0; v * lanes < channels; ++v) {
    const int64_t count = smaller(channels - v * lanes, lanes);
    const S* from = at<const S>(image, n, c + v * lanes, y, x0);
    A* to = buffer + v * distance;
    if constexpr (ChannelsLast) {
      if (count == lanes) {
        for (int64_t x = x0; x < x1; ++x, from += image.stride_w, to += lanes)
          store(to, load(from));
      } else {
        for (int64_t x = x0; x < x1; ++x, from += image.stride_w, to += lanes)
          store(to, load_partial(from, count));
      }
    } else {
      for (int64_t x = x0; x < x1; x += lanes, from += lanes, to += lanes * lanes) {
        const int64_t columns = smaller(x1 - x, lanes);
        if (columns == lanes && count == lanes) {
          copy_transposed<A>(from, image.stride_c, to, lanes);
          continue;
        }
        Vec<A> square[lanes] = {};
        for (int64_t i = 0; i < count; ++i) {
          const S* row = from + i * image.stride_c;
          square[i] = columns == lanes ? load(row) : load_partial(row, columns);
        }
        transpose<A>(square);
        for (int64_t i = 0; i < columns; ++i) store(to + i * lanes, square[i]);
      }
    }
  }
}

// Columns [x0, x1) of a row for `channels` channels, into the second-level cache: hardware does not
// foresee rows.
template <class S, bool ChannelsLast, int Write>
FASTFUSE_INLINE void prefetch_row(const Image& image, int64_t n, int64_t c, int64_t channels,
                                  int64_t y, int64_t x0, int64_t x1) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  const S* p = at<const S>(image, n, c, y, x0);
  if constexpr (ChannelsLast) {
    for (int64_t x = x0; x < x1; ++x, p += image.stride_w)
      for (int64_t i = 0; i < channels; i += kLine) __builtin_prefetch(p + i, Write, 2);
  } else {
    for (int64_t i = 0; i < channels; ++i, p += image.stride_c)
      for (int64_t x = 0; x < x1 - x0; x += kLine) __builtin_prefetch(p + x, Write, 2);
  }
}

// The way back for one vector of channels, with an addend where there is one.
template <class S, bool ChannelsLast, class A>
FASTFUSE_INLINE void write_row(const Image& image, const Image& addend, int64_t n, int64_t c,
                               int64_t count, int64_t y, int64_t x0, int64_t x1, const A* buffer) {
  constexpr int64_t lanes = kLanes<A>;
  S* to = at<S>(image, n, c, y, x0);
  const S* plus = addend.data ? at<const S>(addend, n, c, y, x0) : nullptr;
  if constexpr (ChannelsLast) {
    const auto pixels = [&](auto load_some, auto store_some) {
      if (plus) {
        for (int64_t x = x0; x < x1; ++x, buffer += lanes, to += image.stride_w) {
          store_some(to, load(buffer) + load_some(plus));
          plus += addend.stride_w;
        }
      } else {
        for (int64_t x = x0; x < x1; ++x, buffer += lanes, to += image.stride_w)
          store_some(to, load(buffer));
      }
    };
    if (count == lanes)
      pixels([](const S* p) { return load(p); }, [](S* p, Vec<A> v) { store(p, v); });
    else
      pixels([count](const S* p) { return load_partial(p, count); },
             [count](S* p, Vec<A> v) { store_partial(p, v, count); });
  } else {
    for (int64_t x = x0; x < x1; x += lanes, buffer += lanes * lanes) {
      const int64_t columns = smaller(x1 - x, lanes);
      if (columns == lanes && count == lanes && !plus) {
        copy_transposed<A>(buffer, lanes, to + (x - x0), image.stride_c);
        continue;
      }
      Vec<A> square[lanes] = {};
      for (int64_t i = 0; i < columns; ++i) square[i] = load(buffer + i * lanes);
      transpose<A>(square);
      for (int64_t i = 0; i < count; ++i) {
        S* row = to + i * image.stride_c + (x - x0);
        const S* more = plus ? plus + i * addend.stride_c + (x - x0) : nullptr;
        if (columns == lanes)
          store(row, more ? square[i] + load(more) : square[i]);
        else
          store_partial(row, more ? square[i] + load_partial(more, columns) : square[i], columns);
      }
    }
  }
}

// `count` dense rows (taps) for the channels of a vector, to or from [tap][lane].
template <class S, class A>
FASTFUSE_INLINE void read_taps(const S* from, int64_t taps, int64_t count, bool flip, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t t = 0; t < taps; t += lanes) {
    const int64_t here = smaller(taps - t, lanes);
    Vec<A> square[lanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const S* p = from + i * taps + t;
      square[i] = here == lanes ? load(p) : load_partial(p, here);
    }
    transpose<A>(square);
    for (int64_t i = 0; i < here; ++i)
      store(to + (flip ? taps - 1 - (t + i) : t + i) * lanes, square[i]);
  }
}

template <class S, class A>
FASTFUSE_INLINE void write_taps(const A* from, int64_t taps, int64_t count, S* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t t = 0; t < taps; t += lanes) {
    const int64_t here = smaller(taps - t, lanes);
    Vec<A> square[lanes] = {};
    for (int64_t i = 0; i < here; ++i) square[i] = load(from + (t + i) * lanes);
    transpose<A>(square);
    for (int64_t i = 0; i < count; ++i) {
      S* p = to + i * taps + t;
      here == lanes ? store(p, square[i]) : store_partial(p, square[i], here);
    }
  }
}

// ---- blocks ------------------------------------------------------------------------------------

// A block's outputs are `step` apart, the first at `offset` of every row. Rows are those inside the
// image, `rows` of them, to be met by the kernel's rows from `weight` on. At the image's left or
// right edge there is nothing beyond the block.
template <class A>
struct Block {
  const A* const* row;
  int64_t rows;
  int64_t offset, step;
  bool left, right;
};

// For each input in reach of a block of P outputs: use(Count<its place, from -r on>, address).
template <int K, int P, class A, class Use>
FASTFUSE_INLINE void for_inputs(const A* first, int64_t step, bool left, bool right, Use use) {
  constexpr int r = K / 2;
  if (!left) {
    const A* p = first - r * step;
    unrolled<-r, 0>([&](auto place) __attribute__((always_inline)) {
      use(place, p);
      p += step;
    });
  }
  const A* p = first;
  unrolled<0, P>([&](auto place) __attribute__((always_inline)) {
    use(place, p);
    p += step;
  });
  if (!right) {
    unrolled<P, P + r>([&](auto place) __attribute__((always_inline)) {
      use(place, p);
      p += step;
    });
  }
}

template <class A>
using ConvolveBlock = void (*)(const Block<A>&, const A* weight, const A* bias, A* out);

template <class A, int K, int P>
void convolve_block(const Block<A>& b, const A* weight, const A* bias, A* out) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr int r = K / 2;
  Vec<A> sum[P];
  const Vec<A> start = load(bias);
  unrolled<0, P>([&](auto p) __attribute__((always_inline)) { sum[p.value] = start; });
  for (int64_t y = 0; y < b.rows; ++y, weight += K * lanes) {
    Vec<A> w[K];
    unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
      w[kx.value] = load(weight + kx.value * lanes);
    });
    for_inputs<K, P>(b.row[y] + b.offset, b.step, b.left, b.right,
                     [&](auto place, const A* input) __attribute__((always_inline)) {
                       const Vec<A> in = load(input);
                       unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
                         constexpr int p = decltype(place)::value + r - decltype(kx)::value;
                         if constexpr (0 <= p && p < P) sum[p] += in * w[kx.value];
                       });
                     });
  }
  unrolled<0, P>([&](auto p) __attribute__((always_inline)) {
    store(out, sum[p.value]);
    out += b.step;
  });
}

template <class A>
using SumBlock = void (*)(const Block<A>&, const A* grad, A* sums);

// sums[ky][kx] += sum_p grad[p] * row[ky][p + kx - r]
template <class A, int K, int P>
void sum_block(const Block<A>& b, const A* grad, A* sums) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr int r = K / 2;
  Vec<A> g[P];
  unrolled<0, P>([&](auto p) __attribute__((always_inline)) {
    g[p.value] = load(grad);
    grad += b.step;
  });
  for (int64_t y = 0; y < b.rows; ++y, sums += K * lanes) {
    Vec<A> sum[K];
    unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
      sum[kx.value] = load(sums + kx.value * lanes);
    });
    for_inputs<K, P>(b.row[y] + b.offset, b.step, b.left, b.right,
                     [&](auto place, const A* input) __attribute__((always_inline)) {
                       const Vec<A> in = load(input);
                       unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
                         constexpr int p = decltype(place)::value + r - decltype(kx)::value;
                         if constexpr (0 <= p && p < P) sum[kx.value] += in * g[p];
                       });
                     });
    unrolled<0, K>([&](auto kx) __attribute__((always_inline)) {
      store(sums + kx.value * lanes, sum[kx.value]);
    });
  }
}

template <class A>
struct Blocks {
  ConvolveBlock<A> convolve[kMaxBlock];
  SumBlock<A> sum[kMaxBlock];
};

template <class A, int K, int... P>
struct MakeBlocks : MakeBlocks<A, K, kMaxBlock - static_cast<int>(sizeof...(P)), P...> {};
template <class A, int K, int... P>
struct MakeBlocks<A, K, 1, P...> {
  static constexpr Blocks<A> value = {{convolve_block<A, K, 1>, convolve_block<A, K, P>...},
                                      {sum_block<A, K, 1>, sum_block<A, K, P>...}};
};

template <class A>
FASTFUSE_INLINE const Blocks<A>* blocks_of(int64_t kernel_size) {
  switch (kernel_size) {
    case 3:
      return &MakeBlocks<A, 3>::value;
    case 5:
      return &MakeBlocks<A, 5>::value;
    case 7:
      return &MakeBlocks<A, 7>::value;
    default:
      return nullptr;
  }
}

// The input rows that one output row reads, inside the image, and where they start.
template <class A>
struct Rows {
  const A** row;
  int64_t first, count;  // of the kernel's rows
};

// Calls block(outputs - 1, its first column, left, right) for the blocks of a row of a tile, and
// before each `between` of the columns [begin, end) that are its share of the row: what is wanted
// next is asked for little by little.
template <class Do, class Between>
FASTFUSE_INLINE void for_blocks(const DepthwiseTiles& t, const Tile& tile, Do block,
                                Between between) {
  const int64_t width = tile.x1 - tile.x0;
  int64_t done = 0;
  for (int64_t phase = 0; phase < smaller(t.dilation, width); ++phase) {
    const int64_t outputs = (width - phase + t.dilation - 1) / t.dilation;
    const int64_t blocks = (outputs + kMaxBlock - 1) / kMaxBlock;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = outputs * i / blocks, end = outputs * (i + 1) / blocks;
      between(tile.x0 + done, tile.x0 + done + (end - begin));
      done += end - begin;
      block(end - begin - 1, phase + begin * t.dilation, i == 0 && tile.x0 == 0,
            i == blocks - 1 && tile.x1 == t.width);
    }
  }
}

// Calls tap(kx, first output, end) for the outputs of a row for which a tap is inside, and the
// distance from an output's column to the input it meets, in the buffer of inputs.
template <class Do>
FASTFUSE_INLINE void for_taps(const DepthwiseTiles& t, const Tile& tile, Do tap) {
  for (int64_t kx = 0; kx < t.kernel_size; ++kx) {
    const int64_t shift = (kx - t.kernel_size / 2) * t.dilation;
    const int64_t begin = larger(tile.x0, -shift), end = smaller(tile.x1, t.width - shift);
    tap(kx, begin - tile.x0, end - tile.x0, tile.x0 + shift - tile.in0);
  }
}

template <class A, class Between>
FASTFUSE_INLINE void convolve_row(const DepthwiseTiles& t, const Tile& tile, const Rows<A>& rows,
                                  const A* weight, const A* bias, A* out, Between between) {
  constexpr int64_t lanes = kLanes<A>;
  weight += rows.first * t.kernel_size * lanes;
  if (const Blocks<A>* blocks = blocks_of<A>(t.kernel_size)) {
    const int64_t step = t.dilation * lanes, start = tile.x0 - tile.in0;
    for_blocks(
        t, tile,
        [&](int64_t size, int64_t x, bool left, bool right) {
          const Block<A> block{rows.row, rows.count, (start + x) * lanes, step, left, right};
          blocks->convolve[size](block, weight, bias, out + x * lanes);
        },
        between);
    return;
  }
  for (int64_t x = 0; x < tile.x1 - tile.x0; ++x) store(out + x * lanes, load(bias));
  for (int64_t y = 0; y < rows.count; ++y)
    for_taps(t, tile, [&](int64_t kx, int64_t begin, int64_t end, int64_t shift) {
      const Vec<A> w = load(weight + (y * t.kernel_size + kx) * lanes);
      const A* in = rows.row[y] + shift * lanes;
      for (int64_t x = begin; x < end; ++x)
        store(out + x * lanes, load(out + x * lanes) + load(in + x * lanes) * w);
    });
}

template <class A, class Between>
FASTFUSE_INLINE void sum_row(const DepthwiseTiles& t, const Tile& tile, const Rows<A>& rows,
                             const A* grad, A* sums, Between between) {
  constexpr int64_t lanes = kLanes<A>;
  sums += rows.first * t.kernel_size * lanes;
  if (const Blocks<A>* blocks = blocks_of<A>(t.kernel_size)) {
    const int64_t step = t.dilation * lanes, start = tile.x0 - tile.in0;
    for_blocks(
        t, tile,
        [&](int64_t size, int64_t x, bool left, bool right) {
          const Block<A> block{rows.row, rows.count, (start + x) * lanes, step, left, right};
          blocks->sum[size](block, grad + x * lanes, sums);
        },
        between);
    return;
  }
  for (int64_t y = 0; y < rows.count; ++y)
    for_taps(t, tile, [&](int64_t kx, int64_t begin, int64_t end, int64_t shift) {
      const A* in = rows.row[y] + shift * lanes;
      Vec<A> sum = load(sums + (y * t.kernel_size + kx) * lanes);
      for (int64_t x = begin; x < end; ++x) sum += load(grad + x * lanes) * load(in + x * lanes);
      store(sums + (y * t.kernel_size + kx) * lanes, sum);
    });
}

// ---- bodies ------------------------------------------------------------------------------------

// The last rows that were read: as many as a result needs, each [vector][column][lane].
template <class S, bool ChannelsLast, class A = compute_t<S>>
class Ring {
 public:
  Ring(const DepthwiseTiles& t, const Image& x, const Tile& tile, int64_t channels, A* memory)
      : t_(t),
        x_(x),
        tile_(tile),
        channels_(channels),
        distance_((tile.in1 - tile.in0) * kLanes<A>),
        memory_(memory),
        next_(larger(tile.row0 - t.kernel_size / 2, 0)) {}

  // Reads what output row i needs.
  FASTFUSE_INLINE void advance(int64_t i) {
    const int64_t end = smaller(i + t_.kernel_size / 2 + 1, tile_.rows);
    for (; next_ < end; ++next_)
      read_row<S, ChannelsLast>(x_, tile_.n, tile_.group * t_.group_channels, channels_,
                                tile_.phase + next_ * t_.dilation, tile_.in0, tile_.in1,
                                place(next_, 0), distance_);
  }

  // Columns of the row that output row i + 1 will read, or, at the end, of a first row of the next
  // tile, if it is the same group's.
  FASTFUSE_INLINE void prefetch(int64_t i, const Tile& next, int64_t x0, int64_t x1) const {
    const int64_t row = i + t_.kernel_size / 2 + 1;
    if (row < tile_.rows && i + 1 < tile_.row1) prefetch_row_of(tile_, row, x0, x1);
    const int64_t first = larger(next.row0 - t_.kernel_size / 2, 0);
    const int64_t wanted = first + t_.kernel_size - (tile_.row1 - i);
    if (wanted >= first && wanted < smaller(next.row0 + t_.kernel_size / 2 + 1, next.rows))
      prefetch_row_of(next, wanted, next.x0 + (x0 - tile_.x0),
                      smaller(next.x0 + (x1 - tile_.x0), next.x1));
  }

  FASTFUSE_INLINE Rows<A> rows(int64_t i, int64_t vector, const A** pointers) {
    const int64_t r = t_.kernel_size / 2;
    const int64_t begin = larger(i - r, 0), end = smaller(i + r + 1, tile_.rows);
    for (int64_t y = begin; y < end; ++y) pointers[y - begin] = place(y, vector);
    return {pointers, begin - (i - r), end - begin};
  }

 private:
  FASTFUSE_INLINE void prefetch_row_of(const Tile& tile, int64_t row, int64_t x0,
                                       int64_t x1) const {
    prefetch_row<S, ChannelsLast, 0>(x_, tile.n, tile.group * t_.group_channels, channels_,
                                     tile.phase + row * t_.dilation, x0, x1);
  }
  FASTFUSE_INLINE A* place(int64_t row, int64_t vector) {
    const int64_t vectors = (channels_ + kLanes<A> - 1) / kLanes<A>;
    return memory_ + (row % t_.kernel_size * vectors + vector) * distance_;
  }

  const DepthwiseTiles& t_;
  const Image& x_;
  const Tile& tile_;
  int64_t channels_, distance_;
  A* memory_;
  int64_t next_;
};

// Scratch memory of a thread, in this order.
template <class A>
struct Buffers {
  A *taps, *bias, *row, *ring;
  const A** pointers;

  static int64_t columns(const DepthwiseTiles& t) {  // of a tile, at most
    return smaller(t.width, t.width / t.column_tiles + 2 * t.column_unit);
  }
  static int64_t group(const DepthwiseTiles& t) {
    return (t.group_channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  }
  static int64_t ring_size(const DepthwiseTiles& t) {
    const int64_t reach = t.kernel_size / 2 * t.dilation;
    return t.kernel_size * smaller(columns(t) + 2 * reach, t.width) * group(t);
  }
  static int64_t bytes(const DepthwiseTiles& t) {
    const int64_t elements =
        (t.kernel_size * t.kernel_size + 1 + columns(t)) * group(t) + ring_size(t);
    return elements * static_cast<int64_t>(sizeof(A)) +
           t.kernel_size * static_cast<int64_t>(sizeof(A*));
  }
  Buffers(const DepthwiseTiles& t, void* scratch) {
    taps = static_cast<A*>(scratch);
    bias = taps + t.kernel_size * t.kernel_size * group(t);
    row = bias + group(t);
    ring = row + columns(t) * group(t);
    pointers = reinterpret_cast<const A**>(ring + ring_size(t));
  }
};

template <class S, bool ChannelsLast>
void forward(const DepthwiseForward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const DepthwiseTiles& t = op.tiles;
  const int64_t k2 = t.kernel_size * t.kernel_size;
  const Buffers<A> buffers(t, scratch);
  int64_t packed = -1, channels = 0, vectors = 0, c0 = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile tile = tile_of(t, unit / t.tiles(), unit % t.tiles());
    if (tile.group != packed) {
      packed = tile.group;
      c0 = tile.group * t.group_channels;
      channels = smaller(t.group_channels, t.channels - c0);
      vectors = (channels + lanes - 1) / lanes;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = c0 + v * lanes, count = smaller(lanes, channels - v * lanes);
        read_taps(static_cast<const S*>(op.weight) + c * k2, k2, count, op.flip,
                  buffers.taps + v * k2 * lanes);
        const S* bias = static_cast<const S*>(op.bias) + c;
        store(buffers.bias + v * lanes, !op.bias         ? Vec<A>{}
                                        : count == lanes ? load(bias)
                                                         : load_partial(bias, count));
      }
    }
    const Tile next =
        unit + 1 < end ? tile_of(t, (unit + 1) / t.tiles(), (unit + 1) % t.tiles()) : tile;
    Ring<S, ChannelsLast> ring(t, op.x, tile, channels, buffers.ring);
    for (int64_t i = tile.row0; i < tile.row1; ++i) {
      ring.advance(i);
      for (int64_t v = 0; v < vectors; ++v) {
        convolve_row<A>(t, tile, ring.rows(i, v, buffers.pointers), buffers.taps + v * k2 * lanes,
                        buffers.bias + v * lanes, buffers.row, [&](int64_t x0, int64_t x1) {
                          if (v > 0) return;
                          ring.prefetch(i, next, x0, x1);
                          if (i + 1 < tile.row1)
                            prefetch_row<S, ChannelsLast, 1>(op.out, tile.n, c0, channels,
                                                             tile.phase + (i + 1) * t.dilation, x0,
                                                             x1);
                        });
        write_row<S, ChannelsLast>(op.out, op.addend, tile.n, c0 + v * lanes,
                                   smaller(lanes, channels - v * lanes),
                                   tile.phase + i * t.dilation, tile.x0, tile.x1, buffers.row);
      }
    }
  }
}

template <class S, bool ChannelsLast>
void sum(const DepthwiseWeightGradient& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const DepthwiseTiles& t = op.tiles;
  const int64_t k2 = t.kernel_size * t.kernel_size;
  const Buffers<A> buffers(t, scratch);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / op.parts, part = unit % op.parts;
    const int64_t c0 = group * t.group_channels;
    const int64_t channels = smaller(t.group_channels, t.channels - c0);
    const int64_t vectors = (channels + lanes - 1) / lanes;
    A* sums = static_cast<A*>(op.sums) + unit * (k2 + 1) * t.group_channels;
    for (int64_t i = 0; i < (k2 + 1) * vectors; ++i) store(sums + i * lanes, Vec<A>{});
    for (int64_t index = t.tiles() * part / op.parts; index < t.tiles() * (part + 1) / op.parts;
         ++index) {
      const Tile tile = tile_of(t, group, index);
      const int64_t width = tile.x1 - tile.x0;
      const Tile next = tile_of(t, group, index + 1 < t.tiles() ? index + 1 : index);
      Ring<S, ChannelsLast> ring(t, op.x, tile, channels, buffers.ring);
      for (int64_t i = tile.row0; i < tile.row1; ++i) {
        ring.advance(i);
        read_row<S, ChannelsLast>(op.grad_output, tile.n, c0, channels, tile.phase + i * t.dilation,
                                  tile.x0, tile.x1, buffers.row, width * lanes);
        for (int64_t v = 0; v < vectors; ++v) {
          A* mine = sums + v * (k2 + 1) * lanes;
          const A* grad = buffers.row + v * width * lanes;
          sum_row<A>(
              t, tile, ring.rows(i, v, buffers.pointers), grad, mine, [&](int64_t x0, int64_t x1) {
                if (v > 0) return;
                ring.prefetch(i, next, x0, x1);
                if (i + 1 < tile.row1)
                  prefetch_row<S, ChannelsLast, 0>(op.grad_output, tile.n, c0, channels,
                                                   tile.phase + (i + 1) * t.dilation, x0, x1);
              });
          Vec<A> total = load(mine + k2 * lanes);
          for (int64_t x = 0; x < width; ++x) total += load(grad + x * lanes);
          store(mine + k2 * lanes, total);
        }
      }
    }
  }
}

template <class S>
void reduce(const DepthwiseWeightGradient& op, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const DepthwiseTiles& t = op.tiles;
  const int64_t k2 = t.kernel_size * t.kernel_size;
  const int64_t size = (k2 + 1) * t.group_channels;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t c0 = group * t.group_channels;
    const int64_t channels = smaller(t.group_channels, t.channels - c0);
    A* total = static_cast<A*>(op.sums) + group * op.parts * size;
    const int64_t used = (k2 + 1) * ((channels + lanes - 1) / lanes) * lanes;
    for (int64_t part = 1; part < op.parts; ++part)
      for (int64_t i = 0; i < used; i += lanes)
        store(total + i, load(total + i) + load(total + part * size + i));
    for (int64_t c = 0; c < channels; c += lanes, total += (k2 + 1) * lanes) {
      const int64_t count = smaller(lanes, channels - c);
      write_taps(total, k2, count, static_cast<S*>(op.grad_weight) + (c0 + c) * k2);
      write_taps(total + k2 * lanes, 1, count, static_cast<S*>(op.grad_bias) + c0 + c);
    }
  }
}

template <class S>
constexpr DepthwiseKernels::Kernel kernel() {
  using A = compute_t<S>;
  return {kLanes<A>,
          Buffers<A>::bytes,
          {forward<S, false>, forward<S, true>},
          {sum<S, false>, sum<S, true>},
          reduce<S>};
}

}  // namespace

extern const DepthwiseKernels depthwise_kernels = {
    {kernel<double>(), kernel<float>(), kernel<bfloat16>(), kernel<float16>()}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
