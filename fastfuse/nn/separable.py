"""Depthwise separable convolution units, of one image and of several levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastfuse.nn.composition import leaf
from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.level_fusion import EQUALIZER, LevelFusion, check_in_channels

__all__ = ["SeparableConvUnit", "SeparableFusion"]


class SeparableConvUnit(nn.Module):
    """A depthwise :class:`ConvUnit`, then a 1x1 one; "same" padding.

    Keys ``depthwise_conv.conv|bn.*``, ``pointwise_conv.conv|bn.*``.

    Args:
        in_channels, out_channels: of the whole.
        kernel_size: of the depthwise convolution, odd.
        dilation: of the depthwise convolution.
        norm, activation: as in :class:`ConvUnit`, for both units.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W).

    Raises:
        ValueError: an even kernel_size, or what ``nn.Conv2d`` raises.

    >>> import torch, fastfuse
    >>> fastfuse.nn.SeparableConvUnit(8, 16, dilation=12)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        dilation: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.depthwise_conv = ConvUnit(
            in_channels,
            in_channels,
            kernel_size,
            dilation=dilation,
            groups=in_channels,
            norm=norm,
            activation=activation,
        )
        self.pointwise_conv = ConvUnit(
            in_channels, out_channels, 1, norm=norm, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class SeparableFusion(SeparableConvUnit, LevelFusion):
    """Upsample, (equalize,) concatenate, then a :class:`SeparableConvUnit`.

    A depthwise convolution does not mix levels, so that there is little to save at a level's own
    resolution: the levels are concatenated by :func:`fastfuse.upsample_equalize_concat`.

    Args:
        in_channels: channels of every level, in the order of concatenation.
        out_channels: channels of the result.
        kernel_size: odd.
        scale_equalizer: whether a :class:`ScaleEqualizer` stands before the concatenation.
        norm, activation: as in :class:`ConvUnit`.
        align_corners: of the upsampling.

    Shape: levels (N, in_channels[i], H_i, W_i) -> (N, out_channels, H, W), where (H, W) is ``size``
    or the largest height and width among the levels.

    Keys: those of :class:`SeparableConvUnit`, and ``equalizer.*`` only if enabled.

    Raises:
        ValueError: in_channels empty or not positive, a wrong number of levels or channels (named).

    >>> import torch, fastfuse
    >>> fusion = fastfuse.nn.SeparableFusion([8, 4], 16, scale_equalizer=True)
    >>> fusion([torch.randn(2, 8, 8, 8), torch.randn(2, 4, 16, 16)]).shape
    torch.Size([2, 16, 16, 16])
    """

    parts: ClassVar = {"equalizer": EQUALIZER}

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        kernel_size: int = 3,
        *,
        scale_equalizer: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
        align_corners: bool = False,
    ) -> None:
        check_in_channels("SeparableFusion", in_channels)
        super().__init__(
            sum(in_channels), out_channels, kernel_size, norm=norm, activation=activation
        )
        self._set_levels(in_channels, scale_equalizer, align_corners)

    @property
    def level_conv(self) -> nn.Module:
        return self.depthwise_conv.conv

    @property
    def level_units(self) -> Sequence[nn.Module]:
        return (self.depthwise_conv,)

    @property
    def level_axis(self) -> int:
        return 0

    @leaf
    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor], size: Sequence[int] | None = None
    ) -> Tensor:
        return super().forward(self._concatenated(self._check_levels(features), size))
