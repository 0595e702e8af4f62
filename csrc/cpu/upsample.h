// What host functions tell the bodies that upsample an image to the size of another.
#pragma once

#include <cstdint>

#include "cpu/bilinear.h"
#include "cpu/image.h"

namespace fastfuse {

struct Upsampling {
  int64_t batch, channels;
  Image source, target;
  bool stream;    // write past the caches: the output is large and made of whole cache lines
  Sampling y, x;  // from source to target
};

// A body does the units [begin, end) of its work; a unit's result does not depend on who does it.
// `scratch` is in elements of the compute type.
template <class Work>
struct UnitsKernel {
  void (*body)(const Work&, int64_t begin, int64_t end, void* scratch);
  int64_t (*units)(const Work&);
  int64_t (*scratch)(const Work&);
};

}  // namespace fastfuse
