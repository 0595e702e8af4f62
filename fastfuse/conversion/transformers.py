"""Hugging Face transformers: ConvNeXt, UPerNet, SegFormer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfuse.conversion.parts import (
    are_untouched,
    as_convnext_block,
    concatenated,
    convolved,
    stochastic_depth,
    upsampled_sum,
)
from fastfuse.conversion.pattern import register_pattern
from fastfuse.ops.fusion_conv2d import fusion_conv2d

_CONVNEXT = "transformers.models.convnext.modeling_convnext"
_UPERNET = "transformers.models.upernet.modeling_upernet"
_SEGFORMER = "transformers.models.segformer.modeling_segformer"


@register_pattern(f"{_CONVNEXT}:ConvNextLayer")
def convnext_layer(self: Any, features: Tensor) -> Tensor:
    if are_untouched(self.drop_path):
        norms = ("ConvNextLayerNorm",) if self.layernorm.data_format == "channels_last" else ()
        out = as_convnext_block(
            features, self.dwconv, self.layernorm, self.pwconv1, self.act, self.pwconv2,
            self.layer_scale_parameter, stochastic_depth(self.drop_path, features), norms,
        )  # fmt: skip
        if out is not None:
            return out
    return type(self).forward(self, features)


def _unit(unit: Any, levels: list[Tensor], align_corners: bool) -> Tensor:
    """UperNetConvModule on the concatenation of levels at the first one's size."""
    size = levels[0].shape[2:]
    if not are_untouched(unit):
        return unit(concatenated(levels, size, align_corners))
    fused = convolved(unit.conv, levels, size, align_corners)
    return unit.activation(unit.batch_norm(fused))


@register_pattern(f"{_UPERNET}:UperNetHead")
def upernet_head(self: Any, encoder_hidden_states: list[Tensor]) -> Tensor:
    finer, top = encoder_hidden_states[: len(self.lateral_convs)], encoder_hidden_states[-1]
    corners = self.align_corners
    pooling = self.psp_modules
    pooled = [block(top) for block in pooling.blocks] if are_untouched(pooling) else pooling(top)
    laterals = [conv(level) for conv, level in zip(self.lateral_convs, finer, strict=True)]
    pyramid = [_unit(self.bottleneck, [top, *pooled], corners)]
    for lateral in reversed(laterals):
        pyramid.insert(0, upsampled_sum(pyramid[0], lateral, corners))
    refined = [conv(level) for conv, level in zip(self.fpn_convs, pyramid, strict=False)]
    fused = _unit(self.fpn_bottleneck, [*refined, pyramid[-1]], corners)
    return self.classifier(fused)


@register_pattern(f"{_SEGFORMER}:SegformerDecodeHead")
def segformer_head(self: Any, encoder_hidden_states: tuple[Tensor, ...], **kwargs: Any) -> Tensor:
    projections = [p.proj for p in self.linear_projections]
    modules = (*self.linear_projections, *projections, self.linear_fuse)
    levels = list(encoder_hidden_states)
    if not are_untouched(*modules) or any(level.dim() != 4 for level in levels):
        return type(self).forward(self, encoder_hidden_states, **kwargs)
    # A product of each level at its own size: projection and fusion are one linear map.
    channels = projections[0].out_features
    slices = self.linear_fuse.weight.flatten(1).split(channels, dim=1)
    weights: list[Tensor] = []
    bias: Any = 0.0
    for projection, weight in zip(projections, reversed(slices), strict=True):
        weights.append(weight @ projection.weight)
        bias = bias + weight @ projection.bias
    weight = torch.cat(weights, dim=1)[:, :, None, None]
    fused = fusion_conv2d(levels, weight, bias, size=levels[0].shape[2:])
    hidden = self.dropout(self.activation(self.batch_norm(fused)))
    return self.classifier(hidden)
