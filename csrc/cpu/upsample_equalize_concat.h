// What the host function of upsample_equalize_concat tells its vector bodies.
#pragma once

#include <cstdint>

#include "cpu/isa_list.h"
#include "cpu/upsample.h"

namespace fastfuse {

// One level: `source` is the feature (or its gradient), `target` its slice of the channels of the
// concatenation (or of that one's gradient). Forward reads source and writes target, backward
// reads target and writes source; of `y` and `x` it needs x in channels_last only.
struct EqualizedLevel : Upsampling {
  double mean, inverse_std;
  AdjointSampling adjoint_y, adjoint_x;  // backward; x in the contiguous one only
};

using UpsampleEqualizeConcatKernel = UnitsKernel<EqualizedLevel>;

struct UpsampleEqualizeConcatKernels {
  UpsampleEqualizeConcatKernel forward[2][kNumDtypes];  // [channels_last][dtype]
  UpsampleEqualizeConcatKernel backward[2][kNumDtypes];
};

FASTFUSE_DECLARE_KERNELS(UpsampleEqualizeConcatKernels, upsample_equalize_concat_kernels)

}  // namespace fastfuse
