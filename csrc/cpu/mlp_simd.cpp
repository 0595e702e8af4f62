// Vector bodies of the MLP of blocks: both products of a tile of pixels, what lies between them,
// and their gradients, without leaving the second-level cache.
//
// Matrices of a tile are transposed, [channel][pixel]: a vector is of pixels, and a weight is read
// as it is, a value at a time. So nothing of it is packed, and its length need not be whole
// vectors.

#include "cpu/mlp.h"
#include "cpu/panels.h"
#include "cpu/pointwise_rows.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

constexpr int kPanelVectors = 2;
template <class A>
constexpr int64_t kPanel = kPanelVectors * kLanes<A>;
constexpr int64_t kMinPanels = 3;  // of a tile, or a weight is read for few pixels
constexpr int64_t kDepth = 256;    // a panel so deep is half a first-level cache
constexpr int64_t kOutputs = 48;   // rows of a weight so deep stay in the second level

// The distance of rows so long: an odd number of cache lines, or columns would meet few sets.
template <class A>
int64_t row_stride(int64_t length) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(A));
  return (ceil_div(length, line) | 1) * line;
}

// A tile: its matrices' sizes.
template <class A>
struct Tile {
  int64_t pixels;                // an odd number of panels, as above, or all there are
  int64_t channels;              // the distance of rows
  int64_t matrix, hidden, rows;  // values of [channel][pixel], [hidden][pixel], [pixel][channel]

  Tile(const Mlp& op, int64_t panels, int matrices, int hiddens) {
    channels = row_stride<A>(op.channels);
    const int64_t outputs = round_up(round_up(op.hidden, kPanelMultiple), kLanes<A>);
    const int64_t each =
        (matrices * channels + hiddens * outputs) * static_cast<int64_t>(sizeof(A));
    const int64_t fitting = max_of(op.tile_bytes / each / kPanel<A>, kMinPanels);
    pixels = min_of(fitting - (fitting % 2 == 0), panels) * kPanel<A>;
    matrix = channels * pixels;
    hidden = outputs * pixels;
    rows = pixels * channels;
  }
};

template <class A>
Tile<A> forward_tile(const Mlp& op, int64_t panels) {
  return Tile<A>(op, panels, 2, 1);
}
template <class A>
Tile<A> backward_tile(const Mlp& op, int64_t panels) {
  return Tile<A>(op, panels, 3, 2);
}

// A panel of out = weight right, or of out += weight right, of exactly so many rows.
template <class A, bool Add>
void multiply_block(A* out, int64_t stride, const A* weight, int64_t weight_stride, int64_t rows,
                    const A* right, int64_t depth) {
  const auto next = [&](auto count) {
    constexpr int n = decltype(count)::value;
    multiply_rows<A, kPanelVectors, Add, n>(out, stride, {weight, weight_stride, 1}, right, stride,
                                            depth);
    out += n * stride;
    weight += n * weight_stride;
    rows -= n;
  };
  constexpr int kRows = kPanelRows<kPanelVectors>;
  while (rows >= kRows) next(Count<kRows>{});
  if (rows >= 8 && kRows > 8) next(Count<8>{});
  if (rows >= 4) next(Count<4>{});
  if (rows >= 2) next(Count<2>{});
  if (rows >= 1) next(Count<1>{});
}

// out[n][t] = sum over k of weight[n][k] right[k][t], of whole panels of pixels; after(first, last)
// follows for rows n that are done.
template <class A, class After>
FASTFUSE_INLINE void multiply_weight(A* out, const A* weight, int64_t outputs, int64_t depth,
                                     const A* right, int64_t stride, int64_t columns, After after) {
  const int64_t block = ceil_div(depth, ceil_div(depth, kDepth));
  for (int64_t n = 0; n < outputs; n += kOutputs) {
    const int64_t rows = min_of(kOutputs, outputs - n);
    for (int64_t k = 0; k < depth; k += block)
      for (int64_t t = 0; t < columns; t += kPanel<A>) {
        A* const to = out + n * stride + t;
        const A *w = weight + n * depth + k, *from = right + k * stride + t;
        const int64_t here = min_of(block, depth - k);
        if (k == 0)
          multiply_block<A, false>(to, stride, w, depth, rows, from, here);
        else
          multiply_block<A, true>(to, stride, w, depth, rows, from, here);
      }
    after(n, n + rows);
  }
}

// Calls block(n, t) for the blocks of one vector's lanes each way of [begin, end) x [0, columns), a
// panel by as many rows at a time: what is written in their order are whole cache lines.
template <class A, class Do>
FASTFUSE_INLINE void for_blocks(int64_t begin, int64_t end, int64_t columns, Do block) {
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<A>;
  for (int64_t t0 = 0; t0 < columns; t0 += panel)
    for (int64_t n0 = begin; n0 < end; n0 += panel)
      for (int64_t n = n0; n < min_of(n0 + panel, end); n += lanes)
        for (int64_t t = t0; t < t0 + panel; t += lanes) block(n, t);
}

// Rows of an image, from the first of a tile on, from rows [begin, end) of its matrix [n][t].
template <class S, class A = compute_t<S>>
FASTFUSE_INLINE void put_rows(const Rows& rows, int64_t first, const A* from, int64_t stride,
                              int64_t count, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<A>;
  for_blocks<A>(begin, end, round_up(count, kPanel<A>), [&](int64_t n, int64_t t) {
    Vec<A> block[lanes];
    FASTFUSE_UNROLL
    for (int i = 0; i < lanes; ++i) block[i] = load(from + (n + i) * stride + t);
    transpose<A>(block);
    S* const to = row_of<S>(rows, first + t) + n;
    if (t + lanes <= count && n + lanes <= end) {
      FASTFUSE_UNROLL
      for (int i = 0; i < lanes; ++i) store(to + i * rows.stride, block[i]);
      return;
    }
    for (int i = 0; i < lanes && t + i < count; ++i)
      if (n + lanes <= end)
        store(to + i * rows.stride, block[i]);
      else
        store_partial(to + i * rows.stride, block[i], end - n);
  });
}

// Hardware prefetchers do not follow as many rows as a block has.
constexpr int64_t kPrefetched = 512;  // bytes

// The matrix [n][t] of a tile from the rows of an image, with zeros after the last.
template <class S, class A = compute_t<S>>
FASTFUSE_INLINE void get_rows(A* to, int64_t stride, const Rows& rows, int64_t first, int64_t count,
                              int64_t end) {
  constexpr int lanes = kLanes<A>;
  for_blocks<A>(0, end, round_up(count, kPanel<A>), [&](int64_t n, int64_t t) {
    Vec<A> block[lanes] = {};
    const S* const from = row_of<const S>(rows, first + t) + n;
    if (t + lanes <= count && n + lanes <= end) {
      FASTFUSE_UNROLL
      for (int i = 0; i < lanes; ++i) {
        block[i] = load(from + i * rows.stride);
        __builtin_prefetch(from + i * rows.stride + kPrefetched / sizeof(S));
      }
    } else {
      for (int i = 0; i < lanes && t + i < count; ++i)
        block[i] = n + lanes <= end ? load(from + i * rows.stride)
                                    : load_partial(from + i * rows.stride, end - n);
    }
    transpose<A>(block);
    FASTFUSE_UNROLL
    for (int i = 0; i < lanes; ++i) store(to + (n + i) * stride + t, block[i]);
  });
}

// The rows of n, with zeros up to `columns` pixels.
template <class S, class A = compute_t<S>>
FASTFUSE_INLINE void read_inputs(A* rows, int64_t length, const Mlp& op, int64_t first,
                                 int64_t count, int64_t columns, A* values) {
  const A *weight = static_cast<const A*>(op.norm_weight),
          *bias = static_cast<const A*>(op.norm_bias);
  clear(rows + count * length, (columns - count) * length);
  for (int64_t t = 0; t < count; ++t) {
    const S* from = row_of<const S>(op.inputs, first + t);
    A* to = rows + t * length;
    if (weight)
      layer_norm_row<S, A>(to, from, weight, bias, nullptr, false, op.channels, op.eps, values);
    else
      for_channels<A>(op.channels, [&](auto vectors, int64_t c, auto load, auto) {
        for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>)
          fastfuse::store(to + c, load(from + c));
      });
  }
}

// Calls tile(first, count) for the pixels of the panels [begin, end).
template <class A, class Do>
FASTFUSE_INLINE void for_tiles(const Mlp& op, int64_t pixels, int64_t begin, int64_t end, Do tile) {
  const int64_t last = min_of(end * kPanel<A>, op.rows);
  for (int64_t first = begin * kPanel<A>; first < last; first += pixels)
    tile(first, min_of(pixels, last - first));
}

template <class S>
void forward(const Mlp& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const Tile<A> size = forward_tile<A>(op, end - begin);
  const int64_t stride = size.pixels;
  A* rows = static_cast<A*>(scratch);
  A* matrix = rows + size.rows;
  A* hidden = matrix + size.matrix;
  A* values = hidden + size.hidden;
  const auto vector = [](const void* data) { return static_cast<const A*>(data); };
  for_tiles<A>(op, stride, begin, end, [&](int64_t first, int64_t count) {
    const int64_t columns = round_up(count, kPanel<A>);
    read_inputs<S>(rows, size.channels, op, first, count, columns, values);
    transpose_rows(matrix, stride, rows, size.channels, columns, op.channels);
    multiply_weight(hidden, vector(op.fc1_weight), op.hidden, op.channels, matrix, stride, columns,
                    [&](int64_t n0, int64_t n1) {
                      if (op.kept.data) put_rows<S>(op.kept, first, hidden, stride, count, n0, n1);
                      for (int64_t n = n0; n < n1; ++n) {
                        A* h = hidden + n * stride;
                        const A bias = vector(op.fc1_bias)[n];
                        for (int64_t t = 0; t < columns; t += kLanes<A>)
                          store(h + t, gelu<kNarrow<S>>(load(h + t) + bias));
                      }
                    });
    multiply_weight(matrix, vector(op.fc2_weight), op.channels, op.hidden, hidden, stride, columns,
                    [](int64_t, int64_t) {});
    transpose_rows(rows, size.channels, matrix, stride, op.channels, columns);
    for_kept_rows<A>(op.images, first, first + count, [&](int64_t i, A keep) {
      residual_row(row_of<S>(op.out, i), row_of<const S>(op.x, i),
                   rows + (i - first) * size.channels, vector(op.fc2_bias), vector(op.scale), keep,
                   op.channels);
    });
  });
}

template <class A>
MlpSums sums_of(const Mlp& op, bool of_matrices) {
  MlpSums s{};
  s.stride = row_stride<A>(op.channels);
  const int64_t matrix = of_matrices ? round_up(op.hidden, kPanelMultiple) * s.stride : 0;
  s.fc2 = matrix;
  s.fc1_bias = 2 * matrix;
  s.fc2_bias = s.fc1_bias + op.hidden;
  s.norm_weight = s.fc2_bias + op.channels;
  s.norm_bias = s.norm_weight + op.channels;
  s.values = round_up(s.norm_bias + op.channels, kLanes<A>);
  return s;
}

template <class S>
void backward(const MlpBackward& op, int64_t begin, int64_t end, void* part, void* scratch) {
  using A = compute_t<S>;
  const Mlp& f = op.forward;
  const Tile<A> size = backward_tile<A>(f, end - begin);
  const int64_t stride = size.pixels;
  A* n_rows = static_cast<A*>(scratch);
  A* g_rows = n_rows + size.rows;
  A* matrix = g_rows + size.rows;
  A* activated = matrix + size.matrix;
  A* grad_hidden = activated + size.hidden;
  A* values = grad_hidden + size.hidden;
  A* of_tile = values + 2 * size.channels;  // its sums, as those of the part from fc2_bias on
  const int64_t vectors = round_up(f.channels, kLanes<A>);
  const MlpSums at = sums_of<A>(f, op.of_parameters);
  A* sums = static_cast<A*>(part);
  const int64_t written = begin < end ? at.fc1_bias : 0;  // by the first tile
  clear(sums + written, at.values - written);
  const auto vector = [](const void* data) { return static_cast<const A*>(data); };
  for_tiles<A>(f, stride, begin, end, [&](int64_t first, int64_t count) {
    const int64_t columns = round_up(count, kPanel<A>);
    read_inputs<S>(n_rows, size.channels, f, first, count, columns, values);
    if (f.kept.data) {
      get_rows<S>(activated, stride, f.kept, first, count, f.hidden);
    } else {
      transpose_rows(matrix, stride, n_rows, size.channels, columns, f.channels);
      multiply_weight(activated, vector(f.fc1_weight), f.hidden, f.channels, matrix, stride,
                      columns, [](int64_t, int64_t) {});
    }
    clear(of_tile, 3 * f.channels);
    clear(g_rows + count * size.channels, (columns - count) * size.channels);
    for_kept_rows<A>(f.images, first, first + count, [&](int64_t i, A keep) {
      const S* grad = row_of<const S>(op.grad, i);
      A *to = g_rows + (i - first) * size.channels, *sum = of_tile;
      for_channels<A>(f.channels, [&](auto vectors, int64_t c, auto load, auto store) {
        for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>) {
          const Vec<A> g = load(grad + c) * keep;
          fastfuse::store(to + c, g);
          store(sum + c, load(sum + c) + g);
        }
      });
    });
    transpose_rows(matrix, stride, g_rows, size.channels, columns, f.channels);
    multiply_weight(grad_hidden, vector(op.fc2_transposed), f.hidden, f.channels, matrix, stride,
                    columns, [&](int64_t n0, int64_t n1) {
                      for (int64_t n = n0; n < n1; ++n) {
                        A *h = activated + n * stride, *g = grad_hidden + n * stride;
                        const A bias = vector(f.fc1_bias)[n];
                        Vec<A> sum = {};
                        for (int64_t t = 0; t < columns; t += kLanes<A>) {
                          // Float32 vectors get all of float32, of narrow images too.
                          const auto both = gelu_with_derivative<false>(load(h + t) + bias);
                          const Vec<A> grad = load(g + t) * both.derivative;
                          store(h + t, both.value);
                          store(g + t, grad);
                          if (t + kLanes<A> <= count)
                            sum += grad;
                          else  // no pixel that is not there: its zero might meet an infinity
                            for (int64_t i = t; i < count; ++i) sum[i - t] += grad[i - t];
                        }
                        sums[at.fc1_bias + n] += sum_of_lanes<A>(sum);
                      }
                    });
    if (op.of_parameters) {
      const auto add = [&](auto adding, A* to, const A* left, const A* right) {
        multiply<A, decltype(adding)::value>(to, at.stride, {left, stride, 1}, f.hidden, right,
                                             size.channels, count, vectors);
      };
      const auto add_both = [&](auto adding) {
        add(adding, sums + at.fc2, activated, g_rows);
        add(adding, sums + at.fc1, grad_hidden, n_rows);
      };
      if (first > begin * kPanel<A>)
        add_both(Count<true>{});
      else
        add_both(Count<false>{});
    }
    multiply_weight(matrix, vector(op.fc1_transposed), f.channels, f.hidden, grad_hidden, stride,
                    columns, [](int64_t, int64_t) {});
    transpose_rows(g_rows, size.channels, matrix, stride, f.channels, columns);
    for (int64_t t = 0; t < count; ++t) {
      const A* g = g_rows + t * size.channels;
      S* to = row_of<S>(op.grad_inputs, first + t);
      if (f.norm_weight)
        layer_norm_backward_row(to, of_tile + f.channels, of_tile + 2 * f.channels, g,
                                row_of<const S>(f.inputs, first + t), vector(f.norm_weight),
                                vector(f.norm_bias), f.channels, f.eps, false, values);
      else
        for_channels<A>(f.channels, [&](auto vectors, int64_t c, auto load, auto store) {
          for (int v = 0; v < decltype(vectors)::value; ++v, c += kLanes<A>)
            store(to + c, load(g + c));
        });
    }
    for (int64_t i = 0; i < 3 * f.channels; ++i) sums[at.fc2_bias + i] += of_tile[i];
  });
}

template <class A>
void transpose_panels(const Transposition& op, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<A>;
  const A* scale = static_cast<const A*>(op.scale);
  const int64_t last = min_of(end * kPanel<A>, op.columns);
  for (int64_t c0 = begin * kPanel<A>; c0 < last; c0 += kPanel<A>)
    for_blocks<A>(0, op.rows, kPanel<A>, [&](int64_t r, int64_t t) {
      const int64_t c = c0 + t;
      const A* from = static_cast<const A*>(op.from) + r * op.stride + c;
      A* to = static_cast<A*>(op.to) + c * op.rows + r;
      if (r + lanes <= op.rows && c + lanes <= last) {
        Vec<A> block[lanes];
        FASTFUSE_UNROLL
        for (int i = 0; i < lanes; ++i) {
          block[i] = load(from + i * op.stride);
          if (scale) block[i] *= scale[r + i];
        }
        transpose<A>(block);
        FASTFUSE_UNROLL
        for (int i = 0; i < lanes; ++i) store(to + i * op.rows, block[i]);
        return;
      }
      for (int64_t i = 0; i < min_of(lanes, op.rows - r); ++i)
        for (int64_t j = 0; j < min_of(lanes, last - c); ++j)
          to[j * op.rows + i] = from[i * op.stride + j] * (scale ? scale[r + i] : A(1));
    });
}

template <class A>
int64_t forward_bytes(const Mlp& op, int64_t panels) {
  const Tile<A> t = forward_tile<A>(op, panels);
  return (t.rows + t.matrix + t.hidden + t.channels) * static_cast<int64_t>(sizeof(A));
}

template <class A>
int64_t backward_bytes(const Mlp& op, int64_t panels) {
  const Tile<A> t = backward_tile<A>(op, panels);
  return (2 * t.rows + t.matrix + 2 * t.hidden + 5 * t.channels) * static_cast<int64_t>(sizeof(A));
}

template <class S>
constexpr MlpKernels::Kernel kernel() {
  using A = compute_t<S>;
  return {forward<S>, backward<S>, transpose_panels<A>, forward_bytes<A>, backward_bytes<A>,
          sums_of<A>, kPanel<A>};
}

#define FASTFUSE_KERNEL(S) kernel<S>()

}  // namespace

extern const MlpKernels mlp_kernels = {{FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
