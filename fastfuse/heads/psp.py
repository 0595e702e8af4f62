"""PSPNet's head: the coarsest level, fused with what it is pooled to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse.heads.decode_head import DecodeHead
from fastfuse.heads.pooling import PyramidPooling
from fastfuse.nn import MultiLevelFusion

__all__ = ["PSPHead"]


class PSPHead(DecodeHead):
    """Pyramid pooling on the last level, and the fusion of that level with its pooled ones.

    Keys as MMSegmentation's: ``psp_modules.i.1``, ``bottleneck``, ``conv_seg``;
    ``bottleneck.equalizer`` only with scale_equalizer.

    Args:
        in_channels: of the last level.
        channels: of each pooled level and of the fused map.
        num_classes: at least 1.
        pool_scales: sizes that the level is pooled to.
        scale_equalizer: whether the fusion equalizes its levels: see ``fastfuse.calibrate``.
        dropout: of channels, before the classifier.
        align_corners: of the upsampling.
        norm: called with a number of channels, e.g. ``nn.SyncBatchNorm``.

    Shape: features, finest first, the last of them (N, in_channels, H, W) -> logits
    (N, num_classes, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range; no level, or one of other channels.

    Source: *Pyramid Scene Parsing Network*.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.PSPHead(16, channels=8, num_classes=5).eval()
    >>> head([torch.randn(1, 16, 8, 8)]).shape
    torch.Size([1, 5, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        num_classes: int = 150,
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        scale_equalizer: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__({-1: in_channels}, channels, num_classes, dropout, align_corners)
        self.psp_modules = PyramidPooling("PSPHead", pool_scales, in_channels, channels, norm)
        self.bottleneck = MultiLevelFusion(
            [in_channels, *[channels] * len(pool_scales)],
            channels,
            scale_equalizer=scale_equalizer,
            norm=norm,
            align_corners=align_corners,
        )
        self.initialize()

    def fuse(self, levels: list[Tensor]) -> Tensor:
        (x,) = levels
        return self.bottleneck([x, *self.psp_modules(x)], x.shape[2:])
