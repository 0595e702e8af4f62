"""Schema, shapes, derivatives and FLOPs of depthwise_conv2d.

The op is linear in its input and in its weight. With ``flip`` it convolves with the kernel turned
by 180 degrees, which is its own adjoint: the gradient of the input. The gradient of weight and bias
is an op of its own, whose gradients are the forward op again: derivatives of every order come from
these two. ``addend`` is added to the result, for blocks with a residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastfuse import _extension  # noqa: F401  (its kernels register themselves when it loads)
from fastfuse.ops.dispatch import backward_of, recording
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["call"]

_LIBRARY = torch.library.Library("fastfuse", "FRAGMENT")
for _schema in (
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, int dilation, "
    "bool flip, bool channels_last) -> Tensor",
    # the gradients of weight (C, 1, k, k) and bias (C,), rounded to the input's dtype at the end
    "depthwise_conv2d_backward_weight(Tensor grad_output, Tensor x, int kernel_size, int dilation) "
    "-> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=[torch.Tag.pt2_compliant_tag])

_FORWARD, _BACKWARD = "fastfuse::depthwise_conv2d", "fastfuse::depthwise_conv2d_backward_weight"


def _cuda(name: str) -> Any:
    def launch(*args: Any) -> Any:
        from fastfuse.ops.depthwise_conv2d import triton

        return getattr(triton, name)(*args)

    return launch


_LIBRARY.impl("depthwise_conv2d", _cuda("forward"), "CUDA")
_LIBRARY.impl("depthwise_conv2d_backward_weight", _cuda("backward_weight"), "CUDA")


@torch.library.register_fake(_FORWARD)
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


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    grad_output: Tensor, x: Tensor, kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return x.new_empty((channels, 1, kernel_size, kernel_size)), x.new_empty((channels,))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flip: bool) -> Tensor:
    return torch.ops.fastfuse.depthwise_conv2d(
        x, weight, bias, None, dilation, flip, is_channels_last([x])
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, ctx.dilation, ctx.flip, _ = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.kernel_size = weight.shape[2]


def _forward_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_addend = ctx.needs_input_grad[:4]
    grad_x = grad_weight = grad_bias = None
    with backward_of("depthwise_conv2d"):
        if needs_x:
            grad_x = _convolve(grad_output, weight, None, ctx.dilation, not ctx.flip)
        if needs_weight:
            # Turned by 180 degrees, a kernel meets the same pairs with their roles exchanged.
            pair = (x, grad_output) if ctx.flip else (grad_output, x)
            grad_weight, sums = torch.ops.fastfuse.depthwise_conv2d_backward_weight(
                *pair, ctx.kernel_size, ctx.dilation
            )
            grad_bias = None if ctx.flip else sums
        if needs_bias and grad_bias is None:
            grad_bias = grad_output.sum((0, 2, 3))
    return (
        grad_x,
        grad_weight,
        grad_bias if needs_bias else None,
        grad_output if needs_addend else None,
        None,
        None,
        None,
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, x, _, ctx.dilation = inputs
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad_output if needs_x else None, x if needs_grad else None)


def _backward_backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Any, ...]:
    grad_output, x = ctx.saved_tensors
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    return (
        _convolve(x, grad_weight, grad_bias, ctx.dilation, False) if needs_grad else None,
        _convolve(grad_output, grad_weight, None, ctx.dilation, True) if needs_x else None,
        None,
        None,
    )


torch.library.register_autograd(_FORWARD, _forward_backward, setup_context=_setup_context)
torch.library.register_autograd(
    _BACKWARD, _backward_backward, setup_context=_backward_setup_context
)


def call(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The op with its autograd, by the shortest way."""
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    with recording(wanted and torch.is_grad_enabled()):
        return _convolve(x, weight, bias, dilation, False)


def _flops(shape: torch.Size, kernel_size: int) -> int:
    batch, channels, height, width = shape
    return 2 * kernel_size**2 * batch * channels * height * width


@register_flop_formula(torch.ops.fastfuse.depthwise_conv2d)
def _forward_flops(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops(x_shape, weight_shape[2])


@register_flop_formula(torch.ops.fastfuse.depthwise_conv2d_backward_weight)
def _backward_flops(
    grad_shape: torch.Size, x_shape: torch.Size, kernel_size: int, *args: Any, **kwargs: Any
) -> int:
    return _flops(x_shape, kernel_size)
