"""Roundings that numpy lacks: those of bfloat16, and of a product and a sum at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BFLOAT16_NAN = np.uint16(0x7FFF)  # what hardware makes of every NaN


def widen_bfloat16(bits: Array) -> Array:
    """The float32 of bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_float32(values: Array) -> Array:
    """Of float64 rounded to odd, so that a second rounding to fewer bits is as one."""
    nearest = values.astype(np.float32)
    if values.dtype != np.float64:
        return nearest
    lost = values - nearest
    even = nearest.view(np.int32) % 2 == 0
    inexact = even & (lost != 0) & np.isfinite(lost)
    toward = np.copysign(np.float32(np.inf), lost.astype(np.float32))
    return np.where(inexact, np.nextafter(nearest, toward), nearest)


def round_bfloat16(values: Array) -> Array:
    """The bits of bfloat16, to nearest even."""
    values = _to_float32(np.asarray(values))
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), BFLOAT16_NAN, rounded.astype(np.uint16))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """``a + b``, and what its rounding lost (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """``a * b`` in float64, and what its rounding lost (Dekker)."""
    splitter = 2.0**27 + 1
    high_a, high_b = (splitter * x - (splitter * x - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    product = a * b
    return product, low_a * low_b - (
        ((product - high_a * high_b) - low_a * high_b) - high_a * low_b
    )


def add_to_odd(a: Array, b: Array) -> Array:
    """``a + b`` in float64, rounded to odd: it remembers on which side of a tie it was."""
    total, lost = _two_sum(a, b)
    even = total.view(np.int64) % 2 == 0
    inexact = even & (lost != 0) & np.isfinite(lost)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, lost)), total)


def fma(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z``, rounded once.

    float32 and float16 by way of float64, where the product is exact. float64 as Boldo and
    Melquiond (2008) do it; products near the ends of its range are rounded twice.
    """
    x, y, z = np.broadcast_arrays(x, y, z)
    with np.errstate(all="ignore"):
        if x.dtype != np.float64:
            wide_x, wide_y, wide_z = (a.astype(np.float64) for a in (x, y, z))
            return add_to_odd(wide_x * wide_y, wide_z).astype(x.dtype)
        product, product_rest = _two_product(x, y)
        addend, addend_rest = _two_sum(z, product_rest)
        total, total_rest = _two_sum(product, addend)
        once = total + add_to_odd(addend_rest, total_rest)
        return np.where(np.isfinite(once), once, x * y + z)
