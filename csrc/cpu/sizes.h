// Sizes that depend on the machine: fastfuse/ops/policy.py sets them when the package is imported.
#pragma once

#include <cstdint>

namespace fastfuse {

struct Sizes {
  int64_t ring_bytes = 768 << 10;           // a tile's rows: about a second-level cache
  int64_t depthwise_ring_bytes = 24 << 10;  // the same for depthwise_conv2d: of a first-level one
  int64_t stream_bytes = 16 << 20;          // outputs from here on are written past the caches
  int64_t grain = 16384;                    // values worth waking a thread for
  int64_t depthwise_grain = 1 << 18;        // multiply-adds
  int64_t mlp_bytes = 384 << 10;            // of a tile's pixels between an MLP's products
  int64_t mlp_parts = 1;                    // of pixels, whose sums parameters get
};

// Process-wide. They may be set while no kernel runs.
inline Sizes& sizes() {
  static Sizes value;
  return value;
}

}  // namespace fastfuse
