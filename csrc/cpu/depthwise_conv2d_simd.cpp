// Vector bodies of depthwise_conv2d. docs/depthwise_conv2d.md has the idea and what bounds it.

#include "cpu/depthwise_conv2d.h"
#include "cpu/depthwise_conv2d_blocks.h"
#include "cpu/depthwise_conv2d_rows.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

// Calls block(outputs - 1, its first column, left, right) for the blocks of a row of a tile, as
// even as they can be, and before each `between` of the columns [begin, end) that are its share of
// the row: what is wanted next is asked for little by little.
template <class A, class Do, class Between>
FASTFUSE_INLINE void for_blocks(const DepthwiseTiles& t, const DepthwiseTile& tile, Do block,
                                Between between) {
  const int64_t width = tile.x1 - tile.x0;
  const int64_t whole = width / t.dilation, rest = width % t.dilation;
  int64_t done = tile.x0;
  for (int64_t phase = 0; phase < min_of(t.dilation, width); ++phase) {
    const int64_t outputs = whole + (phase < rest);
    const int64_t blocks = (outputs + kMaxBlock<A> - 1) / kMaxBlock<A>;
    const int64_t size = outputs / blocks, longer = outputs % blocks;
    int64_t x = phase;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t count = size + (i < longer);
      between(done, done + count);
      done += count;
      block(count - 1, x, i == 0 && tile.x0 == 0, i == blocks - 1 && tile.x1 == t.width);
      x += count * t.dilation;
    }
  }
}

// Calls tap(kx, first output, end) for the outputs of a row for which a tap is inside, and the
// distance from an output's column to the input it meets, in the buffer of inputs.
template <class Do>
FASTFUSE_INLINE void for_taps(const DepthwiseTiles& t, const DepthwiseTile& tile, Do tap) {
  for (int64_t kx = 0; kx < t.kernel_size; ++kx) {
    const int64_t shift = (kx - t.kernel_size / 2) * t.dilation;
    const int64_t begin = max_of(tile.x0, -shift), end = min_of(tile.x1, t.width - shift);
    tap(kx, begin - tile.x0, end - tile.x0, tile.x0 + shift - tile.in0);
  }
}

// The input rows that one output row reads, inside the image, and where they start.
template <class A>
struct InputRows {
  const A** row;
  int64_t first, count;  // of the kernel's rows
};

template <class Product, class A, class Between>
FASTFUSE_INLINE void convolve_row(const DepthwiseTiles& t, const DepthwiseTile& tile,
                                  const InputRows<A>& rows, Taps<A> taps, const A* bias, A* out,
                                  Between between) {
  constexpr int64_t lanes = kLanes<A>;
  taps.single += rows.first * t.kernel_size * lanes;
  if constexpr (Product::kPairs) taps.pairs += rows.first * t.kernel_size * lanes;
  if (const Blocks<A>* blocks = blocks_of<Product, A>(t.kernel_size)) {
    const int64_t step = t.dilation * lanes, start = tile.x0 - tile.in0;
    for_blocks<A>(
        t, tile,
        [&](int64_t size, int64_t x, bool left, bool right) {
          const Block<A> block{rows.row, rows.count, (start + x) * lanes, step, left, right};
          blocks->convolve[size](block, taps, bias, out + x * lanes);
        },
        between);
    return;
  }
  for (int64_t x = 0; x < tile.x1 - tile.x0; ++x) store(out + x * lanes, load(bias));
  for (int64_t y = 0; y < rows.count; ++y)
    for_taps(t, tile, [&](int64_t kx, int64_t begin, int64_t end, int64_t shift) {
      const Vec<A> w = load(taps.single + (y * t.kernel_size + kx) * lanes);
      const A* in = rows.row[y] + shift * lanes;
      for (int64_t x = begin; x < end; ++x)
        store(out + x * lanes, load(out + x * lanes) + load(in + x * lanes) * w);
    });
}

template <class Product, class A, class Between>
FASTFUSE_INLINE void sum_row(const DepthwiseTiles& t, const DepthwiseTile& tile,
                             const InputRows<A>& rows, const A* grad, A* sums, Between between) {
  constexpr int64_t lanes = kLanes<A>;
  sums += rows.first * t.kernel_size * lanes;
  if (const Blocks<A>* blocks = blocks_of<Product, A>(t.kernel_size)) {
    const int64_t step = t.dilation * lanes, start = tile.x0 - tile.in0;
    for_blocks<A>(
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

// The rows of an image's phase as kernels see them: values or pairs.
template <class S, bool Paired>
struct PhaseRows {
  const DepthwiseTiles& t;
  const Image& image;
  int64_t channels;

  // Columns [x0, x1) of row y. Paired with the row below it, if that is before `end`; y is -1 where
  // only the row below is inside.
  template <bool ChannelsLast, class A>
  FASTFUSE_INLINE void read(const DepthwiseTile& tile, int64_t y, [[maybe_unused]] int64_t end,
                            int64_t x0, int64_t x1, A* buffer, int64_t distance) const {
    const int64_t c0 = tile.group * t.group_channels;
    const int64_t row = tile.phase + max_of(y, 0) * t.dilation;
#if defined(__AVX512BF16__)
    if constexpr (Paired) {
      const int64_t below = y < 0 ? 0 : t.dilation * image.stride_h;
      read_row<ChannelsLast>(Pairs(y >= 0, y + 1 < end, below), image, tile.n, c0, channels, row,
                             x0, x1, buffer, distance);
      return;
    }
#endif
    read_row<ChannelsLast>(Values<S>{}, image, tile.n, c0, channels, row, x0, x1, buffer, distance);
  }

  // Columns of a row, and of the one below if they are read together.
  template <bool ChannelsLast>
  FASTFUSE_INLINE void ask_for(const DepthwiseTile& tile, int64_t y, int64_t x0, int64_t x1) const {
    prefetch_row<S, ChannelsLast, 0>(image, tile.n, tile.group * t.group_channels, channels,
                                     tile.phase + y * t.dilation, x0, x1);
  }
};

// The last rows that were read: as many as a result needs, each [vector][column][lane].
template <class S, bool ChannelsLast, bool Paired, class A = compute_t<S>>
class Ring {
 public:
  // Results need their rows from `above` on: r rows above their own and, where two rows of results
  // meet pairs of inputs, the pair of which only the lower row is inside.
  Ring(const DepthwiseTiles& t, const Image& x, const DepthwiseTile& tile, int64_t channels,
       A* memory, int64_t top = 0)
      : t_(t),
        rows_{t, x, channels},
        tile_(tile),
        channels_(channels),
        distance_((tile.in1 - tile.in0) * kLanes<A>),
        memory_(memory),
        top_(top),
        next_(max_of(tile.row0 - t.kernel_size / 2, top)) {}

  // Reads what output row i needs.
  FASTFUSE_INLINE void advance(int64_t i) {
    const int64_t end = min_of(i + t_.kernel_size / 2 + 1, tile_.rows);
    for (; next_ < end; ++next_)
      rows_.template read<ChannelsLast>(tile_, next_, tile_.rows, tile_.in0, tile_.in1,
                                        place((next_ - top_) % t_.kernel_size, 0), distance_);
  }

  // Columns of the row that output row i + 1 will read, or, at the end, of a first row of the next
  // tile, if it is the same group's.
  FASTFUSE_INLINE void prefetch(int64_t i, const DepthwiseTile& next, int64_t x0,
                                int64_t x1) const {
    const int64_t row = i + t_.kernel_size / 2 + 1 + Paired;
    if (row < tile_.rows && i + 1 < tile_.row1)
      rows_.template ask_for<ChannelsLast>(tile_, row, x0, x1);
    const int64_t first = max_of(next.row0 - t_.kernel_size / 2, 0);
    const int64_t wanted = first + t_.kernel_size - (tile_.row1 - i);
    if (wanted >= first && wanted < min_of(next.row0 + t_.kernel_size / 2 + 1, next.rows))
      rows_.template ask_for<ChannelsLast>(next, wanted, next.x0 + (x0 - tile_.x0),
                                           min_of(next.x0 + (x1 - tile_.x0), next.x1));
  }

  FASTFUSE_INLINE InputRows<A> rows(int64_t i, int64_t vector, const A** pointers) {
    const int64_t r = t_.kernel_size / 2;
    const int64_t begin = max_of(i - r, top_), end = min_of(i + r + 1, tile_.rows);
    int64_t slot = (begin - top_) % t_.kernel_size;
    for (int64_t y = begin; y < end; ++y) {
      pointers[y - begin] = place(slot, vector);
      if (++slot == t_.kernel_size) slot = 0;
    }
    return {pointers, begin - (i - r), end - begin};
  }

 private:
  FASTFUSE_INLINE A* place(int64_t slot, int64_t vector) {
    const int64_t vectors = (channels_ + kLanes<A> - 1) / kLanes<A>;
    return memory_ + (slot * vectors + vector) * distance_;
  }

  const DepthwiseTiles& t_;
  PhaseRows<S, Paired> rows_;
  const DepthwiseTile& tile_;
  int64_t channels_, distance_;
  A* memory_;
  int64_t top_, next_;
};

// Scratch memory of a thread, in this order.
template <class A>
struct Buffers {
  A *taps, *pairs, *bias, *row, *ring;
  const A** pointers;

  static int64_t columns(const DepthwiseTiles& t) {  // of a tile, at most
    return min_of(t.width, t.width / t.column_tiles + 2 * t.column_unit);
  }
  static int64_t group(const DepthwiseTiles& t) {
    return (t.group_channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  }
  static int64_t ring_size(const DepthwiseTiles& t) {
    const int64_t reach = t.kernel_size / 2 * t.dilation;
    return t.kernel_size * min_of(columns(t) + 2 * reach, t.width) * group(t);
  }
  static int64_t bytes(const DepthwiseTiles& t) {
    const int64_t elements =
        (2 * t.kernel_size * t.kernel_size + 1 + columns(t)) * group(t) + ring_size(t);
    return elements * static_cast<int64_t>(sizeof(A)) +
           t.kernel_size * static_cast<int64_t>(sizeof(A*));
  }
  Buffers(const DepthwiseTiles& t, void* scratch) {
    const int64_t size = t.kernel_size * t.kernel_size * group(t);
    taps = static_cast<A*>(scratch);
    pairs = taps + size;
    bias = pairs + size;
    row = bias + group(t);
    ring = row + columns(t) * group(t);
    pointers = reinterpret_cast<const A**>(ring + ring_size(t));
  }
};

// Whether rows are paired, and how products are formed.
template <class S, bool Paired>
struct Products {
  using type = OfValues<compute_t<S>>;
};
#if defined(__AVX512BF16__)
template <>
struct Products<bfloat16, true> {
  using type = OfPairs;
};

// Each of the float32 taps that are bfloat16 values, with the one a row below.
FASTFUSE_INLINE void pair_taps(const float* taps, int64_t kernel_size, float* pairs) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t row = kernel_size * lanes;
  for (int64_t i = 0; i < (kernel_size - 1) * row; i += lanes) {
    const Bits here = (Bits)load(taps + i), below = (Bits)load(taps + row + i);
    store(pairs + i, (Vec<float>)(here >> 16 | below));
  }
}
#endif

template <class S, bool ChannelsLast, bool Paired>
void forward_tiles(const DepthwiseForward& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  using Product = typename Products<S, Paired>::type;
  constexpr int64_t lanes = kLanes<A>;
  const DepthwiseTiles& t = op.tiles;
  const int64_t k2 = t.kernel_size * t.kernel_size;
  const Buffers<A> buffers(t, scratch);
  int64_t packed = -1, channels = 0, vectors = 0, c0 = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const DepthwiseTile tile = tile_of(t, unit / t.tiles(), unit % t.tiles());
    if (tile.group != packed) {
      packed = tile.group;
      c0 = tile.group * t.group_channels;
      channels = min_of(t.group_channels, t.channels - c0);
      vectors = (channels + lanes - 1) / lanes;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = c0 + v * lanes, count = min_of(lanes, channels - v * lanes);
        A* taps = buffers.taps + v * k2 * lanes;
        read_taps(static_cast<const S*>(op.weight) + c * k2, k2, count, op.flip, taps);
#if defined(__AVX512BF16__)
        if constexpr (Paired) pair_taps(taps, t.kernel_size, buffers.pairs + v * k2 * lanes);
#endif
        const S* bias = static_cast<const S*>(op.bias) + c;
        store(buffers.bias + v * lanes, !op.bias         ? Vec<A>{}
                                        : count == lanes ? load(bias)
                                                         : load_partial(bias, count));
      }
    }
    const int64_t following = unit + 1 < end ? unit + 1 : unit;
    const DepthwiseTile next = tile_of(t, following / t.tiles(), following % t.tiles());
    const int64_t distance = (tile.x1 - tile.x0) * lanes;
    Ring<S, ChannelsLast, Paired> ring(t, op.x, tile, channels, buffers.ring);
    for (int64_t i = tile.row0; i < tile.row1; ++i) {
      ring.advance(i);
      for (int64_t v = 0; v < vectors; ++v) {
        const Taps<A> taps{buffers.taps + v * k2 * lanes, buffers.pairs + v * k2 * lanes};
        convolve_row<Product, A>(
            t, tile, ring.rows(i, v, buffers.pointers), taps, buffers.bias + v * lanes,
            buffers.row + v * distance, [&](int64_t x0, int64_t x1) {
              if (v > 0) return;
              ring.prefetch(i, next, x0, x1);
              if (i + 1 < tile.row1)
                prefetch_row<S, ChannelsLast, 1>(op.out, tile.n, c0, channels,
                                                 tile.phase + (i + 1) * t.dilation, x0, x1);
            });
      }
      write_row<S, ChannelsLast>(op.out, op.addend, tile.n, c0, channels,
                                 tile.phase + i * t.dilation, tile.x0, tile.x1, buffers.row,
                                 distance);
    }
  }
}

// The sum of a gradient's rows, or of both rows of pairs.
template <bool Paired, class A>
FASTFUSE_INLINE Vec<A> sum_of_columns(const A* grad, int64_t width) {
  Vec<A> total = {};
  for (int64_t x = 0; x < width; ++x) {
    const Vec<A> g = load(grad + x * kLanes<A>);
    if constexpr (Paired)
      total += (Vec<A>)((Bits)g << 16) + (Vec<A>)((Bits)g & 0xFFFF0000u);
    else
      total += g;
  }
  return total;
}

template <class S, bool ChannelsLast, bool Paired>
void sum_tiles(const DepthwiseWeightGradient& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  using Product = typename Products<S, Paired>::type;
  constexpr int64_t lanes = kLanes<A>, rows_at_once = Paired ? 2 : 1;
  const DepthwiseTiles& t = op.tiles;
  const int64_t k2 = t.kernel_size * t.kernel_size;
  const Buffers<A> buffers(t, scratch);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / op.parts, part = unit % op.parts;
    const int64_t channels = min_of(t.group_channels, t.channels - group * t.group_channels);
    const int64_t vectors = (channels + lanes - 1) / lanes;
    const PhaseRows<S, Paired> grads{t, op.grad_output, channels};
    A* sums = static_cast<A*>(op.sums) + unit * (k2 + 1) * t.group_channels;
    for (int64_t i = 0; i < (k2 + 1) * vectors; ++i) store(sums + i * lanes, Vec<A>{});
    for (int64_t index = t.tiles() * part / op.parts; index < t.tiles() * (part + 1) / op.parts;
         ++index) {
      const DepthwiseTile tile = tile_of(t, group, index);
      const DepthwiseTile next = tile_of(t, group, index + 1 < t.tiles() ? index + 1 : index);
      const int64_t width = tile.x1 - tile.x0;
      Ring<S, ChannelsLast, Paired> ring(t, op.x, tile, channels, buffers.ring, Paired ? -1 : 0);
      for (int64_t i = tile.row0; i < tile.row1; i += rows_at_once) {
        ring.advance(i);
        grads.template read<ChannelsLast>(tile, i, tile.row1, tile.x0, tile.x1, buffers.row,
                                          width * lanes);
        for (int64_t v = 0; v < vectors; ++v) {
          A* mine = sums + v * (k2 + 1) * lanes;
          const A* grad = buffers.row + v * width * lanes;
          sum_row<Product, A>(
              t, tile, ring.rows(i, v, buffers.pointers), grad, mine, [&](int64_t x0, int64_t x1) {
                if (v > 0) return;
                for (int64_t y = i; y < i + rows_at_once; ++y) {
                  ring.prefetch(y, next, x0, x1);
                  if (y + rows_at_once < tile.row1)
                    grads.template ask_for<ChannelsLast>(tile, y + rows_at_once, x0, x1);
                }
              });
          store(mine + k2 * lanes, load(mine + k2 * lanes) + sum_of_columns<Paired>(grad, width));
        }
      }
    }
  }
}

// bfloat16 rows are paired where there is an instruction for it, and blocks.
template <class S>
FASTFUSE_INLINE bool are_paired([[maybe_unused]] const DepthwiseTiles& t) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(Products<S, true>) && Products<S, true>::type::kPairs)
    return blocks_of<typename Products<S, true>::type, compute_t<S>>(t.kernel_size) != nullptr;
#endif
  return false;
}

template <class S, bool ChannelsLast>
void forward(const DepthwiseForward& op, int64_t begin, int64_t end, void* scratch) {
  if (are_paired<S>(op.tiles))
    forward_tiles<S, ChannelsLast, Products<S, true>::type::kPairs>(op, begin, end, scratch);
  else
    forward_tiles<S, ChannelsLast, false>(op, begin, end, scratch);
}

template <class S, bool ChannelsLast>
void sum(const DepthwiseWeightGradient& op, int64_t begin, int64_t end, void* scratch) {
  if (are_paired<S>(op.tiles))
    sum_tiles<S, ChannelsLast, Products<S, true>::type::kPairs>(op, begin, end, scratch);
  else
    sum_tiles<S, ChannelsLast, false>(op, begin, end, scratch);
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
    const int64_t channels = min_of(t.group_channels, t.channels - c0);
    A* total = static_cast<A*>(op.sums) + group * op.parts * size;
    const int64_t used = (k2 + 1) * ((channels + lanes - 1) / lanes) * lanes;
    for (int64_t part = 1; part < op.parts; ++part)
      for (int64_t i = 0; i < used; i += lanes)
        store(total + i, load(total + i) + load(total + part * size + i));
    for (int64_t c = 0; c < channels; c += lanes, total += (k2 + 1) * lanes) {
      const int64_t count = min_of(lanes, channels - c);
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

#define FASTFUSE_KERNEL(S) kernel<S>()

}  // namespace

extern const DepthwiseKernels depthwise_kernels = {{FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
