// Matrices whose rows are pixels, as bodies take them.
#pragma once

#include <cstdint>

namespace fastfuse {

// A matrix with unit stride along channels; null where there is none.
struct Rows {
  void* data;
  int64_t stride;
};

// Vectors are in the accumulation type. A sum over rows is made of sums over blocks of kRowBlock
// rows, whichever threads do them: block b's are at sums[b * (number of sums) * channels].
constexpr int64_t kRowBlock = 128;

// The images that rows belong to: row i to image (first + i) / pixels.
struct Images {
  const void* keep;  // a factor for each image, or null: 1
  int64_t pixels, first;
};

}  // namespace fastfuse
