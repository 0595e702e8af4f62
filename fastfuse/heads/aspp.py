"""DeepLabV3's head: the last level convolved at several dilations, and pooled, then fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse.heads.decode_head import DecodeHead
from fastfuse.heads.pooling import PooledUnit
from fastfuse.nn import ConvUnit, MultiLevelFusion
from fastfuse.ops.checks import check_ints

__all__ = ["ASPPHead"]


class ASPPHead(DecodeHead):
    """Atrous spatial pyramid pooling on the last level.

    Keys as MMSegmentation's: ``image_pool.1``, ``aspp_modules.i``, ``bottleneck``, ``conv_seg``;
    ``bottleneck.equalizer`` only with scale_equalizer.

    Args:
        in_channels: of the last level.
        channels: of each branch and of the fused map.
        num_classes: at least 1.
        dilations: a branch for each; 1 stands for a 1x1 convolution, others are 3x3.
        scale_equalizer: whether the fusion equalizes its levels: see ``fastfuse.calibrate``.
        dropout: of channels, before the classifier.
        align_corners: of the upsampling.
        norm: called with a number of channels, e.g. ``nn.SyncBatchNorm``.

    Shape: features, finest first, the last of them (N, in_channels, H, W) -> logits
    (N, num_classes, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range; no level, or one of other channels.

    Source: *Rethinking Atrous Convolution for Semantic Image Segmentation*.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.ASPPHead(16, channels=8, num_classes=5).eval()
    >>> head([torch.randn(1, 16, 8, 8)]).shape
    torch.Size([1, 5, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        num_classes: int = 150,
        *,
        dilations: Sequence[int] = (1, 12, 24, 36),
        scale_equalizer: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__({-1: in_channels}, channels, num_classes, dropout, align_corners)
        name = type(self).__name__
        if not isinstance(dilations, Sequence) or len(dilations) == 0:
            raise ValueError(f"{name}: dilations must be a sequence of ints; got {dilations!r}")
        for dilation in dilations:
            check_ints(name, 1, dilations=dilation)
        self.image_pool = PooledUnit(1, in_channels, channels, norm)
        self.aspp_modules = nn.ModuleList(
            ConvUnit(in_channels, channels, 1, norm=norm)
            if dilation == 1
            else self._dilated(in_channels, channels, dilation, norm)
            for dilation in dilations
        )
        self.bottleneck = MultiLevelFusion(
            [channels] * (len(dilations) + 1),
            channels,
            scale_equalizer=scale_equalizer,
            norm=norm,
            align_corners=align_corners,
        )
        self.initialize()

    def _dilated(
        self, in_channels: int, channels: int, dilation: int, norm: Callable[[int], nn.Module]
    ) -> nn.Module:
        return ConvUnit(in_channels, channels, 3, dilation=dilation, norm=norm)

    def fuse(self, levels: list[Tensor]) -> Tensor:
        x = levels[-1]
        branches = [branch(x) for branch in self.aspp_modules]
        return self.bottleneck([self.image_pool(x), *branches], x.shape[2:])
