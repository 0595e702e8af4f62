"""Schemas, shapes, derivatives and FLOPs of batch norms with what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.batch_norm import kernel
from fastfuse.ops.define import Derivative, Op, no_second_derivative

__all__ = ["batch_moments", "norm_relu", "norm_relu_conv"]

_NORM = "Tensor moments, Tensor? weight, Tensor? bias"


def _moments_like(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((2, channels), dtype=accumulation_dtype(x.dtype))


def _map_like(x: Tensor, channels: int) -> Tensor:
    batch, _, height, width = x.shape
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


batch_moments = Op(
    "batch_moments(Tensor x) -> Tensor",
    kernels={"cpu": kernel.batch_moments},
    fake=lambda x: _moments_like(x, x.shape[1]),
)


# ---- ReLU(skip + keep * BN(x)) ----


def _save_norm_relu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, skip, moments, weight, bias, keep, *ctx.rest = inputs
    # Without a skip it is made again of x, which is read anyway.
    ctx.save_for_backward(x, None if skip is None else output, moments, weight, bias, keep)


def _norm_relu_gradients(ctx: Any, grad: Tensor) -> Sequence[Any]:
    grad_x, grad_skip, sums = norm_relu_backward[ctx.backend](grad, *ctx.saved_tensors, *ctx.rest)
    needs = ctx.needs
    return (
        grad_x if needs[0] else None,
        grad_skip if needs[1] else None,
        None,
        sums[1] if needs[3] else None,
        sums[0] if needs[4] else None,
        *(None,) * (1 + len(ctx.rest)),
    )


norm_relu = Op(
    f"batch_norm_relu(Tensor x, Tensor? skip, {_NORM}, Tensor? keep, float eps, bool of_batch) "
    "-> Tensor",
    kernels={"cpu": kernel.norm_relu},
    fake=lambda x, *_: _map_like(x, x.shape[1]),
    derivative=Derivative(_save_norm_relu, _norm_relu_gradients),
)
# The gradients of x, of the skip (empty without one), and of bias and weight as one.
norm_relu_backward = Op(
    f"batch_norm_relu_backward(Tensor grad, Tensor x, Tensor? out, {_NORM}, Tensor? keep, "
    "float eps, bool of_batch) -> Tensor[]",
    kernels={"cpu": kernel.norm_relu_backward},
    fake=lambda grad, x, out, *_: [
        _map_like(x, x.shape[1]),
        x.new_empty(0) if out is None else _map_like(x, x.shape[1]),
        _moments_like(x, x.shape[1]),
    ],
    derivative=no_second_derivative("batch_norm_relu"),
)


# ---- the 1x1 convolution of ReLU(BN(x)) ----


def _save_norm_relu_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, matrix, moments, weight, bias, *ctx.rest, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, matrix, moments, weight, bias)


def _norm_relu_conv_gradients(ctx: Any, grad: Tensor, _: Any) -> Sequence[Any]:
    needs = ctx.needs
    wants_x = needs[0] or needs[3] or needs[4]
    found = norm_relu_conv_backward[ctx.backend](
        grad, *ctx.saved_tensors, *ctx.rest, wants_x, needs[1]
    )
    grad_x, grad_matrix, sums = found
    return (
        grad_x if needs[0] else None,
        grad_matrix if needs[1] else None,
        None,
        sums[1] if needs[3] else None,
        sums[0] if needs[4] else None,
        *(None,) * (1 + len(ctx.rest)),
    )


def _flops(x: torch.Size, matrix: torch.Size) -> int:
    batch, channels, height, width = x
    return 2 * batch * height * width * channels * matrix[0]


def _forward_flops(x: Any, matrix: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(x, matrix)


def _backward_flops(grad: Any, x: Any, matrix: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(x, matrix) * (bool(args[-2]) + bool(args[-1]))


_OPTIONAL_NORM = "Tensor? moments, Tensor? weight, Tensor? bias, float eps, bool of_batch"

# And the moments of the result if `measured`, else an empty tensor.
norm_relu_conv = Op(
    f"batch_norm_relu_conv(Tensor x, Tensor matrix, {_OPTIONAL_NORM}, bool measured) "
    "-> (Tensor, Tensor)",
    kernels={"cpu": kernel.norm_relu_conv},
    fake=lambda x, matrix, *rest: (
        _map_like(x, matrix.shape[0]),
        _moments_like(x, matrix.shape[0] if rest[-1] else 0),
    ),
    derivative=Derivative(_save_norm_relu_conv, _norm_relu_conv_gradients),
    flops=_forward_flops,
)
# The gradients of x, of the matrix, and of bias and weight as one; empty ones of what is not
# wanted.
norm_relu_conv_backward = Op(
    f"batch_norm_relu_conv_backward(Tensor grad, Tensor x, Tensor matrix, {_OPTIONAL_NORM}, "
    "bool wants_x, bool wants_matrix) -> Tensor[]",
    kernels={"cpu": kernel.norm_relu_conv_backward},
    fake=lambda grad, x, matrix, *rest: [
        _map_like(x, x.shape[1]) if rest[-2] else x.new_empty(0),
        torch.empty_like(matrix, memory_format=torch.contiguous_format)
        if rest[-1]
        else x.new_empty(0),
        _moments_like(x, x.shape[1]),
    ],
    derivative=no_second_derivative("batch_norm_relu_conv"),
    flops=_backward_flops,
)
