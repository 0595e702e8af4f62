"""The sampling rule as a kernel: for the interpreter and for the compiler."""

from __future__ import annotations

import triton
import triton.language as tl

from fastfuse.ops.bilinear_triton import sample_axis


@triton.jit
def sampling_kernel(
    lower_out, upper_out, weight_out, in_size, out_size,
    ALIGN_CORNERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight_out.dtype.element_ty
    target = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = target < out_size
    lower, upper, weight = sample_axis(target, in_size, out_size, ALIGN_CORNERS, DTYPE)
    tl.store(lower_out + target, lower, mask=mask)
    tl.store(upper_out + target, upper, mask=mask)
    tl.store(weight_out + target, weight, mask=mask)
