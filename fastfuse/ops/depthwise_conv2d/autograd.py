"""Schema, shapes, derivatives and FLOPs of depthwise_conv2d.

The op is linear in its input and in its weight. With ``flip`` it convolves with the kernel turned
by 180 degrees, which is its own adjoint: the gradient of the input. The gradient of weight and bias
is an op of its own, whose gradients are the forward op again: derivatives of every order come from
these two. ``addend`` is added to the result, for blocks with a residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.define import Derivative, Op, kernels_of
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["forward"]


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    dilation: int,
    flip: bool,
    channels_last: bool,
) -> Tensor:
    return torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last)
    )


def _backward_fake(
    grad_output: Tensor, x: Tensor, kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return x.new_empty((channels, 1, kernel_size, kernel_size)), x.new_empty((channels,))


def _convolve(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, flip: bool) -> Tensor:
    return forward[ctx.backend](x, weight, bias, None, ctx.dilation, flip, is_channels_last([x]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, ctx.dilation, ctx.flip, _ = inputs
    needs_x, needs_weight = ctx.needs[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.kernel_size = weight.shape[2]


def _gradients(ctx: Any, grad_output: Tensor) -> Sequence[Any]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_addend = ctx.needs[:4]
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        grad_x = _convolve(ctx, grad_output, weight, None, flip=not ctx.flip)
    if needs_weight:
        # Turned by 180 degrees, a kernel meets the same pairs with their roles exchanged.
        pair = (x, grad_output) if ctx.flip else (grad_output, x)
        grad_weight, sums = backward_weight[ctx.backend](*pair, ctx.kernel_size, ctx.dilation)
        grad_bias = None if ctx.flip else sums
    if needs_bias and grad_bias is None:
        grad_bias = grad_output.sum((0, 2, 3))
    return (
        grad_x,
        grad_weight,
        grad_bias if needs_bias else None,
        grad_output if needs_addend else None,
        *[None] * 3,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, x, _, ctx.dilation = inputs
    needs_grad, needs_x = ctx.needs[:2]
    ctx.save_for_backward(grad_output if needs_x else None, x if needs_grad else None)


def _gradients_of_backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> Sequence[Any]:
    grad_output, x = ctx.saved_tensors
    needs_grad, needs_x = ctx.needs[:2]
    return (
        _convolve(ctx, x, grad_weight, grad_bias, flip=False) if needs_grad else None,
        _convolve(ctx, grad_output, grad_weight, None, flip=True) if needs_x else None,
        *[None] * 2,
    )


def _flops(shape: torch.Size, kernel_size: int) -> int:
    batch, channels, height, width = shape
    return 2 * kernel_size**2 * batch * channels * height * width


def _forward_flops(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops(x_shape, weight_shape[2])


def _backward_flops(
    grad_shape: torch.Size, x_shape: torch.Size, kernel_size: int, *args: Any, **kwargs: Any
) -> int:
    return _flops(x_shape, kernel_size)


forward = Op(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, int dilation, "
    "bool flip, bool channels_last) -> Tensor",
    kernels=kernels_of("depthwise_conv2d", "forward"),
    fake=_forward_fake,
    derivative=Derivative(_save, _gradients),
    flops=_forward_flops,
)
# The gradients of weight (C, 1, k, k) and bias (C,), rounded to the input's dtype at the end.
backward_weight = Op(
    "depthwise_conv2d_backward_weight(Tensor grad_output, Tensor x, int kernel_size, int dilation) "
    "-> (Tensor, Tensor)",
    kernels=kernels_of("depthwise_conv2d", "backward_weight"),
    fake=_backward_fake,
    derivative=Derivative(_save_backward, _gradients_of_backward),
    flops=_backward_flops,
)
