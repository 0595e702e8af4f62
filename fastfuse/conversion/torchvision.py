"""torchvision: ConvNeXt's blocks, DeepLabV3's pyramid, and the last step of segmentation models."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor

from fastfuse.conversion.parts import (
    are_untouched,
    as_convnext_block,
    dilated_pyramid,
    is_sequence,
    upsampled,
)
from fastfuse.conversion.pattern import register_pattern

_DEEPLAB = "torchvision.models.segmentation.deeplabv3"
_LAYERS = ["Conv2d", "Permute", "LayerNorm", "Linear", "GELU", "Linear", "Permute"]


def _check_block(block: Any) -> str | None:
    layers = [type(layer).__name__ for layer in block.block]
    return None if layers == _LAYERS else f"is made of {', '.join(layers)}"


@register_pattern("torchvision.models.convnext:CNBlock", check=_check_block)
def convnext_block(self: Any, input: Tensor) -> Tensor:
    if is_sequence(self.block) and _check_block(self) is None:
        dw, before, norm, fc1, activation, fc2, after = self.block
    else:
        return type(self).forward(self, input)
    if are_untouched(before, after):
        out = as_convnext_block(
            input, dw, norm, fc1, activation, fc2, self.layer_scale.flatten(),
            self.stochastic_depth,
        )  # fmt: skip
        if out is not None:
            return out
    return type(self).forward(self, input)


@register_pattern(f"{_DEEPLAB}:ASPP")
def aspp(self: Any, x: Tensor) -> Tensor:
    return dilated_pyramid(self, x, f"{_DEEPLAB}:ASPPPooling")


@register_pattern("torchvision.models.segmentation._utils:_SimpleSegmentationModel")
def segmentation_model(self: Any, x: Tensor) -> dict[str, Tensor]:
    features = self.backbone(x)
    size = x.shape[2:]
    result = OrderedDict(out=upsampled(self.classifier(features["out"]), size))
    if self.aux_classifier is not None:
        result["aux"] = upsampled(self.aux_classifier(features["aux"]), size)
    return result


@register_pattern(
    "torchvision.ops.feature_pyramid_network:FeaturePyramidNetwork",
    check=lambda module: "upsamples by nearest interpolation: no op of this package does",
)
def feature_pyramid(self: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    return type(self).forward(self, x)
