"""segmentation_models_pytorch: the decoders of UPerNet, PSPNet, DeepLabV3, DeepLabV3+ and FPN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.conversion.parts import (
    are_untouched,
    concatenated,
    dilated_pyramid,
    fused,
    is_original,
    is_sequence,
    upsampled,
    upsampled_sum,
)
from fastfuse.conversion.pattern import register_pattern
from fastfuse.conversion.torch_nn import whole_scale

_DECODERS = "segmentation_models_pytorch.decoders"
_UPERNET = f"{_DECODERS}.upernet.decoder"
_PSPNET = f"{_DECODERS}.pspnet.decoder"
_DEEPLAB = f"{_DECODERS}.deeplabv3.decoder"
_FPN = f"{_DECODERS}.fpn.decoder"


@register_pattern(f"{_UPERNET}:PSPModule")
def upernet_pooling(self: Any, feature: Tensor) -> Tensor:
    levels = [feature, *(block(feature) for block in self.blocks)]
    return fused(self.out_conv, levels, feature.shape[2:])


@register_pattern(f"{_UPERNET}:FPNLateralBlock")
def upernet_lateral(self: Any, state_feature: Tensor, lateral_feature: Tensor) -> Tensor:
    return upsampled_sum(state_feature, self.conv_norm_relu(lateral_feature))


@register_pattern(f"{_UPERNET}:UPerNetDecoder")
def upernet(self: Any, features: list[Tensor]) -> Tensor:
    levels = [norm(f) for norm, f in zip(self.feature_norms, features[2:], strict=True)]
    *finer, coarsest = levels
    pyramid = [self.psp(coarsest)]
    for block, lateral in zip(self.fpn_lateral_blocks, reversed(finer), strict=True):
        pyramid.append(block(pyramid[-1], lateral))
    refined = [conv(f) for conv, f in zip(self.fpn_conv_blocks, pyramid[1:], strict=True)]
    size = pyramid[-1].shape[2:]
    return fused(self.fusion_block, [*reversed(refined), pyramid[0]], size)


@register_pattern(f"{_PSPNET}:PSPDecoder")
def pspnet(self: Any, features: list[Tensor]) -> Tensor:
    x, psp = features[-1], self.psp
    if not is_original(psp, f"{_PSPNET}:PSPModule") or not all(
        is_original(block, f"{_PSPNET}:PSPBlock") for block in psp.blocks
    ):
        return type(self).forward(self, features)
    pooled = [block.pool(x) for block in psp.blocks]
    return self.dropout(fused(self.conv, [*pooled, x], x.shape[2:], align_corners=True))


@register_pattern(f"{_DEEPLAB}:ASPP")
def aspp(self: Any, x: Tensor) -> Tensor:
    return dilated_pyramid(self, x, f"{_DEEPLAB}:ASPPPooling")


@register_pattern(f"{_DEEPLAB}:DeepLabV3PlusDecoder")
def deeplabv3plus(self: Any, features: list[Tensor]) -> Tensor:
    up = self.up
    scale = whole_scale(up.scale_factor) if type(up) is nn.Upsample else None
    if scale is None or up.mode != "bilinear" or not are_untouched(up):
        return type(self).forward(self, features)
    coarse = self.aspp(features[-1])
    fine = self.block1(features[2])
    size = fine.shape[2:]
    if tuple(size) != (scale * coarse.shape[2], scale * coarse.shape[3]):
        return self.block2(torch.cat([up(coarse), fine], dim=1))  # PyTorch's error
    return fused(self.block2, [coarse, fine], size, bool(up.align_corners))


def _check_block(block: Any) -> str | None:
    if block.interpolation_mode == "bilinear":
        return None
    return f"upsamples by {block.interpolation_mode} interpolation: no op of this package does"


@register_pattern(f"{_FPN}:FPNBlock", check=_check_block)
def fpn_block(self: Any, x: Tensor, skip: Tensor) -> Tensor:
    skip = self.skip_conv(skip)
    same = tuple(skip.shape[2:]) == (2 * x.shape[2], 2 * x.shape[3])
    if self.interpolation_mode != "bilinear" or not same:
        x = nn.functional.interpolate(x, scale_factor=2.0, mode=self.interpolation_mode)
        return x + skip
    return upsampled_sum(x, skip)


@register_pattern(f"{_FPN}:Conv3x3GNReLU")
def fpn_unit(self: Any, x: Tensor) -> Tensor:
    x = self.block(x)
    if not self.upsample:
        return x
    return upsampled(x, (2 * x.shape[2], 2 * x.shape[3]), align_corners=True)


def _before_upsampling(block: Any, x: Tensor) -> tuple[Tensor, int]:
    """A segmentation block without its last upsampling, and that one's scale."""
    layers = block.block
    if not is_original(block, f"{_FPN}:SegmentationBlock") or not is_sequence(layers):
        return block(x), 1
    *before, last = layers
    for layer in before:
        x = layer(x)
    if not is_original(last, f"{_FPN}:Conv3x3GNReLU"):
        return last(x), 1
    return last.block(x), 2 if last.upsample else 1


@register_pattern(f"{_FPN}:FPNDecoder")
def fpn(self: Any, features: list[Tensor]) -> Tensor:
    c2, c3, c4, c5 = features[-4:]
    p5 = self.p5(c5)
    p4 = self.p4(p5, c4)
    p3 = self.p3(p4, c3)
    p2 = self.p2(p3, c2)
    pairs = zip(self.seg_blocks, (p5, p4, p3, p2), strict=True)
    levels = [_before_upsampling(block, x) for block, x in pairs]
    size = levels[-1][0].shape[2:]
    merges = is_original(self.merge, f"{_FPN}:MergeBlock") and all(
        tuple(size) == (scale * x.shape[2], scale * x.shape[3]) for x, scale in levels
    )
    if not merges:
        return self.dropout(self.merge([_doubled(x, scale) for x, scale in levels]))
    maps = [x for x, _ in levels]
    if self.merge.policy == "cat":
        return self.dropout(concatenated(maps, size, align_corners=True))
    *coarser, merged = maps
    for x in reversed(coarser):
        merged = upsampled_sum(x, merged, align_corners=True)
    return self.dropout(merged)


def _doubled(x: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return x
    return nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
