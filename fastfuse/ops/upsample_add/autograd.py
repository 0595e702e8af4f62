"""Schema, shapes, derivatives and FLOPs of upsample_add.

The op is linear. The gradient of skip is that of the output. That of x is the adjoint of UP, which
is ``upsample_equalize_concat_backward`` for one level, with derivatives of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.define import COMPILED, Derivative, Op
from fastfuse.ops.layout import is_channels_last, memory_format
from fastfuse.ops.upsample_equalize_concat.autograd import backward as adjoint
from fastfuse.ops.upsample_equalize_concat.autograd import flops

__all__ = ["forward"]


def _fake(x: Tensor, skip: Tensor, align_corners: bool, channels_last: bool) -> Tensor:
    return torch.empty(
        skip.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.align_corners, _ = inputs
    ctx.shape = x.shape


def _gradient_of_x(ctx: Any, grad_output: Tensor) -> Tensor:
    _, channels, height, width = ctx.shape
    if grad_output.shape[2:] == ctx.shape[2:]:
        return grad_output
    shapes = [0], [channels], [height], [width]
    layout = is_channels_last([grad_output])
    return adjoint[ctx.backend](grad_output, *shapes, None, ctx.align_corners, layout)[0]


def _gradients(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    needs_x, needs_skip = ctx.needs[:2]
    grad_x = _gradient_of_x(ctx, grad_output) if needs_x else None
    return grad_x, grad_output if needs_skip else None, None, None


def _flops(x_shape: torch.Size, skip_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Those of the upsampling, and an addition per value."""
    batch, channels, *size = skip_shape
    return batch * flops(channels, x_shape[2:], size, False) + skip_shape.numel()


forward = Op(
    "upsample_add(Tensor x, Tensor skip, bool align_corners, bool channels_last) -> Tensor",
    kernels={"cpu": COMPILED, "triton": "fastfuse.ops.upsample_add.triton:forward"},
    fake=_fake,
    derivative=Derivative(_save, _gradients),
    flops=_flops,
)
