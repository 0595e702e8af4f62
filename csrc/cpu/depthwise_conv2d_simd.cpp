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
  const int64_t width = tile.width();
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

// One output row of a vector of channels.
template <class Elements, class A, class Between>
FASTFUSE_INLINE void convolve_row(const DepthwiseTiles& t, const DepthwiseTile& tile,
                                  const InputRows<A>& rows, Taps<A> taps, const A* bias, A* out,
                                  Between between) {
  constexpr int64_t lanes = kLanes<A>;
  taps.single += rows.first * t.kernel_size * lanes;
  taps.pairs += rows.first * t.kernel_size * lanes;
  if (const Blocks<A>* blocks = blocks_of<Elements>(t.kernel_size)) {
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
  for (int64_t x = 0; x < tile.width(); ++x) store(out + x * lanes, load(bias));
  for (int64_t y = 0; y < rows.count; ++y)
    for_taps(t, tile, [&](int64_t kx, int64_t begin, int64_t end, int64_t shift) {
      const Vec<A> w = load(taps.single + (y * t.kernel_size + kx) * lanes);
      const A* in = rows.row[y] + shift * lanes;
      for (int64_t x = begin; x < end; ++x)
        store(out + x * lanes, load(out + x * lanes) + load(in + x * lanes) * w);
    });
}

// What one row of the gradient adds to a vector's sums.
template <class Elements, class A, class Between>
FASTFUSE_INLINE void sum_row(const DepthwiseTiles& t, const DepthwiseTile& tile,
                             const InputRows<A>& rows, const A* grad, A* sums, Between between) {
  constexpr int64_t lanes = kLanes<A>;
  sums += rows.first * t.kernel_size * lanes;
  if (const Blocks<A>* blocks = blocks_of<Elements>(t.kernel_size)) {
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

// ---- rows and memory of a tile -----------------------------------------------------------------

// Part of the rows of a tile's phase, from row y of them on.
FASTFUSE_INLINE RowPart part_of(const DepthwiseTiles& t, const DepthwiseTile& tile, int64_t y,
                                int64_t x0, int64_t x1) {
  return {tile.n, tile.c0, tile.channels, tile.phase + y * t.dilation, x0, x1 - x0};
}

// Reads row y of a tile's phase and, into the same elements, the one below it if they are pairs and
// that is before `end`; y is -1 where only the row below is inside.
template <class Elements, bool ChannelsLast, class A = typename Elements::Compute>
FASTFUSE_INLINE void read_rows(const DepthwiseTiles& t, const DepthwiseTile& tile,
                               const Image& image, int64_t y, int64_t end, int64_t x0, int64_t x1,
                               A* buffer, int64_t distance) {
  const typename Elements::Reader elements(y >= 0, y + 1 < end,
                                           y < 0 ? 0 : t.dilation * image.stride_h);
  read_row<Elements, ChannelsLast>(elements, image, part_of(t, tile, max_of(y, 0), x0, x1), buffer,
                                   distance);
}

// The last rows that were read: as many as a result needs, each [vector][column][lane].
template <class Elements, bool ChannelsLast, class A = typename Elements::Compute>
class Ring {
  using S = typename Elements::Storage;

 public:
  // Results need their rows from `top` on: 0 or, where two rows of results meet pairs of inputs,
  // -1, the pair of which only the lower row is inside.
  Ring(const DepthwiseTiles& t, const Image& x, const DepthwiseTile& tile, A* memory,
       int64_t top = 0)
      : t_(t),
        x_(x),
        tile_(tile),
        distance_((tile.in1 - tile.in0) * kLanes<A>),
        memory_(memory),
        top_(top),
        next_(max_of(tile.row0 - t.kernel_size / 2, top)) {}

  // Reads what output row i needs.
  FASTFUSE_INLINE void advance(int64_t i) {
    const int64_t end = min_of(i + t_.kernel_size / 2 + 1, tile_.rows);
    for (; next_ < end; ++next_)
      read_rows<Elements, ChannelsLast>(t_, tile_, x_, next_, tile_.rows, tile_.in0, tile_.in1,
                                        place((next_ - top_) % t_.kernel_size, 0), distance_);
  }

  // Columns of the row that output row i + 1 will read, or, at the end, of a first row of the next
  // tile, if it is the same group's.
  FASTFUSE_INLINE void prefetch(int64_t i, const DepthwiseTile& next, int64_t x0,
                                int64_t x1) const {
    const int64_t row = i + t_.kernel_size / 2 + Elements::kRows;
    if (row < tile_.rows && i + 1 < tile_.row1)
      prefetch_row<S, ChannelsLast, 0>(x_, part_of(t_, tile_, row, x0, x1));
    const int64_t first = max_of(next.row0 - t_.kernel_size / 2, 0);
    const int64_t wanted = first + t_.kernel_size - (tile_.row1 - i);
    if (wanted >= first && wanted < min_of(next.row0 + t_.kernel_size / 2 + 1, next.rows))
      prefetch_row<S, ChannelsLast, 0>(x_, part_of(t_, next, wanted, next.x0 + (x0 - tile_.x0),
                                                   min_of(next.x0 + (x1 - tile_.x0), next.x1)));
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
    return memory_ + (slot * ceil_div(tile_.channels, kLanes<A>) + vector) * distance_;
  }

  const DepthwiseTiles& t_;
  const Image& x_;
  const DepthwiseTile& tile_;
  int64_t distance_;
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
  static int64_t group(const DepthwiseTiles& t) { return round_up(t.group_channels, kLanes<A>); }
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

// ---- bodies ------------------------------------------------------------------------------------

// Taps and bias of a tile's group, as vectors.
template <class Elements, class A = typename Elements::Compute>
FASTFUSE_INLINE void read_weights(const DepthwiseForward& op, const DepthwiseTile& tile,
                                  const Buffers<A>& buffers) {
  using S = typename Elements::Storage;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t k = op.tiles.kernel_size, k2 = k * k;
  for (int64_t v = 0; v * lanes < tile.channels; ++v) {
    const int64_t c = tile.c0 + v * lanes, count = min_of(lanes, tile.channels - v * lanes);
    A* taps = buffers.taps + v * k2 * lanes;
    read_taps(static_cast<const S*>(op.weight) + c * k2, k2, count, op.flip, taps);
    Elements::pair_taps(taps, k, buffers.pairs + v * k2 * lanes);
    const S* bias = static_cast<const S*>(op.bias) + c;
    store(buffers.bias + v * lanes, !op.bias         ? Vec<A>{}
                                    : count == lanes ? load(bias)
                                                     : load_partial(bias, count));
  }
}

template <class Elements, bool ChannelsLast, class A = typename Elements::Compute>
FASTFUSE_INLINE void convolve_tile(const DepthwiseForward& op, const DepthwiseTile& tile,
                                   const DepthwiseTile& next, const Buffers<A>& buffers) {
  using S = typename Elements::Storage;
  constexpr int64_t lanes = kLanes<A>;
  const DepthwiseTiles& t = op.tiles;
  const int64_t taps_size = t.kernel_size * t.kernel_size * lanes;
  const int64_t distance = tile.width() * lanes;
  Ring<Elements, ChannelsLast> ring(t, op.x, tile, buffers.ring);
  for (int64_t i = tile.row0; i < tile.row1; ++i) {
    ring.advance(i);
    for (int64_t v = 0; v * lanes < tile.channels; ++v) {
      const Taps<A> taps{buffers.taps + v * taps_size, buffers.pairs + v * taps_size};
      convolve_row<Elements>(
          t, tile, ring.rows(i, v, buffers.pointers), taps, buffers.bias + v * lanes,
          buffers.row + v * distance, [&](int64_t x0, int64_t x1) {
            if (v > 0) return;
            ring.prefetch(i, next, x0, x1);
            if (i + 1 < tile.row1)
              prefetch_row<S, ChannelsLast, 1>(op.out, part_of(t, tile, i + 1, x0, x1));
          });
    }
    write_row<S, ChannelsLast>(op.out, op.addend, part_of(t, tile, i, tile.x0, tile.x1),
                               buffers.row, distance);
  }
}

template <class Elements, bool ChannelsLast>
void forward_tiles(const DepthwiseForward& op, int64_t begin, int64_t end, void* scratch) {
  const Buffers<typename Elements::Compute> buffers(op.tiles, scratch);
  int64_t group = -1;  // whose weights are in the buffers
  for (int64_t unit = begin; unit < end; ++unit) {
    const DepthwiseTile tile = tile_of(op.tiles, unit);
    if (tile.group != group) read_weights<Elements>(op, tile, buffers);
    group = tile.group;
    const DepthwiseTile next = tile_of(op.tiles, min_of(unit + 1, end - 1));
    convolve_tile<Elements, ChannelsLast>(op, tile, next, buffers);
  }
}

// sums[vector] += those of a tile.
template <class Elements, bool ChannelsLast, class A = typename Elements::Compute>
FASTFUSE_INLINE void sum_tile(const DepthwiseWeightGradient& op, const DepthwiseTile& tile,
                              const DepthwiseTile& next, const Buffers<A>& buffers, A* sums) {
  using S = typename Elements::Storage;
  constexpr int64_t lanes = kLanes<A>, rows = Elements::kRows;
  const DepthwiseTiles& t = op.tiles;
  const int64_t bias = t.kernel_size * t.kernel_size * lanes;  // where its sum is, after the taps'
  const int64_t distance = tile.width() * lanes;
  Ring<Elements, ChannelsLast> ring(t, op.x, tile, buffers.ring, 1 - rows);
  for (int64_t i = tile.row0; i < tile.row1; i += rows) {
    ring.advance(i);
    read_rows<Elements, ChannelsLast>(t, tile, op.grad_output, i, tile.row1, tile.x0, tile.x1,
                                      buffers.row, distance);
    for (int64_t v = 0; v * lanes < tile.channels; ++v) {
      A* mine = sums + v * (bias + lanes);
      const A* grad = buffers.row + v * distance;
      sum_row<Elements>(t, tile, ring.rows(i, v, buffers.pointers), grad, mine,
                        [&](int64_t x0, int64_t x1) {
                          if (v > 0) return;
                          for (int64_t y = i; y < i + rows; ++y) {
                            ring.prefetch(y, next, x0, x1);
                            if (y + rows < tile.row1)
                              prefetch_row<S, ChannelsLast, 0>(op.grad_output,
                                                               part_of(t, tile, y + rows, x0, x1));
                          }
                        });
      Vec<A> total = {};
      for (int64_t x = 0; x < distance; x += lanes) total += Elements::sum_of_rows(load(grad + x));
      store(mine + bias, load(mine + bias) + total);
    }
  }
}

// Part of a group's tiles, whose sums stand together.
struct Part {
  int64_t group, begin, end;

  Part(const DepthwiseWeightGradient& op, int64_t unit) : group(unit / op.parts) {
    const int64_t part = unit % op.parts, tiles = op.tiles.tiles();
    begin = group * tiles + tiles * part / op.parts;
    end = group * tiles + tiles * (part + 1) / op.parts;
  }
};

template <class Elements, bool ChannelsLast>
void sum_tiles(const DepthwiseWeightGradient& op, int64_t begin, int64_t end, void* scratch) {
  using A = typename Elements::Compute;
  const DepthwiseTiles& t = op.tiles;
  const Buffers<A> buffers(t, scratch);
  const int64_t size = (t.kernel_size * t.kernel_size + 1) * t.group_channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part(op, unit);
    A* sums = static_cast<A*>(op.sums) + unit * size;
    for (int64_t i = 0; i < size; i += kLanes<A>) store(sums + i, Vec<A>{});
    for (int64_t index = part.begin; index < part.end; ++index) {
      const DepthwiseTile tile = tile_of(t, index);
      const DepthwiseTile next = tile_of(t, min_of(index + 1, (part.group + 1) * t.tiles() - 1));
      sum_tile<Elements, ChannelsLast>(op, tile, next, buffers, sums);
    }
  }
}

// Pairs have no general way: kernels of other sizes are left to values.
template <class S, bool ChannelsLast>
void forward(const DepthwiseForward& op, int64_t begin, int64_t end, void* scratch) {
  if (blocks_of<BlockElements<S>>(op.tiles.kernel_size))
    forward_tiles<BlockElements<S>, ChannelsLast>(op, begin, end, scratch);
  else
    forward_tiles<Values<S>, ChannelsLast>(op, begin, end, scratch);
}

template <class S, bool ChannelsLast>
void sum(const DepthwiseWeightGradient& op, int64_t begin, int64_t end, void* scratch) {
  if (blocks_of<BlockElements<S>>(op.tiles.kernel_size))
    sum_tiles<BlockElements<S>, ChannelsLast>(op, begin, end, scratch);
  else
    sum_tiles<Values<S>, ChannelsLast>(op, begin, end, scratch);
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
    const int64_t used = (k2 + 1) * round_up(channels, lanes);
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
