"""What patterns are made of. Everything asks first whether a module is what a kernel assumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.backends import DTYPES
from fastfuse.nn.batch_norm import folded
from fastfuse.nn.composition import (
    Part,
    are_untouched,
    is_plain,
    is_untouched,
    is_watched,
)
from fastfuse.nn.conv2d import Conv2d, dense_padding, depthwise_dilation
from fastfuse.ops.autocast import cast_dtype
from fastfuse.ops.ced_block import ced_block
from fastfuse.ops.fusion_conv2d import fusion_conv2d
from fastfuse.ops.upsample_add import upsample_add
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

__all__ = [
    "are_untouched",
    "as_convnext_block",
    "concatenated",
    "convolved",
    "dilated_pyramid",
    "fused",
    "is_dense",
    "is_original",
    "is_sequence",
    "is_untouched",
    "upsampled",
    "upsampled_sum",
]

_WEIGHT_AND_BIAS = ("weight", "bias")
_DENSE = Part(
    (nn.Conv2d, Conv2d),
    _WEIGHT_AND_BIAS,
    maybe=("bias",),
    conditions={
        "a square kernel of all channels, stride and dilation 1": (
            lambda conv, weight, bias: dense_padding(conv, weight) is not None
        )
    },
)
_DEPTHWISE = Part(
    (nn.Conv2d, Conv2d),
    _WEIGHT_AND_BIAS,
    conditions={
        "one kernel a channel, undilated, that keeps the size": (
            lambda conv, weight, bias: depthwise_dilation(conv, weight) == 1
        )
    },
)
_LINEAR = Part((nn.Linear,), _WEIGHT_AND_BIAS)
_SEQUENCE = nn.Sequential.forward  # as it is when this package is imported


def is_original(module: nn.Module, target: str) -> bool:
    """Whether a module is of this very class, "package.module:Name", and is what its children are:
    then they may be called instead of it."""
    kind = type(module)
    return (
        f"{kind.__module__}:{kind.__qualname__}" == target
        and kind.forward.__qualname__ == f"{kind.__qualname__}.forward"
        and are_untouched(module)
    )


def is_sequence(module: nn.Module) -> bool:
    """Whether calling a module is calling its children, one after the other."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is _SEQUENCE
        and are_untouched(module)
        and len(module) > 0
    )


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a convolution of all channels, as :func:`convolved` runs it."""
    return _DENSE.read(module, []) is None


def fused(
    unit: nn.Module, levels: Sequence[Tensor], size: Sequence[int], align_corners: bool = False
) -> Tensor:
    """``unit(cat([UP(level) for level in levels]))``, of a convolution or of what begins so."""
    if not is_sequence(unit):
        return convolved(unit, levels, size, align_corners)
    first, *rest = cast(nn.Sequential, unit)
    if rest and type(rest[0]) is nn.BatchNorm2d and not is_sequence(first):
        norm, *rest = rest
        x = convolved(first, levels, size, align_corners, norm)
    else:
        x = fused(first, levels, size, align_corners)
    for layer in rest:
        x = layer(x)
    return x


def convolved(
    conv: nn.Module, levels: Sequence[Tensor], size: Sequence[int], align_corners: bool = False,
    norm: nn.Module | None = None,
) -> Tensor:  # fmt: skip
    """``norm(conv(cat([UP(level) for level in levels])))``, of levels of any sizes."""
    tensors: list[Any] = []
    if is_watched() or _DENSE.read(conv, tensors) is not None or not _are_alike(levels):
        x = conv(concatenated(levels, size, align_corners))
        return x if norm is None else norm(x)
    padding = dense_padding(cast(nn.Conv2d, conv), tensors[0])
    pixels = levels[0].shape[0] * size[0] * size[1]
    in_weights = None if norm is None else folded(norm, pixels, *tensors)
    weight, bias = in_weights or tensors
    x = fusion_conv2d(
        levels, weight, bias, size=tuple(size), padding=padding, align_corners=align_corners
    )
    return x if norm is None or in_weights is not None else norm(x)


def concatenated(
    levels: Sequence[Tensor], size: Sequence[int], align_corners: bool = False
) -> Tensor:
    if _are_alike(levels):
        return upsample_equalize_concat(levels, size=tuple(size), align_corners=align_corners)
    return torch.cat([_interpolated(x, size, align_corners) for x in levels], dim=1)


def _are_alike(levels: Sequence[Tensor]) -> bool:
    """Whether ops take them together; concatenation takes tensors of several dtypes."""
    return (
        all(map(is_plain, levels))
        and all(x.dim() == 4 and x.dtype in DTYPES for x in levels)
        and len({cast_dtype(x) for x in levels}) == 1
    )


def _interpolated(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def upsampled(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """``UP(x)``; under autocast, which on some devices computes it wider, PyTorch's."""
    if not _are_alike([x]) or torch.is_autocast_enabled(x.device.type):
        return _interpolated(x, size, align_corners)
    return upsample_equalize_concat([x], size=tuple(size), align_corners=align_corners)


def upsampled_sum(x: Tensor, skip: Tensor, align_corners: bool = False) -> Tensor:
    """``skip + UP(x)``."""
    if not _are_alike([x, skip]) or x.dtype != skip.dtype or x.shape[:2] != skip.shape[:2]:
        return skip + _interpolated(x, skip.shape[2:], align_corners)
    return upsample_add(x, skip, align_corners=align_corners)


def dilated_pyramid(self: Any, x: Tensor, pooling_class: str) -> Tensor:
    """Atrous spatial pyramid pooling; the pooled branch is not upsampled.

    Args:
        self: ``convs``, the last of them of ``pooling_class``, and ``project``.
    """
    *branches, pooling = self.convs
    if not is_original(pooling, pooling_class):
        return type(self).forward(self, x)
    levels = [branch(x) for branch in branches]
    pooled = x
    for layer in pooling:
        pooled = layer(pooled)
    return fused(self.project, [*levels, pooled], x.shape[2:])


def as_convnext_block(
    x: Tensor, dw: nn.Module, norm: nn.Module, fc1: nn.Module, activation: nn.Module,
    fc2: nn.Module, scale: Tensor | None, drop_path: nn.Module,
) -> Tensor | None:  # fmt: skip
    """A ConvNeXt block; None where its children are to be called."""
    tensors: list[Any] = []
    if (
        is_watched()
        or not is_plain(x)
        or not any(is_original(drop_path, target) for target in _DROP_PATHS)
        or not any(is_original(norm, target) for target in _LAYER_NORMS)
        or not is_exact_gelu(activation)
        or _DEPTHWISE.read(dw, tensors) is not None
        or Part((type(norm),), _WEIGHT_AND_BIAS).read(norm, tensors) is not None
        or _LINEAR.read(fc1, tensors) is not None
        or _LINEAR.read(fc2, tensors) is not None
        or tuple(cast(nn.LayerNorm, norm).normalized_shape) != (x.shape[1],)
        or (scale is not None and not is_plain(scale))
        or any(t is None or t.dtype != tensors[0].dtype for t in tensors)
        or (scale is not None and scale.dtype != tensors[0].dtype)
    ):
        return None
    # Drawn when nothing else can decide for the children, which draw for themselves.
    keep = stochastic_depth(drop_path, x)
    options: Any = {"layer_scale": scale, "keep": keep, "eps": norm.eps}
    return ced_block(x, *tensors, **options)


_CONVNEXT = "transformers.models.convnext.modeling_convnext"
_DROP_PATHS = (
    "torch.nn.modules.linear:Identity",
    "torchvision.ops.stochastic_depth:StochasticDepth",
    "timm.layers.drop:DropPath",
    f"{_CONVNEXT}:ConvNextDropPath",
)
_LAYER_NORMS = (
    "torch.nn.modules.normalization:LayerNorm",
    "timm.layers.norm:LayerNorm",
    f"{_CONVNEXT}:ConvNextLayerNorm",
)
_GELUS = (
    "torch.nn.modules.activation:GELU",
    "timm.layers.activations:GELU",
    "transformers.activations:GELUActivation",
)


def is_exact_gelu(activation: nn.Module) -> bool:
    """Of PyTorch, or of a library that calls PyTorch's."""
    return (
        any(is_original(activation, target) for target in _GELUS)
        and "forward" not in activation.__dict__
        and getattr(activation, "approximate", "none") == "none"
        and getattr(activation, "act", F.gelu) is F.gelu
    )


def stochastic_depth(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factors that a module draws for its samples, of the same random numbers: what it makes
    of ones. None: it lets everything through."""
    if not drop_path.training or isinstance(drop_path, nn.Identity):
        return None
    return drop_path(x.detach().new_ones(x.shape[0], 1, 1, 1)).flatten()
