"""Convolution, normalization, activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfuse.nn.batch_norm import normalized
from fastfuse.nn.conv2d import Conv2d
from fastfuse.ops.checks import check_kernel_size

__all__ = ["ConvUnit"]


class ConvUnit(nn.Module):
    """Conv2d without bias, normalization, activation; "same" padding; keys ``conv.*``, ``bn.*``.

    The convolution is a :class:`fastfuse.nn.Conv2d`.

    Args:
        in_channels, out_channels: as in ``nn.Conv2d``.
        kernel_size: odd.
        dilation, groups: as in ``nn.Conv2d``.
        norm: called with out_channels, e.g. ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm``.
        activation: called without arguments, e.g. ``nn.ReLU``; this very class works in
            place after a batch norm.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: an even kernel_size, or what ``nn.Conv2d`` raises.

    >>> import torch, fastfuse
    >>> fastfuse.nn.ConvUnit(8, 16, 3)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        groups: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_kernel_size(name, kernel_size)
        self.conv = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.bn = norm(out_channels)
        self.activation = activation()
        in_place = activation is nn.ReLU and isinstance(self.bn, _BatchNorm)
        if in_place and isinstance(self.activation, nn.ReLU):
            self.activation.inplace = True  # nobody needs batch norm's result but the ReLU

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(normalized(self.conv, self.bn, x))
