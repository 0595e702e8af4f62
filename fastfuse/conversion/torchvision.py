"""torchvision: ConvNeXt's blocks, and DeepLabV3's pyramid of dilated convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastfuse.conversion.parts import (
    are_untouched,
    as_convnext_block,
    convolved,
    stochastic_depth,
)
from fastfuse.conversion.pattern import register_pattern

_LAYERS = ["Conv2d", "Permute", "LayerNorm", "Linear", "GELU", "Linear", "Permute"]


def _check_block(block: Any) -> str | None:
    layers = [type(layer).__name__ for layer in block.block]
    return None if layers == _LAYERS else f"is made of {', '.join(layers)}"


@register_pattern("torchvision.models.convnext:CNBlock", check=_check_block)
def convnext_block(self: Any, input: Tensor) -> Tensor:
    dw, before, norm, fc1, activation, fc2, after = self.block
    if are_untouched(self.block, before, after, self.stochastic_depth):
        out = as_convnext_block(
            input, dw, norm, fc1, activation, fc2, self.layer_scale.flatten(),
            stochastic_depth(self.stochastic_depth, input), ("LayerNorm",),
        )  # fmt: skip
        if out is not None:
            return out
    return type(self).forward(self, input)


@register_pattern("torchvision.models.segmentation.deeplabv3:ASPP")
def aspp(self: Any, x: Tensor) -> Tensor:
    *branches, pooling = self.convs
    if not are_untouched(self.project, pooling):
        return type(self).forward(self, x)
    pooled = x
    for layer in pooling:  # without its upsampling
        pooled = layer(pooled)
    conv, *rest = self.project
    levels = [*(branch(x) for branch in branches), pooled]
    fused = convolved(conv, levels, x.shape[2:])
    return nn.Sequential(*rest)(fused)
