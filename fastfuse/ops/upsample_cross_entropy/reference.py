"""The definition of upsample_cross_entropy, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.bilinear import interpolate

__all__ = ["reference"]


def reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    reduction: str = "none",
) -> Tensor:
    """``cross_entropy(UP(logits), target, ...)``; narrow logits in float32."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    size = (target.shape[1], target.shape[2])
    return F.cross_entropy(
        interpolate(logits, size, align_corners=align_corners),
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
