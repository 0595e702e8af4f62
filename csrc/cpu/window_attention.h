// What the host functions of window_attention tell their vector bodies.
#pragma once

#include <cstdint>

#include "cpu/image.h"
#include "cpu/integers.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// Heads that attend in windows of one shape, which tile a map: an image with padding, whose pixel
// (y, x) is at ((y - top) mod height, (x - left) mod width) of it.
struct AttentionWindows {
  int64_t window_height, window_width;
  int64_t height, width, top, left;
  int64_t first_head, heads;

  int64_t tokens() const { return window_height * window_width; }
  int64_t windows() const { return height / window_height * (width / window_width); }
};

// Queries, keys and values are one after the other, `channels` each, head after head. Vectors are
// in the accumulation type, and null where there is none.
struct WindowAttention {
  AttentionWindows in;
  int64_t batch, height, width, channels, head_size;
  const void* qkv;
  void* out;
  const void* qkv_bias;  // added to queries, keys and values
  bool pads_with_bias;   // what is no pixel has the bias alone, else zeros
  const void* bias;      // (heads, tokens, tokens in whole vectors), added to logits
  const void *local_weight, *local_bias;  // (9, channels), (channels): values convolved in a window
  int64_t shift;  // above 0: the last windows hold regions, which do not see each other

  // Where sums of the weights' gradients lie, in elements of the accumulation type: those of a
  // block of windows. Bodies of a head write its part.
  int64_t sums_of_bias(int64_t stride) const { return bias ? in.heads * in.tokens() * stride : 0; }
  int64_t sums_of_qkv_bias() const { return qkv_bias ? 3 * channels : 0; }
  int64_t sums_of_local() const { return local_weight ? 10 * channels : 0; }
  int64_t sums(int64_t stride) const {
    return sums_of_bias(stride) + sums_of_qkv_bias() + sums_of_local();
  }
};

struct WindowAttentionBackward {
  WindowAttention forward;  // without out
  const void* grad;
  void* grad_qkv;
  int64_t blocks;  // of windows, whose sums are apart
  void* sums;      // block by block: of bias, qkv_bias, local weight and bias
};

// Queries of a unit of forward, at most: a multiple of what is multiplied at a time.
constexpr int64_t kQueriesOfUnit = 240;

struct WindowAttentionKernels {
  struct Kernel {
    int64_t lanes;
    // Bytes of scratch memory of a part.
    int64_t (*scratch)(const WindowAttention&);
    int64_t (*backward_scratch)(const WindowAttention&);
    // Units: kQueriesOfUnit queries of each head of each window of each image.
    void (*forward)(const WindowAttention&, int64_t begin, int64_t end, void* scratch);
    // Units: each head of each block of windows of all images.
    void (*backward)(const WindowAttentionBackward&, int64_t begin, int64_t end, void* scratch);
  };
  Kernel kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(WindowAttentionKernels, window_attention_kernels)

}  // namespace fastfuse
