"""The definition of upsample_argmax, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.ops.bilinear import interpolate

__all__ = ["reference"]


def reference(
    logits: Tensor, size: tuple[int, int], align_corners: bool, confidence: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``argmax_c UP(logits)[c]`` and, on demand, its softmax probability; narrow logits are
    upsampled in float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    upsampled = interpolate(wide, size, align_corners=align_corners)
    labels = upsampled.argmax(1)
    if not confidence:
        return labels
    return labels, upsampled.softmax(1).gather(1, labels[:, None])[:, 0]
