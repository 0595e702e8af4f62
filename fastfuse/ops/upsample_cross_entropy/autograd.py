"""Schemas, shapes, derivative and FLOPs of upsample_cross_entropy, a pixel at a time.

The reduction is PyTorch's, outside: one backward serves all of them. For it a pixel's
log-sum-exp is kept, from which probabilities follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import Derivative, Op, kernels_of, no_second_derivative
from fastfuse.ops.layout import is_channels_last, memory_format
from fastfuse.ops.upsample_equalize_concat.autograd import flops

__all__ = ["forward"]

NAME = "upsample_cross_entropy"
_EXPONENTIALS = 2  # per value of the upsampled logits: a subtraction and the exponential


def _forward_fake(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    accumulation = accumulation_dtype(logits.dtype)
    loss, logsumexp = (logits.new_empty(target.shape, dtype=accumulation) for _ in range(2))
    return loss, logsumexp


def _backward_fake(grad: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return torch.empty(
        logits.shape,
        dtype=logits.dtype,
        device=logits.device,
        memory_format=memory_format(arguments[-1]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # of the log-sum-exp, there is none
    ctx.save_for_backward(logits, target, weight, output[1])


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> Sequence[Any]:
    if grad is None:
        return [None] * 6
    logits, target, weight, logsumexp = ctx.saved_tensors
    gradient = backward[ctx.backend](
        grad, logits, target, weight, logsumexp, *ctx.options, is_channels_last([logits])
    )
    return gradient, *[None] * 5


def _flops(logits: torch.Size, target: torch.Size) -> int:
    batch, classes, *size = logits
    upsampling = batch * flops(classes, size, target[1:], False)
    return upsampling + _EXPONENTIALS * classes * target.numel()


_ARGUMENTS = "int ignore_index, float label_smoothing, bool align_corners"
forward = Op(
    f"{NAME}(Tensor logits, Tensor target, Tensor? weight, {_ARGUMENTS}) -> (Tensor, Tensor)",
    kernels=kernels_of(NAME, "forward"),
    fake=_forward_fake,
    derivative=Derivative(_save, _gradients),
    flops=lambda logits, target, *_, **__: _flops(logits, target),
)
backward = Op(
    f"{NAME}_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, "
    f"Tensor logsumexp, {_ARGUMENTS}, bool channels_last) -> Tensor",
    kernels=kernels_of(NAME, "backward"),
    fake=_backward_fake,
    derivative=no_second_derivative(NAME),
    flops=lambda grad, logits, target, *_, **__: 2 * _flops(logits, target),
)
