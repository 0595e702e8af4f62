"""Schema, shapes, derivatives and FLOPs of upsample_add.

The op is linear. The gradient of skip is that of the output. That of x is the adjoint of UP, which
is ``upsample_equalize_concat_backward`` for one level; its derivative is registered there, and so
derivatives of every order come from these ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastfuse import _extension  # noqa: F401  (its kernels register themselves when it loads)
from fastfuse.ops.dispatch import backward_of, below_autograd
from fastfuse.ops.layout import is_channels_last, memory_format
from fastfuse.ops.upsample_equalize_concat.autograd import flops  # and its ops: see above

__all__ = ["call"]

_LIBRARY = torch.library.Library("fastfuse", "FRAGMENT")
_LIBRARY.define(
    "upsample_add(Tensor x, Tensor skip, bool align_corners, bool channels_last) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)

_FORWARD = "fastfuse::upsample_add"


def _forward_cuda(*args: Any) -> Tensor:
    from fastfuse.ops.upsample_add.triton import forward

    return forward(*args)


_LIBRARY.impl("upsample_add", _forward_cuda, "CUDA")


@torch.library.register_fake(_FORWARD)
def _forward_fake(x: Tensor, skip: Tensor, align_corners: bool, channels_last: bool) -> Tensor:
    return torch.empty(
        skip.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.align_corners, _ = inputs
    ctx.shape = x.shape


def _gradient_of_x(ctx: Any, grad_output: Tensor) -> Tensor:
    _, channels, height, width = ctx.shape
    if grad_output.shape[2:] == ctx.shape[2:]:
        return grad_output
    shapes = ([0], [channels], [height], [width])
    layout = is_channels_last([grad_output])
    with backward_of("upsample_add"):
        (gradient,) = torch.ops.fastfuse.upsample_equalize_concat_backward(
            grad_output, *shapes, None, ctx.align_corners, layout
        )
    return gradient


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    needs_x, needs_skip = ctx.needs_input_grad[:2]
    return (
        _gradient_of_x(ctx, grad_output) if needs_x else None,
        grad_output if needs_skip else None,
        None,
        None,
    )


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)


class UpsampleAdd(torch.autograd.Function):
    """The formula registered above, for eager mode, by a shorter way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor, align_corners: bool, channels_last: bool
    ) -> Tensor:
        with below_autograd():
            output = torch.ops.fastfuse.upsample_add(x, skip, align_corners, channels_last)
        _setup_context(ctx, (x, skip, align_corners, channels_last), output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, grad_output)


def call(x: Tensor, skip: Tensor, align_corners: bool, channels_last: bool) -> Tensor:
    """The op with its autograd, by the shortest way."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.ops.fastfuse.upsample_add(x, skip, align_corners, channels_last)
    if torch.is_grad_enabled() and (x.requires_grad or skip.requires_grad):
        return UpsampleAdd.apply(x, skip, align_corners, channels_last)
    with below_autograd():
        return torch.ops.fastfuse.upsample_add(x, skip, align_corners, channels_last)


@register_flop_formula(torch.ops.fastfuse.upsample_add)
def _forward_flops(x_shape: torch.Size, skip_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Those of the upsampling, and an addition per value."""
    batch, channels, *size = skip_shape
    return batch * flops(channels, x_shape[2:], size, False) + skip_shape.numel()
