// Vector bodies of tap_sum, compiled once per instruction set (see isa_list.h).
//
// Every body is separable. The channels_last ones go along x first and keep the rows they made in
// a ring of a few, dense in memory whatever the strides of the taps; the contiguous ones go along y
// first. A row of the result depends on nothing but its inputs.
// docs/tap_sum.md explains the four bodies.

#include "cpu/tap_sum.h"
#include "cpu/tap_sum_channels_last.h"
#include "cpu/tap_sum_contiguous.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

template <class Op>
using Body = void (*)(const Op&, int64_t begin, int64_t end, void* scratch);

template <class Op, Body<Op> Plain, Body<Op> Streaming>
void choose_stores(const Op& op, int64_t begin, int64_t end, void* scratch) {
  if (!op.stream) return Plain(op, begin, end, scratch);
  Streaming(op, begin, end, scratch);
  finish_streaming();
}

#define FASTFUSE_KERNEL(S, Op, body)                                                   \
  {choose_stores<Op, body<S, false>, body<S, kCanStream>>, body##_units<compute_t<S>>, \
   body##_scratch<compute_t<S>>}
#define FASTFUSE_FOR_DTYPES(Op, body) {FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL, Op, body)}

}  // namespace

extern const TapSumKernels tap_sum_kernels = {
    {FASTFUSE_FOR_DTYPES(TapSumForward, forward_contiguous),
     FASTFUSE_FOR_DTYPES(TapSumForward, forward_channels_last)},
    {FASTFUSE_FOR_DTYPES(TapSumBackward, backward_contiguous),
     FASTFUSE_FOR_DTYPES(TapSumBackward, backward_channels_last)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
