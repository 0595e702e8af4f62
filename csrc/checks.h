// Argument checks shared by the host functions. Python and the fake implementations report what
// users get wrong; these guard memory, for whoever calls the op directly.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace fastfuse {

template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_image(const char* op, const char* argument, const torch::stable::Tensor& tensor) {
  check(tensor.is_cpu(), op, argument, " must be a CPU tensor");
  check(tensor.dim() == 4, op, argument, " must have 4 dimensions (N, C, H, W); got ",
        tensor.dim());
}

// Positions along an axis are 32-bit; sizes of whole tensors are 64-bit.
inline void check_axis(const char* op, const char* argument, int64_t size) {
  check(size >= 1 && size <= std::numeric_limits<int32_t>::max(), op, argument,
        " must be at least 1 and at most 2^31 - 1 high and wide; got ", size);
}
inline void check_axes(const char* op, const char* argument, int64_t height, int64_t width) {
  check_axis(op, argument, height);
  check_axis(op, argument, width);
}

inline void check_at_least(const char* op, const char* argument, int64_t least, int64_t value,
                           int64_t limit = std::numeric_limits<int64_t>::max()) {
  check(value >= least, op, argument, " must be at least ", least, "; got ", value);
  check(value < limit, op, argument, " must be below ", limit, "; got ", value);
}

inline void check_kernel_size(const char* op, int64_t size) {
  check(size >= 1 && size % 2 == 1 && size < (1 << 15), op, "kernel_size must be odd; got ", size);
}

}  // namespace fastfuse
