"""Schema, shapes, derivatives and FLOPs of fusion_conv2d.

The op is linear in its weight and, but for the mean, in its features. Its backward is an op of its
own; what that one's derivatives need is again a fusion and its backward, so that derivatives of
every order come from these two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.autocast import without_autocast
from fastfuse.ops.define import Derivative, Op
from fastfuse.ops.fusion_conv2d import kernel, winograd
from fastfuse.ops.fusion_conv2d.plan import plan_of
from fastfuse.ops.fusion_conv2d.shape import FusionShape
from fastfuse.ops.layout import is_channels_last, memory_format
from fastfuse.ops.tap_sum.autograd import flops as tap_sum_flops

__all__ = ["forward"]


def _forward_fake(
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
    margin = 2 * padding - (weight.shape[2] - 1)
    return torch.empty(
        (features[0].shape[0], weight.shape[0], height + margin, width + margin),
        dtype=weight.dtype,
        device=weight.device,
        memory_format=memory_format(channels_last),
    )


def _backward_fake(
    grad_output: Tensor, features: Sequence[Tensor], *arguments: Any
) -> list[Tensor]:
    *sizes, wanted, channels_last, weight_channels_last = arguments[3:]
    shape = FusionShape.of_gradient(grad_output, *sizes)

    def empty(extents: tuple[int, ...], last: bool) -> Tensor:
        return torch.empty(
            extents,
            dtype=grad_output.dtype,
            device=grad_output.device,
            memory_format=memory_format(last),
        )

    gradients = [
        empty((shape.batch, c, *size), channels_last)
        for c, size, want in zip(shape.channels, shape.sizes, wanted, strict=True)
        if want
    ]
    return [*gradients, empty(shape.weight_shape, weight_channels_last)] if features else gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weight, bias, height, width, mean, std, padding, align_corners, _ = inputs
    wanted, weight_wanted, bias_wanted = ctx.needs[:3]
    ctx.shape = FusionShape.of(features, weight, height, width, padding, align_corners)
    ctx.weight_channels_last = is_channels_last([weight])
    ctx.bias_dtype = bias.dtype if bias_wanted else None
    saved = features if weight_wanted else []
    ctx.save_for_backward(weight if any(wanted) else None, mean, std, *saved)


def _gradients(ctx: Any, grad_output: Tensor) -> Sequence[Any]:
    weight, mean, std, *features = ctx.saved_tensors
    wanted, weight_wanted, bias_wanted = ctx.needs[:3]
    gradients: list[Tensor | None] = [None] * len(wanted)
    weight_gradient = bias_gradient = None
    if any(wanted) or weight_wanted:
        computed = backward[ctx.backend](
            grad_output, features, weight, mean, std, *ctx.shape.arguments, wanted,
            is_channels_last([grad_output]), ctx.weight_channels_last,
        )  # fmt: skip
        remaining = iter(computed)
        gradients = [next(remaining) if want else None for want in wanted]
        weight_gradient = next(remaining, None)
    if bias_wanted:
        accumulation = accumulation_dtype(grad_output.dtype)
        bias_gradient = grad_output.sum((0, 2, 3), dtype=accumulation).to(ctx.bias_dtype)
    return gradients, weight_gradient, bias_gradient, *[None] * 7


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    (grad_output, features, weight, mean, std, *arguments, ctx.wanted, _,
     ctx.weight_channels_last) = inputs  # fmt: skip
    ctx.shape = FusionShape.of_gradient(grad_output, *arguments)
    ctx.save_for_backward(grad_output, weight, mean, std, *features)


def _gradients_of_backward(ctx: Any, *grads: Tensor | None) -> Sequence[Any]:
    """dx_i = X_i(g, w) and dw = W(g, x), each bilinear but for the mean in W.

    With gradients a_i of dx_i and b of dw, those of g are fusion(a, w) + fusion(x, b), of w
    W(g, a), and of x X(g, b).
    """
    grad_output, weight, mean, std, *features = ctx.saved_tensors
    shape: FusionShape = ctx.shape
    levels = [i for i, want in enumerate(ctx.wanted) if want]
    of_features, of_weight = grads[: len(levels)], grads[len(levels)] if features else None
    channels_last = is_channels_last([grad_output])

    def fuse(inputs: list[Tensor], weights: Tensor, m: Tensor | None, s: Tensor | None) -> Any:
        return forward[ctx.backend](
            inputs, weights, None, *shape.size, m, s, shape.padding, shape.align_corners,
            channels_last,
        )  # fmt: skip

    def gradients(inputs: list[Tensor], weights: Tensor | None, of: FusionShape,
                  s: Tensor | None, wanted: list[bool]) -> Any:  # fmt: skip
        return backward[ctx.backend](
            grad_output, inputs, weights, None, s, *of.arguments, wanted, channels_last,
            ctx.weight_channels_last,
        )  # fmt: skip

    grad_of_grad = grad_of_weight = None
    grad_of_features: list[Tensor | None] = [None] * len(features)
    if any(a is not None for a in of_features):
        their = shape.of_levels(levels)
        given = [
            grad_output.new_zeros((shape.batch, c, *size)) if a is None else a
            for a, c, size in zip(of_features, their.channels, their.sizes, strict=True)
        ]
        slices = [shape.slice_of(i) for i in levels]
        their_std = None if std is None else torch.stack([std[i] for i in levels])
        if ctx.needs[0]:
            weights = torch.cat([weight[:, s] for s in slices], dim=1)
            grad_of_grad = fuse(given, weights, None, their_std)
        if ctx.needs[2]:
            (pieces,) = gradients(given, None, their, their_std, [False] * len(levels))
            grad_of_weight = grad_output.new_zeros(weight.shape)
            for s, piece in zip(slices, pieces.split(list(their.channels), 1), strict=True):
                grad_of_weight = grad_of_weight.slice_scatter(piece, 1, s.start, s.stop)
    if of_weight is not None:
        if ctx.needs[0]:
            term = fuse(features, of_weight, mean, std)
            grad_of_grad = term if grad_of_grad is None else grad_of_grad + term
        wanted = [bool(need) for need in ctx.needs[1]]
        if any(wanted):
            found = iter(gradients([], of_weight, shape, std, wanted))
            grad_of_features = [next(found) if want else None for want in wanted]
    return grad_of_grad, grad_of_features, grad_of_weight, *[None] * 13


def _flops(shape: FusionShape, like: Tensor) -> int:
    """What is done for one product of inputs and weights: a multiply-add is 2 FLOPs."""
    plan = plan_of(shape, like)
    height, width = shape.out_size
    taps, total = shape.kernel_size**2, 0
    for i in plan.target:
        tiles = -(-height // winograd.OUTPUTS) * -(-width // winograd.OUTPUTS)
        products = winograd.ELEMENTS * tiles if plan.winograd else taps * height * width
        total += 2 * products * shape.channels[i] * shape.out_channels
    for i in plan.own:
        source = shape.sizes[i]
        total += 2 * taps * shape.channels[i] * shape.out_channels * source[0] * source[1]
        total += tap_sum_flops(
            shape.out_channels, source, shape.size, shape.kernel_size, shape.padding
        )
    return shape.batch * total


def _forward_flops(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Any,
    height: int,
    width: int,
    mean: Any,
    std: Any,
    padding: int,
    align_corners: bool,
    *_: Any,
    **__: Any,
) -> int:
    shape = FusionShape.of(features, weight, height, width, padding, align_corners)
    return _flops(shape, features[0])


def _backward_flops(
    grad_output: Tensor, features: Sequence[Tensor], *arguments: Any, **_: Any
) -> int:
    *sizes, wanted, _channels_last, _weight_channels_last = arguments[3:]
    shape = FusionShape.of_gradient(grad_output, *sizes)
    return (bool(features) + any(wanted)) * _flops(shape, grad_output)


def _as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose products have the dtype of their inputs, autocast or not."""

    def run(first: Tensor | Sequence[Tensor], *args: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        with without_autocast(tensor.device.type):
            return function(first, *args)

    return run


forward = Op(
    "fusion_conv2d(Tensor[] features, Tensor weight, Tensor? bias, SymInt height, SymInt width, "
    "Tensor? mean, Tensor? std, SymInt padding, bool align_corners, bool channels_last) -> Tensor",
    kernels=dict.fromkeys(("cpu", "triton"), _as_given(kernel.forward)),
    fake=_forward_fake,
    derivative=Derivative(_save, _gradients),
    flops=_forward_flops,
    flops_of_tensors=True,
)
# The gradients of the features that are wanted, and of the weight if there are features. Shapes are
# arguments, for features are needed for the weight's gradient only, and the weight for theirs.
backward = Op(
    "fusion_conv2d_backward(Tensor grad_output, Tensor[] features, Tensor? weight, Tensor? mean, "
    "Tensor? std, SymInt[] channels, SymInt[] heights, SymInt[] widths, SymInt height, "
    "SymInt width, int kernel_size, SymInt padding, bool align_corners, bool[] wanted, "
    "bool channels_last, bool weight_channels_last) -> Tensor[]",
    kernels=dict.fromkeys(("cpu", "triton"), _as_given(kernel.backward)),
    fake=_backward_fake,
    derivative=Derivative(_save_backward, _gradients_of_backward),
    flops=_backward_flops,
    flops_of_tensors=True,
)
