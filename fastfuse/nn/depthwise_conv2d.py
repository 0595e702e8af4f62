"""Depthwise convolution as a module."""

from __future__ import annotations

from fastfuse.nn.conv2d import Conv2d
from fastfuse.ops.checks import check_ints, check_kernel_size

__all__ = ["DepthwiseConv2d"]


class DepthwiseConv2d(Conv2d):
    """Every channel convolved with its own kernel, stride 1, "same" zero padding.

    An ``nn.Conv2d(channels, channels, kernel_size, groups=channels)`` in all but speed, and so a
    :class:`Conv2d`: the same initialization, the same keys ``weight`` (channels, 1, k, k) and
    ``bias``.

    Args:
        channels: C.
        kernel_size: k, odd.
        dilation: distance of neighbouring taps in pixels, at least 1.
        bias: whether there is one.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: channels below 1, an even kernel_size, or dilation below 1.

    >>> import torch, fastfuse
    >>> fastfuse.nn.DepthwiseConv2d(8, 7, dilation=3)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, channels: int, kernel_size: int = 7, *, dilation: int = 1, bias: bool = True
    ) -> None:
        check_ints("DepthwiseConv2d", 1, channels=channels, dilation=dilation)
        check_kernel_size("DepthwiseConv2d", kernel_size)
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=channels,
            bias=bias,
        )
