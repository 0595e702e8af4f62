"""PyTorch's own: convolutions, with batch norms behind them, and bilinear upsampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.conversion.parts import upsampled
from fastfuse.conversion.pattern import register_pattern
from fastfuse.nn.batch_norm import in_order, norms_of
from fastfuse.nn.conv2d import convolve, dense_padding, depthwise_dilation


def _check(conv: Any) -> str | None:
    # The weight itself may be computed, by what changes when it is read: spectral_norm.
    kernel = tuple(conv.kernel_size)
    shape = (conv.out_channels, conv.in_channels // conv.groups, *kernel)
    weight = torch.empty(shape, device="meta")
    if kernel[0] > 1 and depthwise_dilation(conv, weight) is not None:
        return None
    if kernel[0] == 3 and dense_padding(conv, weight) is not None:
        return None
    return "is a convolution that PyTorch runs as fast"


@register_pattern("torch.nn.modules.conv:Conv2d", check=_check)
def conv2d(self: nn.Conv2d, input: Tensor) -> Tensor:
    return convolve(self, input)


def _check_sequence(sequence: Any) -> str | None:
    return None if any(norms_of(sequence)) else ""


@register_pattern("torch.nn.modules.container:Sequential", check=_check_sequence)
def sequential(self: nn.Sequential, input: Tensor) -> Tensor:
    return in_order(list(self), input)


def whole_scale(factor: float | tuple[float, ...] | None) -> int | None:
    """A scale factor that gives an exact size: one whole number for both axes."""
    if not isinstance(factor, (int, float)) or factor < 1 or factor != int(factor):
        return None
    return int(factor)


def _check_upsampling(up: Any) -> str | None:
    if up.mode != "bilinear":
        return f"upsamples by {up.mode} interpolation: no op of this package does"
    if up.size is None and whole_scale(up.scale_factor) is None:
        return "upsamples by a factor that is no whole number"
    return None


@register_pattern("torch.nn.modules.upsampling:Upsample", check=_check_upsampling)
def upsample(self: Any, input: Tensor) -> Tensor:
    size, scale = self.size, whole_scale(self.scale_factor)
    if self.mode != "bilinear" or input.dim() != 4 or (size is None) == (scale is None):
        return type(self).forward(self, input)
    if scale is not None:
        size = (scale * input.shape[2], scale * input.shape[3])
    elif isinstance(size, int):
        size = (size, size)
    return upsampled(input, size, bool(self.align_corners))
