"""Inputs that the tests of ops on upsampled logits share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.ops.bilinear import axis_table

__all__ = ["strided", "zero_times_infinity"]


def strided(
    shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """Random logits below 2 * scale, of some strides."""
    n, c, h, w = shape
    if layout.startswith("sliced"):
        x = torch.rand(n, c + 3, h + 2, 2 * w)
    elif layout == "transposed":
        x = torch.rand(n, c, w, h)
    elif layout == "expanded":
        x = torch.rand(n, c, 1, w)
    else:
        x = torch.rand(shape)
    x = ((4 * x - 2) * scale).to(dtype)
    if layout.endswith("nhwc"):
        x = x.contiguous(memory_format=torch.channels_last)
    if layout.startswith("sliced"):
        return x[:, 2:-1, 1:-1, ::2]
    if layout == "transposed":
        return x.transpose(2, 3)
    return x.expand(shape)


def zero_times_infinity(source: int, target: int, align_corners: bool) -> bool:
    """Whether PyTorch multiplies a value by one and, once more, by zero: no infinity stays one."""
    if source == target:
        return True
    lower, upper, weight = axis_table(source, target, align_corners=align_corners)
    return bool(((lower == upper) & (weight == 0)).any())
