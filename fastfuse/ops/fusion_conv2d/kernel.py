"""fusion_conv2d and its gradients, from matrix products, convolutions and tap sums.

A static plan says which levels are convolved at their own resolution and which at the target's, and
a strategy for each does it: OwnResolution, and LibraryConvolution, CudnnConvolution or
WinogradConvolution.

Everything inside is channels_last: there a feature is a matrix (pixels, channels), and the taps of
a level are one product with its weights. Where the device does not multiply the dtype of the
features, weights, taps and sums are float32, and results are rounded once.

Upsampling keeps constants: a mean comes off before it as well as after. It does so before the
products, in which nothing large is left to cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.fusion_conv2d.own_resolution import OwnResolution
from fastfuse.ops.fusion_conv2d.plan import plan_of
from fastfuse.ops.fusion_conv2d.shape import Equalization, FusionShape, Gradients
from fastfuse.ops.fusion_conv2d.strategy import Strategy
from fastfuse.ops.fusion_conv2d.target_resolution import (
    CudnnConvolution,
    LibraryConvolution,
    TargetResolution,
    WinogradConvolution,
)
from fastfuse.ops.layout import memory_format, to_memory_format
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = ["backward", "described", "forward"]


class _Fusion:
    """A fusion's strategies, for tensors like one; None for what has no levels."""

    def __init__(self, shape: FusionShape, equalization: Equalization, like: Tensor) -> None:
        plan = plan_of(shape, like)
        policy = policy_of(like.device.type)
        kind: type[TargetResolution] = CudnnConvolution if policy.cudnn else LibraryConvolution
        if plan.winograd:
            kind = WinogradConvolution
        self.equalization = equalization
        self.target: TargetResolution | None = None
        self.own: OwnResolution | None = None
        if plan.target:
            self.target = kind(shape, equalization, plan.target)
        if plan.own:
            self.own = OwnResolution(shape, equalization, plan.own)
        self.product_dtype = policy.product_dtype(like.dtype)
        # cuDNN's convolution has no bias: it would be a pass of its own, and a rounding.
        self.adds_bias_last = policy.cudnn and self.own is not None

    @property
    def strategies(self) -> list[Strategy]:
        return [s for s in (self.target, self.own) if s is not None]

    def prepared(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features in channels_last; those convolved at their own resolution less their mean
        and in the dtype of the products, for they are read once for every chunk of outputs."""
        own = () if self.own is None else self.own.levels
        features = [to_memory_format(f, True) for f in features]
        return [
            self.equalization.centered(f.to(self.product_dtype), i) if i in own else f
            for i, f in enumerate(features)
        ]


def described(shape: FusionShape, like: Tensor) -> str:
    """What is done where, in words, for tensors like one."""
    fusion = _Fusion(shape, Equalization(None, None), like)
    products, sums = (
        str(dtype).removeprefix("torch.")
        for dtype in (fusion.product_dtype, accumulation_dtype(fusion.product_dtype))
    )
    parts = {
        i: f"{shape.sizes[i][0]}x{shape.sizes[i][1]} {strategy.described(products, sums)}"
        for strategy in fusion.strategies
        for i in strategy.levels
    }
    return ", ".join(parts[i] for i in sorted(parts))


def forward(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    mean: Tensor | None,
    std: Tensor | None,
    padding: int,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    shape = FusionShape.of(features, weight, height, width, padding, align_corners)
    dtype = weight.dtype
    fusion = _Fusion(shape, Equalization.of(mean, std, dtype), weight)
    weight = weight.to(fusion.product_dtype)
    features = fusion.prepared(features)

    of_target = None if fusion.adds_bias_last else bias
    onto = None if fusion.target is None else fusion.target.forward(features, weight, of_target)
    if fusion.own is None and onto is not None and onto.level is None:
        return _result(onto.value, dtype, channels_last)
    has_bias = onto is not None and onto.level is None and not fusion.adds_bias_last
    own = fusion.own or OwnResolution(shape, fusion.equalization, ())  # to scale and add alone
    rest = None
    if bias is not None and not has_bias:
        rest = bias.to(accumulation_dtype(dtype))
    return _result(own.forward(features, weight, rest, onto), dtype, channels_last)


def backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    weight: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    channels: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    height: int,
    width: int,
    kernel_size: int,
    padding: int,
    align_corners: bool,
    wanted: Sequence[bool],
    channels_last: bool,
    weight_channels_last: bool,
) -> list[Tensor]:
    shape = FusionShape.of_gradient(
        grad_output, channels, heights, widths, height, width, kernel_size, padding, align_corners
    )
    dtype = grad_output.dtype
    fusion = _Fusion(shape, Equalization.of(mean, std, dtype), grad_output)
    grad_output = to_memory_format(grad_output, True).to(fusion.product_dtype)
    weight = None if weight is None else weight.to(fusion.product_dtype)
    features = fusion.prepared(features)
    levels = tuple(i for i, want in enumerate(wanted) if want)
    memory = None
    if features:
        memory = empty(shape.weight_shape, grad_output, memory_format(weight_channels_last))
    gradients = Gradients(shape, levels, memory)
    for i in levels:
        if shape.channels[i] == 0:  # of no strategy
            gradients.found[i] = empty(shape.level_shape(i), grad_output, torch.channels_last)
    for strategy in fusion.strategies:
        if memory is not None or gradients.wanted_of(strategy.levels):
            strategy.backward(grad_output, features, weight, gradients)
    result = [_result(gradients.found[i], dtype, channels_last) for i in levels]
    return result if memory is None else [*result, memory.to(dtype)]


def _result(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A channels_last tensor rounded to a dtype, in a memory format."""
    if x.dtype != dtype:
        x = empty(x.shape, x.new_empty(0, dtype=dtype), torch.channels_last).copy_(x)
    return to_memory_format(x, channels_last)
