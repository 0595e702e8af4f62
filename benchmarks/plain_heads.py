"""The decode heads in plain PyTorch, as MMSegmentation composes them: rival and oracle.

Every fusion upsamples its levels, (equalizes them,) concatenates and convolves the concatenation.
Keys are those of ``fastfuse.heads``, so that a state dict of one loads into the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ASPP", "FCN", "PLAIN", "PSP", "Segformer", "SepASPP", "UPer"]


class Unit(nn.Module):
    """Conv2d without bias, BatchNorm, ReLU."""

    def __init__(
        self, in_channels: int, channels: int, k: int, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, k, padding=k // 2 * dilation, dilation=dilation, groups=groups,
            bias=False,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class SeparableUnit(nn.Module):
    def __init__(self, in_channels: int, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = Unit(in_channels, in_channels, 3, dilation, groups=in_channels)
        self.pointwise_conv = Unit(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class Equalizer(nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(levels))
        self.register_buffer("std", torch.ones(levels))


def concatenation(fusion: nn.Module, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Levels of one size, equalized if the fusion has an equalizer, one after the other."""
    upsampled = [up(level, size, fusion.align_corners) for level in levels]
    if fusion.equalizer is not None:
        constants = zip(fusion.equalizer.mean, fusion.equalizer.std, strict=True)
        upsampled = [(x - m) / s for x, (m, s) in zip(upsampled, constants, strict=True)]
    return torch.cat(upsampled, dim=1)


def up(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


class Fusion(Unit):
    def __init__(
        self, in_channels: Sequence[int], channels: int, k: int, equalized: bool, align: bool
    ) -> None:
        super().__init__(sum(in_channels), channels, k)
        self.align_corners = align
        self.equalizer = Equalizer(len(in_channels)) if equalized else None

    def forward(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        return super().forward(concatenation(self, levels, size))


class SeparableFusion(SeparableUnit):
    def __init__(
        self, in_channels: Sequence[int], channels: int, equalized: bool, align: bool
    ) -> None:
        super().__init__(sum(in_channels), channels)
        self.align_corners = align
        self.equalizer = Equalizer(len(in_channels)) if equalized else None

    def forward(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        return super().forward(concatenation(self, levels, size))


def pooled(scale: int, in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(scale), Unit(in_channels, channels, 1))


class Head(nn.Module):
    """``dropout`` is 0 where it is compared: channels are dropped at random."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout)

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class UPer(Head):
    def __init__(
        self, in_channels: Sequence[int], channels: int = 512, num_classes: int = 150,
        *, pool_scales: Sequence[int] = (1, 2, 3, 6), scale_equalizer: bool = False,
        dropout: float = 0.1, align_corners: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(channels, num_classes, dropout)
        self.align_corners = align_corners
        last = in_channels[-1]
        self.psp_modules = nn.ModuleList(pooled(s, last, channels) for s in pool_scales)
        pooling = [last, *[channels] * len(pool_scales)]
        self.bottleneck = Fusion(pooling, channels, 3, scale_equalizer, align_corners)
        self.lateral_convs = nn.ModuleList(Unit(c, channels, 1) for c in in_channels[:-1])
        self.fpn_convs = nn.ModuleList(Unit(channels, channels, 3) for _ in in_channels[:-1])
        pyramid = [channels] * len(in_channels)
        self.fpn_bottleneck = Fusion(pyramid, channels, 3, scale_equalizer, align_corners)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        top = features[-1]
        pooled_levels = [module(top) for module in self.psp_modules]
        top = self.bottleneck([top, *pooled_levels], top.shape[2:])
        laterals = [c(x) for c, x in zip(self.lateral_convs, features[:-1], strict=True)]
        laterals.append(top)
        for i in range(len(laterals) - 1, 0, -1):
            finer = laterals[i - 1]
            laterals[i - 1] = finer + up(laterals[i], finer.shape[2:], self.align_corners)
        pyramid = [c(x) for c, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        pyramid.append(laterals[-1])
        return self.classify(self.fpn_bottleneck(pyramid, pyramid[0].shape[2:]))


class PSP(Head):
    def __init__(
        self, in_channels: int, channels: int = 512, num_classes: int = 150,
        *, pool_scales: Sequence[int] = (1, 2, 3, 6), scale_equalizer: bool = False,
        dropout: float = 0.1, align_corners: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(channels, num_classes, dropout)
        self.psp_modules = nn.ModuleList(pooled(s, in_channels, channels) for s in pool_scales)
        levels = [in_channels, *[channels] * len(pool_scales)]
        self.bottleneck = Fusion(levels, channels, 3, scale_equalizer, align_corners)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[-1]
        levels = [x, *(module(x) for module in self.psp_modules)]
        return self.classify(self.bottleneck(levels, x.shape[2:]))


class ASPP(Head):
    def __init__(
        self, in_channels: int, channels: int = 512, num_classes: int = 150,
        *, dilations: Sequence[int] = (1, 12, 24, 36), scale_equalizer: bool = False,
        dropout: float = 0.1, align_corners: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(channels, num_classes, dropout)
        self.image_pool = pooled(1, in_channels, channels)
        self.aspp_modules = nn.ModuleList(
            Unit(in_channels, channels, 1) if d == 1 else self.branch(in_channels, channels, d)
            for d in dilations
        )
        levels = [channels] * (len(dilations) + 1)
        self.bottleneck = Fusion(levels, channels, 3, scale_equalizer, align_corners)

    def branch(self, in_channels: int, channels: int, dilation: int) -> nn.Module:
        return Unit(in_channels, channels, 3, dilation)

    def fused(self, x: Tensor) -> Tensor:
        branches = [self.image_pool(x), *(module(x) for module in self.aspp_modules)]
        return self.bottleneck(branches, x.shape[2:])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.classify(self.fused(features[-1]))


class SepASPP(ASPP):
    def __init__(
        self, in_channels: int, channels: int = 512, num_classes: int = 150,
        *, dilations: Sequence[int] = (1, 12, 24, 36), c1_in_channels: int = 256,
        c1_channels: int = 48, scale_equalizer: bool = False, dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, channels, num_classes, dilations=dilations, dropout=dropout,
            scale_equalizer=scale_equalizer, align_corners=align_corners,
        )  # fmt: skip
        self.c1_bottleneck = Unit(c1_in_channels, c1_channels, 1)
        self.sep_bottleneck = nn.Sequential(
            SeparableFusion([channels, c1_channels], channels, scale_equalizer, align_corners),
            SeparableUnit(channels, channels),
        )

    def branch(self, in_channels: int, channels: int, dilation: int) -> nn.Module:
        return SeparableUnit(in_channels, channels, dilation)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        c1 = self.c1_bottleneck(features[0])
        fused = self.sep_bottleneck[0]([self.fused(features[-1]), c1], c1.shape[2:])
        return self.classify(self.sep_bottleneck[1](fused))


class FCN(Head):
    def __init__(
        self, in_channels: int, channels: int = 512, num_classes: int = 150,
        *, num_convs: int = 2, kernel_size: int = 3, concat_input: bool = True,
        scale_equalizer: bool = False, dropout: float = 0.1, align_corners: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(channels, num_classes, dropout)
        widths = [in_channels, *[channels] * num_convs]
        self.convs = nn.Sequential(*(Unit(c, channels, kernel_size) for c in widths[:-1]))
        levels = [in_channels, channels]
        self.conv_cat = (
            Fusion(levels, channels, kernel_size, scale_equalizer, align_corners)
            if concat_input
            else None
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[-1]
        refined = self.convs(x)
        if self.conv_cat is not None:
            refined = self.conv_cat([x, refined], x.shape[2:])
        return self.classify(refined)


class Segformer(Head):
    def __init__(
        self, in_channels: Sequence[int], channels: int = 256, num_classes: int = 150,
        *, scale_equalizer: bool = False, dropout: float = 0.1, align_corners: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.ModuleList(Unit(c, channels, 1) for c in in_channels)
        levels = [channels] * len(in_channels)
        self.fusion_conv = Fusion(levels, channels, 1, scale_equalizer, align_corners)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        levels = [conv(x) for conv, x in zip(self.convs, features, strict=True)]
        return self.classify(self.fusion_conv(levels, levels[0].shape[2:]))


PLAIN = {
    "UPerHead": UPer,
    "PSPHead": PSP,
    "ASPPHead": ASPP,
    "SepASPPHead": SepASPP,
    "FCNHead": FCN,
    "SegformerHead": Segformer,
}
