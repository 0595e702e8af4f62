// What the host functions of upsample_cross_entropy tell their vector bodies.
#pragma once

#include "cpu/isa_list.h"
#include "cpu/logits.h"

namespace fastfuse {

// With the weights w and the smoothing e, the loss of a pixel of class t is
//   (1 - e) w[t] (log sum exp v - v[t]) + e / C sum_c w[c] (log sum exp v - v[c]).
struct CrossEntropy {
  Logits logits;
  const int64_t* target;  // (N, H, W)
  const void* weight;     // (C,) of the compute type, or null: 1
  int64_t ignore_index;
  double smoothing;
  double total_weight;  // of all classes
};

struct CrossEntropyForward : CrossEntropy {
  void* loss;       // (N, H, W) of the compute type
  void* logsumexp;  // of the shifted logits: see shift_row
};

struct CrossEntropyBackward : CrossEntropy {
  const void* logsumexp;
  const void* grad;                      // (N, H, W) of the compute type, of any strides
  int64_t stride_n, stride_h, stride_w;  // of grad
  Image gradient;                        // of the logits
  bool channels_last;                    // its layout
};

// Units are target rows in forward and source rows in backward; `scratch` is in elements of the
// compute type. Forward returns the first pixel whose target is no class and not ignored, or -1.
struct UpsampleCrossEntropyKernels {
  struct Kernel {
    int64_t (*forward)(const CrossEntropyForward&, int64_t begin, int64_t end, void* scratch);
    void (*backward)(const CrossEntropyBackward&, int64_t begin, int64_t end, void* scratch);
    int64_t (*forward_scratch)(const Logits&);
    int64_t (*backward_scratch)(const Logits&);
  } kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(UpsampleCrossEntropyKernels, upsample_cross_entropy_kernels)

}  // namespace fastfuse
