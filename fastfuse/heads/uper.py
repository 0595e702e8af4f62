"""UPerNet's head: pyramid pooling, a feature pyramid, and the fusion of all its levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse.heads.decode_head import DecodeHead
from fastfuse.heads.pooling import PyramidPooling
from fastfuse.nn import ConvUnit, MultiLevelFusion
from fastfuse.ops.upsample_add import upsample_add

__all__ = ["UPerHead"]


class UPerHead(DecodeHead):
    """Pyramid pooling on the coarsest level, a top-down feature pyramid, one fusion of its levels.

    Keys as MMSegmentation's: ``lateral_convs.i``, ``fpn_convs.i``, ``psp_modules.i.1``,
    ``bottleneck``, ``fpn_bottleneck``, ``conv_seg``; ``*.equalizer`` only with scale_equalizer.

    Args:
        in_channels: of every level, finest first; at least two.
        channels: of each pyramid level and of the fused map.
        num_classes: at least 1.
        pool_scales: sizes that the coarsest level is pooled to.
        scale_equalizer: whether both fusions, of the pooled levels (``bottleneck``) and of the
            pyramid (``fpn_bottleneck``), equalize their levels: see ``fastfuse.calibrate``.
        dropout: of channels, before the classifier.
        align_corners: of every upsampling.
        norm: called with a number of channels, e.g. ``nn.SyncBatchNorm``.

    Shape: levels (N, in_channels[i], H_i, W_i), finest first -> logits (N, num_classes, H_0, W_0).

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range; a wrong number of levels, or of channels, named.

    Source: *Unified Perceptual Parsing for Scene Understanding*; its fusions with equalizers:
    *Scale Equalization for Multi-Level Feature Fusion*.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.UPerHead([8, 16], channels=16, num_classes=5).eval()
    >>> head([torch.randn(1, 8, 16, 16), torch.randn(1, 16, 8, 8)]).shape
    torch.Size([1, 5, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        num_classes: int = 150,
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        scale_equalizer: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        if not isinstance(in_channels, Sequence) or len(in_channels) < 2:
            raise ValueError(
                "UPerHead: in_channels must have one number per level, at least two; "
                f"got {in_channels!r}"
            )
        super().__init__(
            dict(enumerate(in_channels)), channels, num_classes, dropout, align_corners
        )
        *lateral, coarsest = in_channels

        def fusion(levels: Sequence[int]) -> MultiLevelFusion:
            return MultiLevelFusion(
                levels,
                channels,
                scale_equalizer=scale_equalizer,
                norm=norm,
                align_corners=align_corners,
            )

        self.psp_modules = PyramidPooling("UPerHead", pool_scales, coarsest, channels, norm)
        self.bottleneck = fusion([coarsest, *[channels] * len(pool_scales)])
        self.lateral_convs = nn.ModuleList(ConvUnit(c, channels, 1, norm=norm) for c in lateral)
        self.fpn_convs = nn.ModuleList(ConvUnit(channels, channels, 3, norm=norm) for _ in lateral)
        self.fpn_bottleneck = fusion([channels] * len(in_channels))
        self.initialize()

    def fuse(self, levels: list[Tensor]) -> Tensor:
        *finer, coarsest = levels
        top = self.bottleneck([coarsest, *self.psp_modules(coarsest)], coarsest.shape[2:])
        laterals = [conv(level) for conv, level in zip(self.lateral_convs, finer, strict=True)]
        pyramid = [top]
        for lateral in reversed(laterals):
            pyramid.insert(0, upsample_add(pyramid[0], lateral, align_corners=self.align_corners))
        refined = [conv(level) for conv, level in zip(self.fpn_convs, pyramid, strict=False)]
        return self.fpn_bottleneck([*refined, top], refined[0].shape[2:])
