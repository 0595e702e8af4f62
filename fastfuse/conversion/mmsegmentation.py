"""MMSegmentation: the decode heads of UPerNet, PSPNet, DeepLabV3, DeepLabV3+, FCN and
SegFormer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.conversion.parts import (
    concatenated,
    convolved,
    fused,
    is_original,
    is_sequence,
    upsampled_sum,
)
from fastfuse.conversion.pattern import register_pattern
from fastfuse.nn.batch_norm import normalized

_HEADS = "mmseg.models.decode_heads"
_UNIT = "mmcv.cnn.bricks.conv_module:ConvModule"
_FEATURE = ("_forward_feature",)
_FCN = (*_FEATURE, "_transform_inputs")


def _is_in_order(unit: Any) -> bool:
    return (
        tuple(unit.order) == ("conv", "norm", "act")
        and not unit.with_explicit_padding
        and getattr(unit, "efficient_conv_bn_eval_forward", None) is None
    )


@register_pattern(_UNIT)
def conv_module(self: Any, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
    if not (norm and self.with_norm and _is_in_order(self)):
        return type(self).forward(self, x, activate, norm)
    x = normalized(self.conv, self.norm, x)
    return self.activate(x) if activate and self.with_activation else x


def _unit(unit: Any, levels: Sequence[Tensor], size: Sequence[int], align_corners: bool) -> Tensor:
    """A ConvModule on the concatenation of levels."""
    if not (is_original(unit, _UNIT) and _is_in_order(unit)):
        return unit(concatenated(levels, size, align_corners))
    norm = unit.norm if unit.with_norm else None
    x = convolved(unit.conv, levels, size, align_corners, norm)
    return unit.activate(x) if unit.with_activation else x


def _pooled(pooling: Any, x: Tensor) -> list[Tensor]:
    """The levels of a pyramid pooling, before their upsampling if nothing was done to it."""
    if is_original(pooling, f"{_HEADS}.psp_head:PPM"):
        return [branch(x) for branch in pooling]
    return pooling(x)


@register_pattern(f"{_HEADS}.uper_head:UPerHead", methods=(*_FEATURE, "psp_forward"))
def uper_head(self: Any, inputs: Sequence[Tensor]) -> Tensor:
    levels, corners = self._transform_inputs(inputs), self.align_corners
    top = levels[-1]
    laterals = [conv(level) for conv, level in zip(self.lateral_convs, levels, strict=False)]
    pooled = _pooled(self.psp_modules, top)
    pyramid = [_unit(self.bottleneck, [top, *pooled], top.shape[2:], corners)]
    for lateral in reversed(laterals):
        pyramid.insert(0, upsampled_sum(pyramid[0], lateral, corners))
    refined = [conv(level) for conv, level in zip(self.fpn_convs, pyramid, strict=False)]
    levels = [*refined, pyramid[-1]]
    return self.cls_seg(_unit(self.fpn_bottleneck, levels, levels[0].shape[2:], corners))


@register_pattern(f"{_HEADS}.psp_head:PSPHead", methods=_FEATURE)
def psp_head(self: Any, inputs: Sequence[Tensor]) -> Tensor:
    x = self._transform_inputs(inputs)
    levels = [x, *_pooled(self.psp_modules, x)]
    return self.cls_seg(_unit(self.bottleneck, levels, x.shape[2:], self.align_corners))


def _aspp(self: Any, inputs: Sequence[Tensor]) -> Tensor:
    x = self._transform_inputs(inputs)
    levels = [self.image_pool(x), *self.aspp_modules(x)]
    return _unit(self.bottleneck, levels, x.shape[2:], self.align_corners)


@register_pattern(f"{_HEADS}.aspp_head:ASPPHead", methods=_FEATURE)
def aspp_head(self: Any, inputs: Sequence[Tensor]) -> Tensor:
    return self.cls_seg(_aspp(self, inputs))


@register_pattern(f"{_HEADS}.sep_aspp_head:DepthwiseSeparableASPPHead")
def separable_aspp_head(self: Any, inputs: Sequence[Tensor]) -> Tensor:
    coarse = _aspp(self, inputs)
    if self.c1_bottleneck is None:
        return self.cls_seg(self.sep_bottleneck(coarse))
    fine = self.c1_bottleneck(inputs[0])
    levels, size = [coarse, fine], fine.shape[2:]
    return self.cls_seg(fused(self.sep_bottleneck, levels, size, self.align_corners))


def _check_fcn(head: Any) -> str | None:
    if head.input_transform != "resize_concat":
        return "reads one level: its convolutions are converted by themselves"
    return None if isinstance(head.convs, nn.Sequential) else "has no convolution of its levels"


@register_pattern(f"{_HEADS}.fcn_head:FCNHead", check=_check_fcn, methods=_FCN)
def fcn_head(self: Any, inputs: Sequence[Tensor]) -> Tensor:
    if self.input_transform != "resize_concat" or not is_sequence(self.convs):
        return type(self).forward(self, inputs)
    levels, corners = [inputs[i] for i in self.in_index], self.align_corners
    size = levels[0].shape[2:]
    first, *rest = self.convs
    x = _unit(first, levels, size, corners)
    for unit in rest:
        x = unit(x)
    if self.concat_input:
        x = _unit(self.conv_cat, [*levels, x], size, corners)
    return self.cls_seg(x)


def _check_segformer(head: Any) -> str | None:
    if head.interpolate_mode != "bilinear":
        return f"upsamples by interpolate_mode {head.interpolate_mode!r}"
    return None


@register_pattern(f"{_HEADS}.segformer_head:SegformerHead", check=_check_segformer)
def segformer_head(self: Any, inputs: Sequence[Tensor]) -> Tensor:
    if self.interpolate_mode != "bilinear":
        return type(self).forward(self, inputs)
    levels = self._transform_inputs(inputs)
    projected = [conv(level) for conv, level in zip(self.convs, levels, strict=True)]
    size = levels[0].shape[2:]
    return self.cls_seg(_unit(self.fusion_conv, projected, size, self.align_corners))
