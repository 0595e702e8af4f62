// What host functions tell the bodies that walk the classes of upsampled pixels.
#pragma once

#include <cstdint>

#include "cpu/bilinear.h"
#include "cpu/image.h"

namespace fastfuse {

struct Logits {
  int64_t batch, classes;
  Image image;         // (N, classes, h, w)
  bool channels_last;  // its classes have unit stride, else its columns
  Sampling y, x;       // to the target's size
};

}  // namespace fastfuse
