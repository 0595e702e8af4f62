// Vector bodies of copy_layout: a matrix transposed in squares of one vector by one vector,
// whatever the values mean. Rows of the result are filled within the second-level cache.

#include "cpu/integers.h"
#include "cpu/layout.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

FASTFUSE_INLINE Vec<float> load_bits(const float* p) { return load(p); }
FASTFUSE_INLINE Vec<double> load_bits(const double* p) { return load(p); }
FASTFUSE_INLINE Vec<float> load_bits(const uint16_t* p) {
  return (Vec<float>)__builtin_convertvector(load_bytes<HalfBits>(p), Bits);
}
FASTFUSE_INLINE void store_bits(float* p, Vec<float> v) { store(p, v); }
FASTFUSE_INLINE void store_bits(double* p, Vec<double> v) { store(p, v); }
FASTFUSE_INLINE void store_bits(uint16_t* p, Vec<float> v) {
  const HalfBits h = __builtin_convertvector((Bits)v, HalfBits);
  __builtin_memcpy(p, &h, sizeof h);
}

template <class S, class A>
void copy(const LayoutCopy& op, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t chunks = ceil_div(op.columns, kLayoutColumns);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / chunks, c0 = unit % chunks * kLayoutColumns;
    const int64_t c1 = min_of(c0 + kLayoutColumns, op.columns);
    const S* from = static_cast<const S*>(op.from) + image * op.rows * op.columns;
    S* to = static_cast<S*>(op.to) + image * op.rows * op.columns;
    int64_t r = 0;
    for (; r + lanes <= op.rows; r += lanes) {
      int64_t c = c0;
      for (; c + lanes <= c1; c += lanes) {
        Vec<A> tile[lanes];
        for (int64_t i = 0; i < lanes; ++i) tile[i] = load_bits(from + (r + i) * op.columns + c);
        transpose<A>(tile);
        for (int64_t i = 0; i < lanes; ++i) store_bits(to + (c + i) * op.rows + r, tile[i]);
      }
      for (; c < c1; ++c)
        for (int64_t i = 0; i < lanes; ++i)
          to[c * op.rows + r + i] = from[(r + i) * op.columns + c];
    }
    for (; r < op.rows; ++r)
      for (int64_t c = c0; c < c1; ++c) to[c * op.rows + r] = from[r * op.columns + c];
  }
}

}  // namespace

extern const LayoutKernels layout_kernels = {
    {copy<uint16_t, float>, copy<float, float>, copy<double, double>}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
