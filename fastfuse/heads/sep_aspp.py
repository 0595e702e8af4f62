"""DeepLabV3+'s head: separable atrous pyramid pooling, and a second fusion with a fine level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse.heads.aspp import ASPPHead
from fastfuse.nn import ConvUnit, SeparableConvUnit, SeparableFusion
from fastfuse.nn.initialize import kaiming_normal_relu
from fastfuse.ops.checks import check_ints

__all__ = ["SepASPPHead"]


class _SeparableBottleneck(nn.Sequential):
    """A fusion of levels, and a unit after it."""

    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor], size: Sequence[int]
    ) -> Tensor:
        fusion, refine = self
        return refine(fusion(features, size))


class SepASPPHead(ASPPHead):
    """Atrous spatial pyramid pooling with separable dilated convolutions, fused with a fine level.

    Keys as MMSegmentation's: those of :class:`ASPPHead`, whose dilated ``aspp_modules.i`` are
    separable here, ``c1_bottleneck``, and ``sep_bottleneck.0`` and ``.1``, separable;
    ``bottleneck.equalizer`` and ``sep_bottleneck.0.equalizer`` only with scale_equalizer.

    Args:
        in_channels: of the last level.
        channels: of each branch and of both fused maps.
        num_classes: at least 1.
        dilations: a branch for each; 1 stands for a 1x1 convolution.
        c1_in_channels: of the first level.
        c1_channels: what the first level is reduced to.
        scale_equalizer: whether both fusions equalize their levels: see ``fastfuse.calibrate``.
        dropout: of channels, before the classifier.
        align_corners: of the upsampling.
        norm: called with a number of channels, e.g. ``nn.SyncBatchNorm``.

    Shape: features, finest first, the first of them (N, c1_in_channels, H, W), the last
    (N, in_channels, h, w) -> logits (N, num_classes, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range; fewer than two levels, or other channels.

    Source: *Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation*.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.SepASPPHead(
    ...     16, channels=8, num_classes=5, c1_in_channels=4, c1_channels=2).eval()
    >>> head([torch.randn(1, 4, 16, 16), torch.randn(1, 16, 4, 4)]).shape
    torch.Size([1, 5, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        num_classes: int = 150,
        *,
        dilations: Sequence[int] = (1, 12, 24, 36),
        c1_in_channels: int = 256,
        c1_channels: int = 48,
        scale_equalizer: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        check_ints("SepASPPHead", 1, c1_in_channels=c1_in_channels, c1_channels=c1_channels)
        super().__init__(
            in_channels,
            channels,
            num_classes,
            dilations=dilations,
            scale_equalizer=scale_equalizer,
            dropout=dropout,
            align_corners=align_corners,
            norm=norm,
        )
        self.level_channels = {0: c1_in_channels, **self.level_channels}
        self.c1_bottleneck = ConvUnit(c1_in_channels, c1_channels, 1, norm=norm)
        self.sep_bottleneck = _SeparableBottleneck(
            SeparableFusion(
                [channels, c1_channels],
                channels,
                scale_equalizer=scale_equalizer,
                norm=norm,
                align_corners=align_corners,
            ),
            SeparableConvUnit(channels, channels, norm=norm),
        )
        kaiming_normal_relu(self.c1_bottleneck)
        kaiming_normal_relu(self.sep_bottleneck)

    def _dilated(
        self, in_channels: int, channels: int, dilation: int, norm: Callable[[int], nn.Module]
    ) -> nn.Module:
        return SeparableConvUnit(in_channels, channels, dilation=dilation, norm=norm)

    def fuse(self, levels: list[Tensor]) -> Tensor:
        c1 = self.c1_bottleneck(levels[0])
        return self.sep_bottleneck([super().fuse(levels), c1], c1.shape[2:])
