"""The definition of upsample_argmax, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.bilinear import interpolate

__all__ = ["reference"]


def reference(
    logits: Tensor, size: tuple[int, int], align_corners: bool, confidence: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``argmax_c UP(logits)[c]`` and, on demand, its softmax probability; narrow logits are
    upsampled in float32."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    upsampled = interpolate(logits, size, align_corners=align_corners)
    labels = upsampled.argmax(1)
    if not confidence:
        return labels
    return labels, upsampled.softmax(1).gather(1, labels[:, None])[:, 0]
