"""Depthwise convolution as a module."""

from __future__ import annotations

from fastfuse.nn.conv2d import Conv2d

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
        ValueError: channels below 1, an even kernel_size, or dilation below 1.

    >>> import torch, fastfuse
    >>> fastfuse.nn.DepthwiseConv2d(8, 7, dilation=3)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, channels: int, kernel_size: int = 7, *, dilation: int = 1, bias: bool = True
    ) -> None:
        for argument, value in (("channels", channels), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"DepthwiseConv2d: {argument} must be at least 1; got {value}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"DepthwiseConv2d: kernel_size must be odd; got {kernel_size}")
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=channels,
            bias=bias,
        )
