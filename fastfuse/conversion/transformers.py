"""Hugging Face transformers: ConvNeXt, UPerNet, SegFormer."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.conversion.parts import (
    are_untouched,
    as_convnext_block,
    concatenated,
    convolved,
    upsampled_sum,
)
from fastfuse.conversion.pattern import register_pattern
from fastfuse.nn.batch_norm import normalized
from fastfuse.nn.composition import is_plain
from fastfuse.ops.layout import is_channels_last, prefer_memory_format
from fastfuse.ops.upsample_cross_entropy import upsample_cross_entropy
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

_CONVNEXT = "transformers.models.convnext.modeling_convnext"
_UPERNET = "transformers.models.upernet.modeling_upernet"
_SEGFORMER = "transformers.models.segformer.modeling_segformer"


@register_pattern(f"{_CONVNEXT}:ConvNextLayer")
def convnext_layer(self: Any, features: Tensor) -> Tensor:
    if getattr(self.layernorm, "data_format", None) == "channels_last":
        out = as_convnext_block(
            features, self.dwconv, self.layernorm, self.pwconv1, self.act, self.pwconv2,
            self.layer_scale_parameter, self.drop_path,
        )  # fmt: skip
        if out is not None:
            return out
    return type(self).forward(self, features)


@register_pattern(
    "transformers.models.convnextv2.modeling_convnextv2:ConvNextV2Layer",
    check=lambda layer: "normalizes the hidden layer's response: its convolution alone is known",
)
def convnextv2_layer(self: Any, features: Tensor) -> Tensor:
    return type(self).forward(self, features)


def _unit(unit: Any, levels: list[Tensor], align_corners: bool) -> Tensor:
    """UperNetConvModule on the concatenation of levels at the first one's size."""
    size = levels[0].shape[2:]
    if type(unit).__name__ != "UperNetConvModule" or not are_untouched(unit):
        return unit(concatenated(levels, size, align_corners))
    return unit.activation(convolved(unit.conv, levels, size, align_corners, unit.batch_norm))


@register_pattern(f"{_UPERNET}:UperNetConvModule")
def conv_module(self: Any, input: Tensor) -> Tensor:
    return self.activation(normalized(self.conv, self.batch_norm, input))


def _check_upernet(head: Any) -> str | None:
    own = getattr(head.psp_forward, "__func__", head.psp_forward)
    return None if own.__qualname__ == "UperNetHead.psp_forward" else "has a psp_forward of its own"


@register_pattern(f"{_UPERNET}:UperNetHead", check=_check_upernet)
def upernet_head(self: Any, encoder_hidden_states: list[Tensor]) -> Tensor:
    finer, top = encoder_hidden_states[: len(self.lateral_convs)], encoder_hidden_states[-1]
    corners = self.align_corners
    pooling = self.psp_modules
    if type(pooling).__name__ == "UperNetPyramidPoolingModule" and are_untouched(pooling):
        pooled = [block(top) for block in pooling.blocks]
    else:
        pooled = pooling(top)
    laterals = [conv(level) for conv, level in zip(self.lateral_convs, finer, strict=True)]
    pyramid = [_unit(self.bottleneck, [top, *pooled], corners)]
    for lateral in reversed(laterals):
        pyramid.insert(0, upsampled_sum(pyramid[0], lateral, corners))
    refined = [conv(level) for conv, level in zip(self.fpn_convs, pyramid, strict=False)]
    fused = _unit(self.fpn_bottleneck, [*refined, pyramid[-1]], corners)
    # The original's logits are in the format of the weights: a pooled pixel's strides tell nothing.
    weights = [weight for weight in self.parameters() if weight.dim() == 4]
    return prefer_memory_format(self.classifier(fused), is_channels_last(weights))


@register_pattern(f"{_UPERNET}:UperNetFCNHead")
def fcn_head(self: Any, encoder_hidden_states: list[Tensor]) -> Tensor:
    x = encoder_hidden_states[self.in_index]
    output = self.convs(x)
    if self.concat_input:
        output = _unit(self.conv_cat, [x, output], False)
    return self.classifier(output)


def _are_classes(labels: Any, images: Tensor) -> bool:
    """Whether the loss is that of a class for each pixel, of which ours has the cross-entropy."""
    return (
        isinstance(labels, Tensor)
        and is_plain(labels)
        and labels.dtype == torch.int64
        and labels.dim() == 3
        and labels.shape[0] == images.shape[0]
        and labels.device == images.device
    )


def _loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Of logits at their own size; in their dtype, except under autocast, as PyTorch's."""
    loss = upsample_cross_entropy(logits, labels, ignore_index=ignore_index)
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


@register_pattern(f"{_SEGFORMER}:SegformerForSemanticSegmentation")
def segformer(self: Any, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
    forward = type(self).forward
    if self.config.num_labels < 2 or not _are_classes(labels, pixel_values):
        return forward(self, pixel_values, labels, **kwargs)
    assert labels is not None
    output = forward(self, pixel_values, **kwargs)
    loss = _loss(output[0], labels, self.config.semantic_loss_ignore_index)
    return (loss, *output) if isinstance(output, tuple) else type(output)(loss=loss, **output)


def _at_image_size(logits: Tensor, images: Tensor) -> Tensor:
    size = tuple(images.shape[2:])
    # Under autocast interpolate computes wider than its input on some devices.
    if is_plain(logits) and not torch.is_autocast_enabled(logits.device.type):
        return upsample_equalize_concat([logits], size=size)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _check_upernet_model(model: Any) -> str | None:
    if not hasattr(model.backbone, "forward_with_filtered_kwargs"):
        return f"has a {type(model.backbone).__name__} as backbone"
    return "has one class" if model.config.num_labels < 2 else None


@register_pattern(f"{_UPERNET}:UperNetForSemanticSegmentation", check=_check_upernet_model)
def upernet(
    self: Any,
    pixel_values: Any = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    labels: Tensor | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The loss is that of the heads' own logits; the decode head's are returned at full size."""
    options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    config = self.config
    if labels is not None and not (
        _are_classes(labels, pixel_values) and labels.shape[1:] == pixel_values.shape[2:]
    ):
        return type(self).forward(
            self, pixel_values, labels=labels, return_dict=return_dict, **options, **kwargs
        )
    options = {k: getattr(config, k) if v is None else v for k, v in options.items()}
    outputs = self.backbone.forward_with_filtered_kwargs(pixel_values, **options)
    features = outputs.feature_maps
    own = self.decode_head(features)
    auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(features)
    loss = None
    if labels is not None:
        loss = _loss(own, labels, config.loss_ignore_index)
        if auxiliary is not None:
            weight = config.auxiliary_loss_weight
            loss = loss + weight * _loss(auxiliary, labels, config.loss_ignore_index)
    logits = _at_image_size(own, pixel_values)
    if config.return_dict if return_dict is None else return_dict:
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return sys.modules[_UPERNET].SemanticSegmenterOutput(loss=loss, logits=logits, **states)
    result = (logits, *outputs[1 if options["output_hidden_states"] else 2 :])
    return result if loss is None else (loss, *result)
