"""The definition of fusion_conv2d, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.layout import defined_memory_format, is_channels_last
from fastfuse.ops.upsample_equalize_concat.reference import reference as concatenated

__all__ = ["reference"]


def reference(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    mean: Tensor | None,
    std: Tensor | None,
    padding: int,
    align_corners: bool,
) -> Tensor:
    """``conv2d(upsample_equalize_concat(features, ...), weight, bias, padding=padding)``."""
    fused = concatenated(features, size, mean, std, align_corners)
    output = F.conv2d(fused, weight, bias, padding=padding)
    return defined_memory_format(output, is_channels_last(features))
