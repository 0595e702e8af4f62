// Vector bodies of the Winograd transforms F(4x4, 3x3), compiled once per instruction set.
//
// A tile's output is A^T [(G w G^T) * (B^T d B)] A, summed over channels between the two
// transforms: 36 products for 16 outputs instead of 144. The matrices are those of Toom and Cook
// for the points 0, a, -a, b, -b and infinity. The usual 1 and 2 lose a digit; 5/8 and 3/2 were the
// best of those tried (docs/fusion_conv2d.md), and every constant below but G's is exact in
// float32: the denominators are all there.

#include "cpu/panels.h"
#include "cpu/vec.h"
#include "cpu/winograd.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

struct Tile {
  int64_t n, y, x;  // y and x count in outputs
};

FASTFUSE_INLINE Tile locate(const Winograd& w, int64_t index) {
  const int64_t line = (w.first + index) / w.tiles_x;
  return {line / w.tiles_y, line % w.tiles_y * kWinogradOutputs,
          (w.first + index) % w.tiles_x * kWinogradOutputs};
}

// The pixels of a square from (y, x) on, or what stands for those outside.
template <int Size, class P>
FASTFUSE_INLINE void find_pixels(const Image& image, int64_t n, int64_t y, int64_t x, P* outside,
                                 P** pixels) {
  P* base = static_cast<P*>(image.data) + n * image.stride_n;
  for (int i = 0; i < Size; ++i)
    for (int j = 0; j < Size; ++j) {
      const bool inside = y + i >= 0 && y + i < image.height && x + j >= 0 && x + j < image.width;
      pixels[i * Size + j] =
          inside ? base + (y + i) * image.stride_h + (x + j) * image.stride_w : outside;
    }
}

constexpr double kA = 0.625, kB = 1.5;
constexpr double kA2 = kA * kA, kB2 = kB * kB;
constexpr int kOut = kWinogradOutputs, kIn = kWinogradInputs, kTaps = 3, kSquare = kTaps * kTaps;

// B^T d of six values.
template <class A>
FASTFUSE_INLINE void transform_input(const Vec<A> (&d)[kIn], Vec<A> (&t)[kIn]) {
  constexpr A a = kA, b = kB, a2 = kA2, b2 = kB2, sum = kA2 + kB2, product = kA2 * kB2;
  const Vec<A> even_a = d[4] - b2 * d[2], odd_a = a * (d[3] - b2 * d[1]);
  const Vec<A> even_b = d[4] - a2 * d[2], odd_b = b * (d[3] - a2 * d[1]);
  t[0] = product * d[0] - sum * d[2] + d[4];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = product * d[1] - sum * d[3] + d[5];
}

// A^T m of six values.
template <class A>
FASTFUSE_INLINE void transform_output(const Vec<A> (&m)[kIn], Vec<A> (&y)[kOut]) {
  constexpr A a = kA, b = kB, a2 = kA2, b2 = kB2, a3 = kA * kA2, b3 = kB * kB2;
  const Vec<A> sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vec<A> sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = a * difference_a + b * difference_b;
  y[2] = a2 * sum_a + b2 * sum_b;
  y[3] = a3 * difference_a + b3 * difference_b + m[5];
}

// A g of four values.
template <class A>
FASTFUSE_INLINE void adjoint_output(const Vec<A> (&g)[kOut], Vec<A> (&m)[kIn]) {
  constexpr A a = kA, b = kB, a2 = kA2, b2 = kB2, a3 = kA * kA2, b3 = kB * kB2;
  const Vec<A> even_a = g[0] + a2 * g[2], odd_a = a * g[1] + a3 * g[3];
  const Vec<A> even_b = g[0] + b2 * g[2], odd_b = b * g[1] + b3 * g[3];
  m[0] = g[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = g[3];
}

// `transform` of a square's columns, then of what comes of it by rows: From x From to To x To.
template <class A, int From, int To, class Transform, class Load, class Store>
FASTFUSE_INLINE void on_both_sides(Transform transform, Load load, Store store) {
  Vec<A> columns[To][From];
#pragma GCC unroll 6
  for (int j = 0; j < From; ++j) {
    Vec<A> from[From], to[To];
#pragma GCC unroll 6
    for (int i = 0; i < From; ++i) from[i] = load(i * From + j);
    transform(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < To; ++i) columns[i][j] = to[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < To; ++i) {
    Vec<A> to[To];
    transform(columns[i], to);
#pragma GCC unroll 6
    for (int j = 0; j < To; ++j) store(i * To + j, to[j]);
  }
}

template <class A>
FASTFUSE_INLINE A* element(const Winograd& w, int64_t tile, int i) {
  return static_cast<A*>(w.elements[i]) + tile * w.stride_tile;
}

template <class S>
void input(const Winograd& w, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = locate(w, t);
    const S* pixels[kIn * kIn];
    find_pixels<kIn>(w.image, tile.n, tile.y - w.padding, tile.x - w.padding,
                     static_cast<const S*>(w.zeros), pixels);
    for_each_vector<A>(w.channels, [&](int64_t c, auto load, auto store) {
      on_both_sides<A, kIn, kIn>([](const auto& d, auto& to) { transform_input<A>(d, to); },
                                 [&](int i) { return load(pixels[i] + c); },
                                 [&](int i, Vec<A> v) { store(element<A>(w, t, i) + c, v); });
    });
  }
}

template <class S>
void output(const Winograd& w, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = locate(w, t);
    S* pixels[kOut * kOut];
    find_pixels<kOut>(w.image, tile.n, tile.y, tile.x, static_cast<S*>(w.nowhere), pixels);
    for_each_vector<A>(w.channels, [&](int64_t c, auto load, auto store) {
      const Vec<A> bias = w.bias ? load(static_cast<const A*>(w.bias) + c) : Vec<A>{};
      on_both_sides<A, kIn, kOut>([](const auto& m, auto& to) { transform_output<A>(m, to); },
                                  [&](int i) { return load(element<const A>(w, t, i) + c); },
                                  [&](int i, Vec<A> v) { store(pixels[i] + c, v + bias); });
    });
  }
}

template <class S>
void output_adjoint(const Winograd& w, int64_t begin, int64_t end) {
  using A = compute_t<S>;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = locate(w, t);
    const S* pixels[kOut * kOut];
    find_pixels<kOut>(w.image, tile.n, tile.y, tile.x, static_cast<const S*>(w.zeros), pixels);
    for_each_vector<A>(w.channels, [&](int64_t c, auto load, auto store) {
      on_both_sides<A, kOut, kIn>([](const auto& g, auto& to) { adjoint_output<A>(g, to); },
                                  [&](int i) { return load(pixels[i] + c); },
                                  [&](int i, Vec<A> v) { store(element<A>(w, t, i) + c, v); });
    });
  }
}

// ---- products with a weight ----

constexpr int kPanelVectors = 2;
constexpr int64_t kDepth = 128;  // of a panel of transformed weights: 36 x 128 x 64 bytes (AVX2)
template <class A>
constexpr int64_t kPanel = kPanelVectors * kLanes<A>;

// G g of three taps.
template <class A>
FASTFUSE_INLINE void transform_taps(const Vec<A> (&g)[kTaps], Vec<A> (&t)[kIn]) {
  constexpr double of_a = 1 / (2 * kA2 * (kA2 - kB2)), of_b = 1 / (2 * kB2 * (kB2 - kA2));
  constexpr A zero = 1 / (kA2 * kB2), a0 = of_a, a1 = of_a * kA, a2 = of_a * kA2;
  constexpr A b0 = of_b, b1 = of_b * kB, b2 = of_b * kB2;
  const Vec<A> even_a = a0 * g[0] + a2 * g[2], odd_a = a1 * g[1];
  const Vec<A> even_b = b0 * g[0] + b2 * g[2], odd_b = b1 * g[1];
  t[0] = zero * g[0];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = g[2];
}

// G^T m of six values.
template <class A>
FASTFUSE_INLINE void adjoint_taps(const Vec<A> (&m)[kIn], Vec<A> (&g)[kTaps]) {
  constexpr double of_a = 1 / (2 * kA2 * (kA2 - kB2)), of_b = 1 / (2 * kB2 * (kB2 - kA2));
  constexpr A zero = 1 / (kA2 * kB2), a0 = of_a, a1 = of_a * kA, a2 = of_a * kA2;
  constexpr A b0 = of_b, b1 = of_b * kB, b2 = of_b * kB2;
  const Vec<A> sum_a = m[1] + m[2], sum_b = m[3] + m[4];
  g[0] = zero * m[0] + a0 * sum_a + b0 * sum_b;
  g[1] = a1 * (m[1] - m[2]) + b1 * (m[3] - m[4]);
  g[2] = a2 * sum_a + b2 * sum_b + m[5];
}

// to[k][tap][c] = the taps of inputs k and outputs c, up to a panel's with zeros.
template <class A>
FASTFUSE_INLINE void gather_taps(A* to, const WinogradTaps& taps, int64_t c0, int64_t columns,
                                 int64_t k0, int64_t depth) {
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<A>;
  const A* from = static_cast<const A*>(taps.data) + c0 * taps.output + k0 * taps.input;
  const int64_t last = taps.flipped ? kSquare - 1 : 0, step = taps.flipped ? -1 : 1;
  const auto tap = [&](int64_t t) { return from + (last + step * t) * taps.tap; };
  if (columns < panel)
    for (int64_t i = 0; i < depth * kSquare * panel; ++i) to[i] = 0;
  if (columns == panel && taps.output == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t t = 0; t < kSquare; ++t)
        for (int64_t v = 0; v < panel; v += lanes)
          store(to + (k * kSquare + t) * panel + v, load(tap(t) + k * taps.input + v));
    return;
  }
  if (columns == panel && taps.tap == 1 && taps.input == kSquare && !taps.flipped) {
    // Of each output all taps of its inputs lie side by side.
    const int64_t length = depth * kSquare;
    int64_t i = 0;
    for (; i + lanes <= length; i += lanes)
      for (int64_t v = 0; v < panel; v += lanes) {
        Vec<A> block[lanes];
        FASTFUSE_UNROLL
        for (int j = 0; j < lanes; ++j) block[j] = load(from + (v + j) * taps.output + i);
        transpose<A>(block);
        FASTFUSE_UNROLL
        for (int j = 0; j < lanes; ++j) store(to + (i + j) * panel + v, block[j]);
      }
    for (; i < length; ++i)
      for (int64_t c = 0; c < panel; ++c) to[i * panel + c] = from[c * taps.output + i];
    return;
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t t = 0; t < kSquare; ++t)
        to[(k * kSquare + t) * panel + c] = tap(t)[k * taps.input + c * taps.output];
}

// to[element][k][c] of the taps [k][tap][c].
template <class A>
FASTFUSE_INLINE void transform_panel(A* to, const A* taps, int64_t depth) {
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<A>;
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t v = 0; v < panel; v += lanes)
      on_both_sides<A, kTaps, kIn>(
          [](const auto& g, auto& t) { transform_taps<A>(g, t); },
          [&](int i) { return load(taps + (k * kSquare + i) * panel + v); },
          [&](int i, Vec<A> value) { store(to + (i * kDepth + k) * panel + v, value); });
}

// to[t][c] = from[t][c] of a panel `width` wide, with zeros after `columns`.
template <class A>
FASTFUSE_INLINE void copy_rows(A* to, int64_t width, const A* from, int64_t stride, int64_t rows,
                               int64_t columns) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t t = 0; t < rows; ++t, to += width, from += stride) {
    int64_t c = 0;
    for (; c + lanes <= columns; c += lanes) store(to + c, load(from + c));
    if (c < columns) {
      store(to + c, load_partial(from + c, columns - c));
      c += lanes;
    }
    for (; c < width; c += lanes) store(to + c, Vec<A>{});
  }
}

// Scratch memory of a product, in values: transformed weights, products, taps.
template <class A>
constexpr int64_t kWeights = kWinogradElements * kDepth * kPanel<A>;
template <class A>
constexpr int64_t kProducts = kWinogradElements * kWinogradGroup * kPanel<A>;

template <class S>
void product(const WinogradProduct& op, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t panel = kPanel<A>;
  A* weights = static_cast<A*>(scratch);
  A* products = weights + kWeights<A>;
  A* taps = products + kProducts<A>;
  A* edge = taps + kDepth * kSquare * panel;
  const int64_t panels = ceil_div(op.to.channels, panel);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / panels * kWinogradGroup, c0 = unit % panels * panel;
    const int64_t count = min_of(kWinogradGroup, op.count - first);
    const int64_t columns = min_of(panel, op.to.channels - c0);
    const int64_t whole = count - count % kPanelRows<kPanelVectors>;
    for (int64_t k = 0; k < op.inputs; k += kDepth) {
      const int64_t depth = min_of(kDepth, op.inputs - k);
      gather_taps(taps, op.taps, c0, columns, k, depth);
      transform_panel(weights, taps, depth);
      for (int64_t i = 0; i < kWinogradElements; ++i) {
        const A* tiles = element<const A>(op.to, first, i) + k;
        A* to = products + i * kWinogradGroup * panel;
        const A* weight = weights + i * kDepth * panel;
        const auto rows = [&](int64_t from, int64_t to_row, Strided<A> left) {
          if (k == 0)
            multiply<A, false>(to + from * panel, panel, left, to_row - from, weight, panel, depth,
                               panel);
          else
            multiply<A, true>(to + from * panel, panel, left, to_row - from, weight, panel, depth,
                              panel);
        };
        rows(0, whole, {tiles, op.to.stride_tile, 1});
        if (whole == count) continue;
        // Nothing may be read behind the last tile.
        for (int64_t t = whole; t < count; ++t)
          copy_rows(edge + (t - whole) * kDepth, depth, tiles + t * op.to.stride_tile, 0, 1, depth);
        rows(whole, count, {edge, kDepth, 1});
      }
    }
    Winograd to = op.to;
    to.image.data = static_cast<S*>(to.image.data) + c0 * to.image.stride_c;
    to.channels = columns;
    to.first += first;
    to.bias = to.bias ? static_cast<const A*>(to.bias) + c0 : nullptr;
    to.stride_tile = panel;
    to.nowhere = taps;
    for (int64_t i = 0; i < kWinogradElements; ++i)
      to.elements[i] = products + i * kWinogradGroup * panel;
    output<S>(to, 0, count);
  }
}

// ---- the weight's gradient ----

template <class A>
constexpr int64_t kSums = kWinogradElements * kWinogradOutputGroup * kPanel<A>;

// Writes or adds a panel of the gradient of one output's taps, [tap][c].
template <class A>
FASTFUSE_INLINE void put_taps(const WinogradTaps& taps, int64_t output, int64_t c0, int64_t columns,
                              const A* from, bool add) {
  A* to = static_cast<A*>(taps.data) + output * taps.output + c0 * taps.input;
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t t = 0; t < kSquare; ++t) {
      A& value = to[c * taps.input + t * taps.tap];
      value = add ? value + from[t * kPanel<A> + c] : from[t * kPanel<A> + c];
    }
}

template <class A>
void gradient(const WinogradGradient& op, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<A>, group = kWinogradOutputGroup;
  A* sums = static_cast<A*>(scratch);
  A* right = sums + kSums<A>;
  A* left = right + kWinogradGroup * panel;
  A* taps = left + kWinogradGroup * group;
  const int64_t panels = ceil_div(op.inputs, panel);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t o0 = unit / panels * group, c0 = unit % panels * panel;
    const int64_t outputs = min_of(group, op.outputs - o0);
    const int64_t columns = min_of(panel, op.inputs - c0);
    for (int64_t i = 0; i < kWinogradElements; ++i) {
      const A* tiles = static_cast<const A*>(op.tiles[i]) + c0;
      const A* gradients = static_cast<const A*>(op.gradients[i]) + o0;
      A* to = sums + i * group * panel;
      for (int64_t t = 0; t < op.count; t += kWinogradGroup) {
        const int64_t depth = min_of(kWinogradGroup, op.count - t);
        copy_rows(right, panel, tiles + t * op.stride_tile, op.stride_tile, depth, columns);
        copy_rows(left, group, gradients + t * op.stride_gradient, op.stride_gradient, depth,
                  outputs);
        const Strided<A> transposed{left, 1, group};
        if (t == 0)
          multiply<A, false>(to, panel, transposed, outputs, right, panel, depth, panel);
        else
          multiply<A, true>(to, panel, transposed, outputs, right, panel, depth, panel);
      }
    }
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t v = 0; v < panel; v += lanes)
        on_both_sides<A, kIn, kTaps>(
            [](const auto& m, auto& g) { adjoint_taps<A>(m, g); },
            [&](int i) { return load(sums + (i * group + o) * panel + v); },
            [&](int i, Vec<A> value) { store(taps + i * panel + v, value); });
      put_taps(op.taps, o0 + o, c0, columns, taps, op.add);
    }
  }
}

template <class S>
constexpr WinogradKernels::Kernel kernel() {
  using A = compute_t<S>;
  constexpr int64_t panel = kPanel<A>, size = sizeof(A);
  return {input<S>,
          output_adjoint<S>,
          product<S>,
          gradient<A>,
          panel,
          (kWeights<A> + kProducts<A> + kDepth * (kSquare * panel + kPanelMultiple)) * size,
          (kSums<A> + kWinogradGroup * (panel + kWinogradOutputGroup) + kSquare * panel) * size};
}

#define FASTFUSE_KERNEL(S) kernel<S>()

}  // namespace

extern const WinogradKernels winograd_kernels = {{FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
