// What the host function of upsample_equalize_concat tells its vector bodies.
#pragma once

#include <cstdint>

#include "cpu/bilinear.h"
#include "cpu/image.h"
#include "cpu/isa_list.h"

namespace fastfuse {

// One level: `source` is the feature (or its gradient), `target` its slice of the channels of the
// concatenation (or of that one's gradient). Forward reads source and writes target, backward
// reads target and writes source.
struct EqualizedLevel {
  int64_t batch, channels;
  Image source, target;
  double mean, inverse_std;
  bool stream;    // write past the caches: the output is large and made of whole cache lines
  Sampling y, x;  // forward; x also in the channels_last backward
  AdjointSampling adjoint_y, adjoint_x;  // backward; x in the contiguous one only
};

// A body does the units [begin, end) of a level; a unit's result does not depend on who does it.
using UpsampleEqualizeConcatBody = void (*)(const EqualizedLevel&, int64_t begin, int64_t end,
                                            void* scratch);

// The units of one level, and the scratch its body needs, in elements of the compute type.
struct UpsampleEqualizeConcatKernel {
  UpsampleEqualizeConcatBody body;
  int64_t (*units)(const EqualizedLevel&);
  int64_t (*scratch)(const EqualizedLevel&);
};

struct UpsampleEqualizeConcatKernels {
  UpsampleEqualizeConcatKernel forward[2][kNumDtypes];  // [channels_last][dtype]
  UpsampleEqualizeConcatKernel backward[2][kNumDtypes];
};

#define FASTFUSE_DECLARE(isa) \
  FASTFUSE_DECLARE_KERNELS(isa, UpsampleEqualizeConcatKernels, upsample_equalize_concat_kernels)
FASTFUSE_FOR_EACH_ISA(FASTFUSE_DECLARE)
#undef FASTFUSE_DECLARE

}  // namespace fastfuse
