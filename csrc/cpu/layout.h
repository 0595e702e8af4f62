// What the host function of copy_layout tells its vector bodies.
#pragma once

#include <cstdint>

#include "cpu/isa_list.h"

namespace fastfuse {

// For every image the dense matrix (rows, columns) `from` becomes the dense (columns, rows) `to`:
// (C, H W) from contiguous to channels_last, (H W, C) back.
struct LayoutCopy {
  const void* from;
  void* to;
  int64_t images, rows, columns;
};

// A body does the units [begin, end), each some columns of one image.
constexpr int64_t kLayoutColumns = 64;
using LayoutBody = void (*)(const LayoutCopy&, int64_t begin, int64_t end);

struct LayoutKernels {
  LayoutBody copy[3];  // elements of 2, 4 and 8 bytes
};

FASTFUSE_DECLARE_KERNELS(LayoutKernels, layout_kernels)

}  // namespace fastfuse
