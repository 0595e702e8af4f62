// Vector bodies of the Winograd transforms F(2x2, 3x3), compiled once per instruction set.
//
// With B^T = (1 0 -1 0 | 0 1 1 0 | 0 -1 1 0 | 0 1 0 -1) and A^T = (1 1 1 0 | 0 1 -1 -1), a tile's
// output is A^T [(G w G^T) * (B^T d B)] A, summed over channels between the two transforms: 16
// products for 4 outputs instead of 36.

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
  return {line / w.tiles_y, line % w.tiles_y * 2, (w.first + index) % w.tiles_x * 2};
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

// B^T v for four values.
template <class V>
FASTFUSE_INLINE void transform_input(V& a, V& b, V& c, V& d) {
  const V t0 = a - c, t1 = b + c, t2 = c - b, t3 = b - d;
  a = t0, b = t1, c = t2, d = t3;
}

template <class A>
void input(const Winograd& w, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = locate(w, t);
    const A* pixels[16];
    find_pixels<4>(w.image, tile.n, tile.y - w.padding, tile.x - w.padding,
                   static_cast<const A*>(w.zeros), pixels);
    A* to = static_cast<A*>(w.tiles) + t * w.stride_tile;
    for_each_vector<A>(w.channels, [&](int64_t c, auto load, auto store) {
      Vec<A> d[16];
      for (int i = 0; i < 16; ++i) d[i] = load(pixels[i] + c);
      for (int j = 0; j < 4; ++j) transform_input(d[j], d[4 + j], d[8 + j], d[12 + j]);
      for (int i = 0; i < 16; i += 4) transform_input(d[i], d[i + 1], d[i + 2], d[i + 3]);
      for (int i = 0; i < 16; ++i) store(to + i * w.stride_element + c, d[i]);
    });
  }
}

template <class A>
void output(const Winograd& w, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = locate(w, t);
    A* pixels[4];
    find_pixels<2>(w.image, tile.n, tile.y, tile.x, static_cast<A*>(w.nowhere), pixels);
    const A* from = static_cast<const A*>(w.tiles) + t * w.stride_tile;
    for_each_vector<A>(w.channels, [&](int64_t c, auto load, auto store) {
      Vec<A> rows[2][4];
      for (int j = 0; j < 4; ++j) {
        Vec<A> m[4];
        for (int i = 0; i < 4; ++i) m[i] = load(from + (4 * i + j) * w.stride_element + c);
        rows[0][j] = m[0] + m[1] + m[2];
        rows[1][j] = m[1] - m[2] - m[3];
      }
      const Vec<A> bias = w.bias ? load(static_cast<const A*>(w.bias) + c) : Vec<A>{};
      for (int i = 0; i < 2; ++i) {
        store(pixels[2 * i] + c, rows[i][0] + rows[i][1] + rows[i][2] + bias);
        store(pixels[2 * i + 1] + c, rows[i][1] - rows[i][2] - rows[i][3] + bias);
      }
    });
  }
}

template <class A>
void output_adjoint(const Winograd& w, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = locate(w, t);
    const A* pixels[4];
    find_pixels<2>(w.image, tile.n, tile.y, tile.x, static_cast<const A*>(w.zeros), pixels);
    A* to = static_cast<A*>(w.tiles) + t * w.stride_tile;
    for_each_vector<A>(w.channels, [&](int64_t c, auto load, auto store) {
      Vec<A> rows[2][4];  // g A^T
      for (int i = 0; i < 2; ++i) {
        const Vec<A> a = load(pixels[2 * i] + c), b = load(pixels[2 * i + 1] + c);
        rows[i][0] = a, rows[i][1] = a + b, rows[i][2] = a - b, rows[i][3] = -b;
      }
      for (int j = 0; j < 4; ++j) {
        const Vec<A> a = rows[0][j], b = rows[1][j];
        store(to + j * w.stride_element + c, a);
        store(to + (4 + j) * w.stride_element + c, a + b);
        store(to + (8 + j) * w.stride_element + c, a - b);
        store(to + (12 + j) * w.stride_element + c, -b);
      }
    });
  }
}

}  // namespace

extern const WinogradKernels winograd_kernels = {{input<double>, input<float>},
                                                 {output<double>, output<float>},
                                                 {output_adjoint<double>, output_adjoint<float>}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
