"""SegFormer's head, of transformers and segmentation_models_pytorch.

They project levels by linear layers with nothing behind them: projection and fusion are
one linear map, a product of each level at its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastfuse.backends import DTYPES
from fastfuse.conversion.parts import are_untouched
from fastfuse.conversion.pattern import register_pattern
from fastfuse.nn.composition import Part, is_plain, is_watched
from fastfuse.nn.conv2d import Conv2d, dense_padding
from fastfuse.ops.autocast import cast_dtype, without_autocast
from fastfuse.ops.fusion_conv2d import fusion_conv2d
from fastfuse.ops.layout import prefer_memory_format

_LINEAR = Part((nn.Linear,), ("weight", "bias"), maybe=("bias",))
_POINTWISE = Part(
    (nn.Conv2d, Conv2d),
    ("weight", "bias"),
    maybe=("bias",),
    conditions={
        "a 1x1 kernel of all channels, stride 1, no padding": (
            lambda conv, weight, bias: weight.shape[2] == 1 and dense_padding(conv, weight) == 0
        )
    },
)


def _fused(
    projections: Sequence[nn.Module], conv: nn.Module, levels: Sequence[Tensor], size: Sequence[int]
) -> Tensor | None:
    """``conv(cat([UP(projection(level)) ...]))`` in channels_last, as views of linear layers are;
    None where the children are to be called."""
    tensors: list[Any] = []
    if (
        is_watched()
        or len(projections) != len(levels)
        or any(_LINEAR.read(projection, tensors) is not None for projection in projections)
        or _POINTWISE.read(conv, tensors) is not None
        or not all(is_plain(x) and x.dim() == 4 and x.dtype in DTYPES for x in levels)
        or len({cast_dtype(x) for x in (*levels, *tensors) if x is not None}) > 1
    ):
        return None
    *linears, fusion, bias = tensors
    weights, biases = linears[::2], linears[1::2]
    channels = [weight.shape[0] for weight in weights]
    if [w.shape[1] for w in weights] != [x.shape[1] for x in levels] or (
        sum(channels) != fusion.shape[1]
    ):
        return None
    slices = fusion.flatten(1).split(channels, dim=1)
    with without_autocast(fusion.device.type):  # weights are rounded once, as products
        products = [a @ b for a, b in zip(slices, weights, strict=True)]
        offsets = [a @ b for a, b in zip(slices, biases, strict=True) if b is not None]
        offset = sum(offsets[1:], offsets[0]) if offsets else None
        if bias is not None:
            offset = bias if offset is None else offset + bias
        weight = torch.cat(products, dim=1)[:, :, None, None]
    levels = [prefer_memory_format(level, True) for level in levels]
    return fusion_conv2d(levels, weight, offset, size=tuple(size))


def _layers(modules: Sequence[nn.Module], name: str, child: str) -> list[nn.Module] | None:
    """A child of each module, if that is all of it: of a class of this name, and untouched."""
    if not are_untouched(*modules) or any(type(module).__name__ != name for module in modules):
        return None
    return [cast(nn.Module, getattr(module, child)) for module in modules]


@register_pattern("transformers.models.segformer.modeling_segformer:SegformerDecodeHead")
def transformers_head(
    self: Any, encoder_hidden_states: tuple[Tensor, ...], **kwargs: Any
) -> Tensor:
    levels = list(encoder_hidden_states)
    projections = _layers(self.linear_projections, "SegformerMLP", "proj")
    fused = None
    if projections is not None and levels and levels[0].dim() == 4:
        coarsest_first = levels[::-1], projections[::-1]
        size = levels[0].shape[2:]
        fused = _fused(coarsest_first[1], self.linear_fuse, coarsest_first[0], size)
    if fused is None:
        return type(self).forward(self, encoder_hidden_states, **kwargs)
    return self.classifier(self.dropout(self.activation(self.batch_norm(fused))))


@register_pattern("segmentation_models_pytorch.decoders.segformer.decoder:SegformerDecoder")
def smp_decoder(self: Any, features: list[Tensor]) -> Tensor:
    size = [length // 4 for length in features[0].shape[2:]]
    levels = features[2 if features[1].shape[1] == 0 else 1 :][::-1]
    projections = _layers(self.mlp_stage, "MLP", "linear")
    unit = self.fuse_stage
    if projections is not None and isinstance(unit, nn.Sequential) and are_untouched(unit):
        conv, *rest = unit
        fused = _fused(projections, conv, levels, size)
        if fused is not None:
            for layer in rest:
                fused = layer(fused)
            return fused
    return type(self).forward(self, features)
