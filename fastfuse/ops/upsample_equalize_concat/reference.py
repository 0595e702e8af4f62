"""The definition of upsample_equalize_concat, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.ops.bilinear import interpolate
from fastfuse.ops.layout import defined_memory_format, is_channels_last

__all__ = ["reference"]


def reference(
    features: Sequence[Tensor],
    size: tuple[int, int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """``concat_i((UP(features[i]) - mean[i]) / std[i])`` along the channels."""
    levels = []
    for i, feature in enumerate(features):
        level = interpolate(feature, size, align_corners=align_corners)
        if mean is not None:
            level = level - mean[i]
        if std is not None:
            level = level / std[i]
        levels.append(level)
    output = torch.cat(levels, dim=1)
    return defined_memory_format(output, is_channels_last(features))
