"""The sampling rule of bilinear interpolation, once, for every Triton kernel.

``bilinear.py`` states the rule. Coordinates have the accumulation dtype (float64 for float64, else
float32) and every rounding is written out, by ``div_rn`` and ``fma``: however the compiler fuses
what surrounds it, lower, upper and weight are those of ``axis_table`` bit for bit. Equal sizes give
the identity, for the scale is then exactly 1 (up to 2**23 positions in float32).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sample_axis", "target_range", "weight_of"]


@triton.jit
def _axis_scale(in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """Source positions per target position."""
    if ALIGN_CORNERS:
        numerator = tl.cast(in_size - 1, DTYPE)
        denominator = tl.cast(tl.maximum(out_size - 1, 1), DTYPE)
    else:
        numerator = tl.cast(in_size, DTYPE)
        denominator = tl.cast(out_size, DTYPE)
    is_double: tl.constexpr = numerator.dtype == tl.float64
    # A plain float32 division may be 2 ulp off, a float64 one is not.
    return numerator / denominator if is_double else tl.div_rn(numerator, denominator)


@triton.jit
def sample_axis(target, in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """``(lower, upper, weight)`` of a block of target positions: int32, int32 and DTYPE.

    Target positions outside the axis are answered with source positions inside it.
    """
    scale = _axis_scale(in_size, out_size, ALIGN_CORNERS, DTYPE)
    position = target.to(DTYPE)
    if ALIGN_CORNERS:
        # Not a product: the compiler could fuse it into `source - lower` and round differently.
        source = tl.fma(scale, position, 0.0)
    else:
        source = tl.maximum(tl.fma(scale, position + 0.5, -0.5), 0.0)
    lower = tl.minimum(source.to(tl.int32), in_size - 1)
    upper = tl.minimum(lower + 1, in_size - 1)
    weight = tl.minimum(tl.maximum(source - lower.to(DTYPE), 0.0), 1.0)
    return lower, upper, weight


@triton.jit
def weight_of(target, source, in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """The weight with which ``target`` reads ``source``, a block that broadcasts against it.

    Zero where it does not; at the last source position lower == upper, and both weights count.
    """
    lower, upper, weight = sample_axis(target, in_size, out_size, ALIGN_CORNERS, DTYPE)
    return tl.where(lower == source, 1 - weight, 0.0) + tl.where(upper == source, weight, 0.0)


@triton.jit
def target_range(source, in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """``(first, last)``: every target position that reads ``source`` lies in first .. last.

    The range inverts the rule, source(target) in (source - 1, source + 1), and adds more than the
    rounding of either, so it may hold a position whose weight is zero. It may be empty.
    """
    scale = _axis_scale(in_size, out_size, ALIGN_CORNERS, DTYPE)
    position = source.to(DTYPE)
    if ALIGN_CORNERS:
        step = tl.where(scale > 0, scale, 1.0)
        low = (position - 1.0) / step
        high = (position + 1.0) / step
    else:
        low = (position - 0.5) / scale - 0.5
        high = (position + 1.5) / scale - 0.5
    # Rounding moves a position by a few 2**-24 of itself; a sixteenth costs few candidates.
    slack = 0.0625 + high * 0.000001
    first = tl.maximum(tl.ceil(low - slack), 0.0).to(tl.int32)
    last = tl.minimum(tl.floor(high + slack), tl.cast(out_size - 1, DTYPE)).to(tl.int32)
    if ALIGN_CORNERS:  # one source position: every target reads it; one target: it reads the first
        first = tl.where(scale > 0, first, 0)
        last = tl.where(scale > 0, last, out_size - 1)
    return first, last
