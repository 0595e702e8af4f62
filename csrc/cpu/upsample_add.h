// What the host function of upsample_add tells its vector bodies.
#pragma once

#include "cpu/isa_list.h"
#include "cpu/upsample.h"

namespace fastfuse {

// target = skip + UP(source)
struct UpsampleAdd : Upsampling {
  Image skip;  // of the target's size
};

struct UpsampleAddKernels {
  UnitsKernel<UpsampleAdd> forward[2][kNumDtypes];  // [channels_last][dtype]
};

FASTFUSE_DECLARE_KERNELS(UpsampleAddKernels, upsample_add_kernels)

}  // namespace fastfuse
