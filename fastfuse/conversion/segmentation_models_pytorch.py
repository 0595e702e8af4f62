"""segmentation_models_pytorch: the decoders of UPerNet and PSPNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastfuse.conversion.parts import (
    are_untouched,
    concatenated,
    convolved,
    upsampled_sum,
)
from fastfuse.conversion.pattern import register_pattern

_DECODERS = "segmentation_models_pytorch.decoders"


def _unit(unit: Any, levels: list[Tensor], size: Sequence[int], align_corners: bool) -> Tensor:
    """Conv2dReLU on the concatenation of levels."""
    if not are_untouched(unit):
        return unit(concatenated(levels, size, align_corners))
    conv, norm, activation = unit
    return activation(norm(convolved(conv, levels, size, align_corners)))


@register_pattern(f"{_DECODERS}.upernet.decoder:PSPModule")
def upernet_pooling(self: Any, feature: Tensor) -> Tensor:
    levels = [feature, *(block(feature) for block in self.blocks)]
    return _unit(self.out_conv, levels, feature.shape[2:], False)


@register_pattern(f"{_DECODERS}.upernet.decoder:FPNLateralBlock")
def upernet_lateral(self: Any, state_feature: Tensor, lateral_feature: Tensor) -> Tensor:
    return upsampled_sum(state_feature, self.conv_norm_relu(lateral_feature))


@register_pattern(f"{_DECODERS}.upernet.decoder:UPerNetDecoder")
def upernet(self: Any, features: list[Tensor]) -> Tensor:
    levels = [norm(f) for norm, f in zip(self.feature_norms, features[2:], strict=True)]
    *finer, coarsest = levels
    pyramid = [self.psp(coarsest)]
    for block, lateral in zip(self.fpn_lateral_blocks, reversed(finer), strict=True):
        pyramid.append(block(pyramid[-1], lateral))
    refined = [conv(f) for conv, f in zip(self.fpn_conv_blocks, pyramid[1:], strict=True)]
    size = pyramid[-1].shape[2:]
    return _unit(self.fusion_block, [*reversed(refined), pyramid[0]], size, False)


@register_pattern(f"{_DECODERS}.pspnet.decoder:PSPDecoder")
def pspnet(self: Any, features: list[Tensor]) -> Tensor:
    x = features[-1]
    if not are_untouched(self.psp, *self.psp.blocks):
        return type(self).forward(self, features)
    pooled = [block.pool(x) for block in self.psp.blocks]
    return self.dropout(_unit(self.conv, [*pooled, x], x.shape[2:], True))
