// The sampling rule of bilinear interpolation, once, for every CPU kernel.
//
// Per axis, output position d reads the source positions lower[d] and upper[d] with weights
// 1 - weight[d] and weight[d]. Coordinates are computed in the accumulation type, float for
// float32 and below and double for float64, with the one fused multiply-add that PyTorch's
// kernels use, so that float32 weights equal PyTorch's to the last bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastfuse {

// What vector bodies see: plain pointers. `weight` points to float or double.
struct Sampling {
  int64_t in, out;
  const int32_t* lower;
  const int32_t* upper;
  const void* weight;
  bool identity() const { return in == out; }
};

// The adjoint: source position s is read by the outputs first[s] + k, 0 <= k < count[s],
// with weight[offset[s] + k].
struct AdjointSampling {
  int64_t in, out;
  const int32_t* first;
  const int32_t* count;
  const int64_t* offset;
  const void* weight;
  bool identity() const { return in == out; }
};

template <class A>
struct BilinearAxis {
  // Tables are padded so that a vector may be loaded from any valid output position.
  static constexpr int64_t kPadding = 16;

  int64_t in, out;
  std::vector<int32_t> lower, upper;
  std::vector<A> weight;

  BilinearAxis(int64_t in_size, int64_t out_size, bool align_corners)
      : in(in_size),
        out(out_size),
        lower(out_size + kPadding),
        upper(out_size + kPadding),
        weight(out_size + kPadding) {
    const A scale = align_corners ? (out > 1 ? A(in - 1) / A(out - 1) : A(0)) : A(in) / A(out);
    for (int64_t d = 0; d < out; ++d) {
      if (in == out) {  // exactly, however large
        lower[d] = static_cast<int32_t>(d);
        upper[d] = lower[d] + (d < in - 1 ? 1 : 0);
        continue;
      }
      const A source =
          align_corners ? scale * A(d) : std::max(std::fma(scale, A(d) + A(0.5), A(-0.5)), A(0));
      lower[d] = static_cast<int32_t>(std::min(static_cast<int64_t>(source), in - 1));
      upper[d] = lower[d] + (lower[d] < in - 1 ? 1 : 0);
      weight[d] = std::min(std::max(source - A(lower[d]), A(0)), A(1));
    }
    for (int64_t d = out; d < out + kPadding; ++d) {
      lower[d] = lower[out - 1];
      upper[d] = upper[out - 1];
      weight[d] = weight[out - 1];
    }
  }

  Sampling view() const { return {in, out, lower.data(), upper.data(), weight.data()}; }
};

template <class A>
struct BilinearAdjointAxis {
  int64_t in, out;
  std::vector<int32_t> first, count;
  std::vector<int64_t> offset;
  std::vector<A> weight;

  // `lower` never decreases, so the outputs that read one source position are neighbours.
  explicit BilinearAdjointAxis(const BilinearAxis<A>& axis)
      : in(axis.in), out(axis.out), first(axis.in, 0), count(axis.in, 0), offset(axis.in, 0) {
    for (int64_t d = 0; d < out; ++d)
      for (int32_t s = axis.lower[d]; s <= axis.upper[d]; ++s)
        if (count[s]++ == 0) first[s] = static_cast<int32_t>(d);
    int64_t total = 0;
    for (int64_t s = 0; s < in; ++s) {
      offset[s] = total;
      total += count[s];
    }
    weight.resize(total);
    for (int64_t s = 0; s < in; ++s)
      for (int32_t k = 0; k < count[s]; ++k) {
        const int64_t d = first[s] + k;
        A sum = 0;  // at the last position lower == upper: both weights count
        if (axis.lower[d] == s) sum += A(1) - axis.weight[d];
        if (axis.upper[d] == s) sum += axis.weight[d];
        weight[offset[s] + k] = sum;
      }
  }

  AdjointSampling view() const {
    return {in, out, first.data(), count.data(), offset.data(), weight.data()};
  }
};

}  // namespace fastfuse
