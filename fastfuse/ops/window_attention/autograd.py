"""Schema, shapes, derivative and FLOPs of window_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import COMPILED, Derivative, Op, no_second_derivative

__all__ = ["backward", "forward"]

_ARGUMENTS = "int heads, int[] windows, int shift, bool centered"


def _forward_fake(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _backward_fake(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    local_weight: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    local = None if local_weight is None else (10, local_weight.shape[1])
    shapes = [None if t is None else tuple(t.shape) for t in (qkv_bias, bias)] + [local]
    sums = [qkv.new_empty(s or (0,), dtype=accumulation_dtype(qkv.dtype)) for s in shapes]
    return [qkv.new_empty(qkv.shape), *sums]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, qkv_bias, bias, local_weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(qkv, qkv_bias, bias, local_weight)


def _gradients(ctx: Any, grad: Tensor) -> Sequence[Any]:
    found = backward[ctx.backend](grad.contiguous(), *ctx.saved_tensors, *ctx.arguments)
    grad_qkv, grad_qkv_bias, grad_bias, grad_local = found
    needs = ctx.needs
    gradients = (
        grad_qkv,
        grad_qkv_bias,
        grad_bias,
        grad_local[:9] if needs[3] else None,
        grad_local[9] if needs[4] else None,
    )
    return (*(g if needed else None for g, needed in zip(gradients, needs[:5], strict=True)),) + (
        None,
    ) * len(ctx.arguments)


def _flops(shape: torch.Size, windows: Sequence[int]) -> int:
    """Of both products of a pass."""
    batch, height, width, channels = shape
    branches = len(windows) // 2
    total = 0
    for i in range(branches):
        tall, wide = windows[2 * i] or height, windows[2 * i + 1] or width
        tokens = batch * (height + -height % tall) * (width + -width % wide)
        total += 4 * tokens * tall * wide * (channels // 3 // branches)
    return total


def _forward_flops(
    qkv: Any, qkv_bias: Any, bias: Any, weight: Any, local_bias: Any, heads: int,
    windows: list[int], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _flops(qkv, windows)


def _backward_flops(
    grad: Any, qkv: Any, qkv_bias: Any, bias: Any, weight: Any, heads: int, windows: list[int],
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _flops(qkv, windows) * 5 // 2


# Vectors and matrices of parameters are in the accumulation dtype.
forward = Op(
    "window_attention(Tensor qkv, Tensor? qkv_bias, Tensor? bias, Tensor? local_weight, "
    f"Tensor? local_bias, {_ARGUMENTS}) -> Tensor",
    kernels={"cpu": COMPILED},
    fake=_forward_fake,
    derivative=Derivative(_save, _gradients),
    flops=_forward_flops,
)
# The gradients of qkv, qkv_bias, bias, and of local_weight and local_bias as one; empty ones of
# what is not there.
backward = Op(
    "window_attention_backward(Tensor grad, Tensor qkv, Tensor? qkv_bias, Tensor? bias, "
    f"Tensor? local_weight, {_ARGUMENTS}) -> Tensor[]",
    kernels={"cpu": COMPILED},
    fake=_backward_fake,
    derivative=no_second_derivative("window_attention"),
    flops=_backward_flops,
)
