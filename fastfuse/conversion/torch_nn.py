"""PyTorch's own convolutions, wherever they stand."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastfuse.conversion.pattern import register_pattern
from fastfuse.nn.conv2d import convolve, dense_padding, depthwise_dilation


def _check(conv: nn.Module) -> str | None:
    weight: Any = conv.weight
    if weight.dim() == 4 and weight.shape[2] > 1:
        if depthwise_dilation(conv, weight) is not None:  # type: ignore[arg-type]
            return None
        if weight.shape[2] == 3 and dense_padding(conv, weight) is not None:  # type: ignore[arg-type]
            return None
    return "is a convolution that PyTorch runs as fast"


@register_pattern("torch.nn.modules.conv:Conv2d", check=_check)
def conv2d(self: nn.Conv2d, input: Tensor) -> Tensor:
    return convolve(self, input)
