// Exponentials of upsampled logits, a cell at a time.
//
// A cell is what lies between four neighbouring source pixels, a b over c d: R x R target pixels,
// whose weights are (2 i + 1) / 2R. Between two source pixels values are an arithmetic sequence, so
// exponentials are a geometric one: of a cell and a class, four exponentials and products give all.
//
// Cell (y, x) has the corners (y - 1, x - 1) and (y, x), clamped to the image: there are
// (height + 1) x (width + 1), and at an image's border they are partly outside of the target.
#pragma once

#include "cuda/elements.h"
#include "cuda/upsample_cross_entropy.h"

namespace fastfuse::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

__device__ __forceinline__ float exp2_fast(float x) {
#ifdef FASTFUSE_EMULATED
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ int clamp(int i, int size) { return min(max(i, 0), size - 1); }

// The sampling rule's, with the rounding that it has elsewhere.
__device__ __forceinline__ float between(float first, float second, float weight) {
  return fmaf(second, weight, first * (1 - weight));
}

struct Corners {
  float a, b, c, d;
};

__device__ __forceinline__ float between(const Corners& at, float weight_y, float weight_x) {
  return between(between(at.a, at.b, weight_x), between(at.c, at.d, weight_x), weight_y);
}

template <int R>
__device__ __forceinline__ constexpr float weight_of(int i) {
  return (2 * i + 1) * (0.5f / R);
}

// What corners are multiplied by: differences of them then are exponents of neighbours' ratios.
template <int R>
constexpr float kScale = kLog2E / R;

// Base-2 logarithms: of the first pixel's exponential, of its neighbours' ratios to it, and of
// what the ratio along x is multiplied by from row to row.
struct Exponents {
  float first, along_x, along_y, along_both;
};

template <int R>
__device__ __forceinline__ Exponents exponents(const Corners& at, float shift) {
  const float left = at.c - at.a, right = at.d - at.b, difference = right - left;
  const float first_left = fmaf(left, 0.5f / R, at.a), first_right = fmaf(right, 0.5f / R, at.b);
  const float along_x = first_right - first_left;
  return {fmaf(R, first_left, fmaf(0.5f, along_x, -shift)), along_x,
          fmaf(difference, 0.5f / R, left), difference * (1.0f / R)};
}

// Calls body(row, exponential of its first pixel, ratio of neighbours) of rows begin .. begin + N.
template <int R, int N, class Body>
__device__ __forceinline__ void for_rows(const Exponents& of, int begin, const Body& body) {
  if constexpr (R > 4) {  // products of many factors would lose digits
#pragma unroll
    for (int j = 0; j < N; ++j)
      body(j, exp2_fast(fmaf(begin + j, of.along_y, of.first)),
           exp2_fast(fmaf(begin + j, of.along_both, of.along_x)));
  } else {
    static_assert(N == R, "whole cells");
    float first = exp2_fast(of.first), ratio = exp2_fast(of.along_x);
    const float down = exp2_fast(of.along_y), change = exp2_fast(of.along_both);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      body(j, first, ratio);
      first *= down;
      ratio *= change;
    }
  }
}

}  // namespace fastfuse::cuda
