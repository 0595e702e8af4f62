"""The one table of tolerances, for ``verify`` and the tests.

An error is the largest absolute difference to the float64 result, relative to that result's largest
magnitude. float64 and float32 results carry a few roundings each; bfloat16 and float16 results are
accumulated in float32 and rounded once, so that half a unit in the last place (2^-8, 2^-11) and the
float32 error are all they may be off. Gradients that sum ``reduction`` values get the root of it.
The reference backend rounds after every step and gets one rounding per step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "relative_error", "tolerance"]

TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8 + 1e-6,
    torch.float16: 2**-11 + 1e-6,
}


def tolerance(dtype: torch.dtype, *, reduction: float = 1.0, roundings: int = 1) -> float:
    return TOLERANCES[dtype] * roundings * math.sqrt(max(reduction, 1.0))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest difference over largest magnitude; NaN or a wrong shape count as infinite."""
    if result.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    difference = (result.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return math.inf if math.isnan(difference) else difference / max(scale, 1e-30)
