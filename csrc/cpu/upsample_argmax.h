// What the host function of upsample_argmax tells its vector bodies.
#pragma once

#include "cpu/isa_list.h"
#include "cpu/logits.h"

namespace fastfuse {

struct UpsampleArgmax {
  Logits logits;
  int64_t* labels;   // (N, H, W)
  void* confidence;  // as many of the compute type, or null
};

// A unit is a target row; `scratch` is in elements of the compute type.
struct UpsampleArgmaxKernels {
  struct Kernel {
    void (*body)(const UpsampleArgmax&, int64_t begin, int64_t end, void* scratch);
    int64_t (*scratch)(const Logits&);
  } kernels[kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(UpsampleArgmaxKernels, upsample_argmax_kernels)

}  // namespace fastfuse
