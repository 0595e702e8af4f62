// What mma.h offers under nvcc, by its definition.
#pragma once

#include "emulator.h"

namespace fastfuse::emulator {

constexpr uint32_t kAll = ~0u;

// 8 x 8 values: lane i gives row i % 8 of matrix i / 8.
template <bool Transposed>
UNCHECKED void load_matrices(uint32_t (&to)[4], const void* row, const void* code, int line) {
  if (size_t(row) % 16 != 0) stop("gives a row of a matrix that is not aligned to 16 bytes", code);
  offer(row, kAll, line);
  const int lane = current->rank % kWarp, across = lane / 4, along = lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[2];
    for (int i = 0; i < 2; ++i) {
      const int y = Transposed ? along + i : across, x = Transposed ? across : along + i;
      const auto* from = static_cast<const uint16_t*>(offered_by(kAll, 8 * matrix + y)) + x;
      check(from, 2, false, code);
      values[i] = *from;
    }
    to[matrix] = values[0] | uint32_t(values[1]) << 16;
  }
  release(kAll, line);
}

UNCHECKED inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
UNCHECKED inline float widened(__half x) { return __half2float(x); }

template <class T>
UNCHECKED float value_of(uint32_t bits, int half) {
  const uint16_t part = bits >> 16 * half;
  T value;
  std::memcpy(&value, &part, sizeof value);
  return widened(value);
}

// Products are summed in float64 and rounded once; a device does not say how it rounds.
template <class T>
UNCHECKED void mma_16816(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         int line) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  offer(mine, kAll, line);
  const int lane = current->rank % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (int k = 0; k < 16; ++k) {
      const auto* of_a = static_cast<const uint32_t*>(offered_by(kAll, row % 8 * 4 + k % 8 / 2));
      const auto* of_b = static_cast<const uint32_t*>(offered_by(kAll, column * 4 + k % 8 / 2));
      sum += double(value_of<T>(of_a[row / 8 + k / 8 * 2], k % 2)) *
             value_of<T>(of_b[4 + k / 8], k % 2);
    }
    sums[i] = float(sum);
  }
  release(kAll, line);
}

}  // namespace fastfuse::emulator

namespace fastfuse::cuda {

UNCHECKED inline void load_matrices(uint32_t (&to)[4], const void* row,
                                    int line = __builtin_LINE()) {
  fastfuse::emulator::load_matrices<false>(to, row, __builtin_return_address(0), line);
}
UNCHECKED inline void load_transposed_matrices(uint32_t (&to)[4], const void* row,
                                               int line = __builtin_LINE()) {
  fastfuse::emulator::load_matrices<true>(to, row, __builtin_return_address(0), line);
}
UNCHECKED inline void mma_bf16_16816(float (&sums)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2], int line = __builtin_LINE()) {
  fastfuse::emulator::mma_16816<__nv_bfloat16>(sums, a, b, line);
}
UNCHECKED inline void mma_f16_16816(float (&sums)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2], int line = __builtin_LINE()) {
  fastfuse::emulator::mma_16816<__half>(sums, a, b, line);
}

}  // namespace fastfuse::cuda
