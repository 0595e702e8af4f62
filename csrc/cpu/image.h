// What vector bodies see of a tensor.
#pragma once

#include <cstdint>

namespace fastfuse {

// An (N, C, height, width) image; strides in elements.
struct Image {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t height, width;
};

enum Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kNumDtypes };

}  // namespace fastfuse
