"""The definition of upsample_add, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastfuse.ops.bilinear import interpolate
from fastfuse.ops.layout import defined_memory_format, is_channels_last

__all__ = ["reference"]


def reference(x: Tensor, skip: Tensor, align_corners: bool = False) -> Tensor:
    """``skip + UP(x)``, x upsampled to skip's size.

    The adjoint of a sum goes to both: skip's gradient is the output's, x's is the adjoint of UP.
    """
    size = (skip.shape[2], skip.shape[3])
    output = skip + interpolate(x, size, align_corners=align_corners)
    return defined_memory_format(output, is_channels_last([x, skip]))
