// Vector bodies of the Winograd transforms F(4x4, 3x3), compiled once per instruction set.
//
// A tile's output is A^T [(G w G^T) * (B^T d B)] A, summed over channels between the two
// transforms: 36 products for 16 outputs instead of 144. The matrices are those of Toom and Cook
// for the points 0, a, -a, b, -b and infinity. The usual 1 and 2 lose a digit; 5/8 and 3/2 were the
// best of those tried (docs/fusion_conv2d.md), and every constant below is exact in float32. The
// denominators are all in G.

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
constexpr int kOut = kWinogradOutputs, kIn = kWinogradInputs;

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

template <class S>
constexpr WinogradKernels::Kernel kernel() {
  return {input<S>, output<S>, output_adjoint<S>};
}

#define FASTFUSE_KERNEL(S) kernel<S>()

}  // namespace

extern const WinogradKernels winograd_kernels = {{FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
