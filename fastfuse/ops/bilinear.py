"""The sampling rule of bilinear interpolation, once, for everything written in Python.

Along an axis of ``in_size`` source and ``out_size`` target positions, target ``d`` reads the source
positions ``lower[d]`` and ``upper[d]`` with weights ``1 - weight[d]`` and ``weight[d]``::

    source(d) = max((d + 0.5) * in / out - 0.5, 0)        without align_corners
    source(d) = d * (in - 1) / (out - 1)                  with align_corners
    lower = min(floor(source), in - 1),  upper = min(lower + 1, in - 1),  weight = source - lower

Coordinates are computed in float32 for float32 and narrower dtypes and in float64 for float64, with
one rounding for the multiply-add, as PyTorch's kernels do: float32 weights equal theirs to the bit.
``csrc/cpu/bilinear.h`` and ``bilinear_triton.py`` say the same in C++ and Triton.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.backends import is_tracing

__all__ = ["axis_table", "interpolate", "interpolate_exactly"]


@lru_cache(maxsize=256)
def axis_table(
    in_size: int, out_size: int, *, align_corners: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """``(lower, upper, weight)`` of every target position, each of shape (out_size,).

    ``lower`` and ``upper`` are int64, ``weight`` is float64 holding values that are exact in the
    coordinates' dtype (float64 for ``dtype=torch.float64``, else float32).

    >>> lower, upper, weight = axis_table(2, 4, align_corners=False)
    >>> lower.tolist(), upper.tolist(), weight.tolist()
    ([0, 0, 0, 1], [1, 1, 1, 1], [0.0, 0.25, 0.75, 0.25])
    """
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    target = torch.arange(out_size, device="cpu")
    if in_size == out_size:
        return target, (target + 1).clamp(max=in_size - 1), torch.zeros_like(target).double()
    if align_corners:
        ends = [in_size - 1, max(out_size - 1, 1)]
        steps = torch.tensor(ends, dtype=coordinates, device="cpu")
        source = (steps[0] / steps[1]) * target.to(coordinates)
    else:
        sizes = torch.tensor([in_size, out_size], dtype=coordinates, device="cpu")
        scale = Fraction((sizes[0] / sizes[1]).item())
        exact = [scale * Fraction(2 * d + 1, 2) - Fraction(1, 2) for d in range(out_size)]
        # Rounded once. (For float32 twice, but a float32 product is exact in float64.)
        rounded = [float(x) for x in exact]
        source = torch.tensor(rounded, dtype=torch.float64, device="cpu").to(coordinates)
        source = source.clamp(min=0)
    lower = source.to(torch.int64).clamp(max=in_size - 1)
    upper = (lower + 1).clamp(max=in_size - 1)
    return lower, upper, (source.double() - lower).clamp(0, 1)


def interpolate(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Bilinear interpolation of ``x`` (N, C, h, w) to (N, C, *size) by PyTorch: the references'."""
    if tuple(x.shape[2:]) == tuple(size) and not is_tracing():
        return x
    if x.shape[0] == 0 or x.shape[1] == 0:  # nothing to interpolate, which PyTorch refuses to do
        return x.sum(dim=(2, 3), keepdim=True).expand(-1, -1, *size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def interpolate_exactly(
    x: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    coordinates: torch.dtype | None = None,
) -> Tensor:
    """Bilinear interpolation of ``x`` (N, C, h, w) to (N, C, *size) in float64: the tests' oracle.

    ``coordinates`` names the dtype whose coordinates are used (default: that of ``x``): a float32
    kernel is right if it comes close to float64 arithmetic at float32 coordinates.
    """
    dtype = coordinates or x.dtype
    result = x.double()
    for dim, out_size in ((2, size[0]), (3, size[1])):
        if result.shape[dim] == out_size:
            continue
        lower, upper, weight = (
            t.to(x.device)
            for t in axis_table(
                result.shape[dim], out_size, align_corners=align_corners, dtype=dtype
            )
        )
        weight = weight.reshape(-1, *[1] * (3 - dim))
        result = result.index_select(dim, lower) * (1 - weight) + (
            result.index_select(dim, upper) * weight
        )
    return result
