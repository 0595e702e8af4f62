"""Batch norms with what follows them, on CPUs: a library's products between passes in C++.

Rows of pixels are processed a chunk at a time where there are products, as in the MLP of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import COMPILED, Op, steps_of
from fastfuse.ops.layout import as_matrix, to_memory_format
from fastfuse.ops.matmul import MatmulWeight
from fastfuse.ops.pointwise.mlp import ROW_MULTIPLE, Chunks

__all__ = [
    "batch_moments",
    "norm_relu",
    "norm_relu_backward",
    "norm_relu_conv",
    "norm_relu_conv_backward",
]

# Of matrices (rows, C); moments are mean and biased variance, (2, C), of all rows.
_NORM = "Tensor moments, Tensor? weight, Tensor? bias, float eps"
for _schema in (
    # of each block of ROW_MULTIPLE rows the mean, and the sum of squares less it: (blocks, 2, C)
    "row_moments_into(Tensor(a!) moments, Tensor x) -> ()",
    "combine_moments_into(Tensor(a!) out, Tensor moments, SymInt rows) -> ()",
    # out = ReLU(skip + keep[image] * BN(x))
    f"norm_relu_into(Tensor(a!) out, Tensor x, {_NORM}, Tensor? skip, Tensor? keep, SymInt pixels) "
    "-> ()",
    # grad = grad_output where that ReLU's result, or else ReLU(BN(x)), is positive; out = the
    # latter; sums += those of keep * grad and of keep * grad * (x - mean) over rows. grad may be
    # grad_output
    "norm_relu_backward_into(Tensor(a!) grad, Tensor(b!)? out, Tensor(c!) sums, "
    f"Tensor grad_output, Tensor x, {_NORM}, Tensor? result, Tensor? keep, SymInt pixels) -> ()",
    # grad_x = BN's gradient of keep * grad, whose sums are all rows' if the moments are of them,
    # else None; grad_x may be grad
    "norm_backward_into(Tensor(a!) grad_x, Tensor grad, Tensor x, Tensor moments, Tensor? weight, "
    "float eps, Tensor? sums, Tensor? keep, SymInt pixels) -> ()",
):
    Op(_schema, kernels={"cpu": COMPILED})


def _rows(image: Tensor) -> Tensor:
    return as_matrix(to_memory_format(image, True))


def _map(like: Tensor, channels: int) -> Tensor:
    # Memory that was in use before is as fast as any, and in training there is much of it: huge
    # pages, which are cleared first, are not asked for.
    batch, _, height, width = like.shape
    return torch.empty(
        (batch, channels, height, width), dtype=like.dtype, memory_format=torch.channels_last
    )


def _vectors(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=accumulation_dtype(like.dtype), device=like.device)


def _parameter_sums(sums: Tensor, moments: Tensor, eps: float) -> Tensor:
    """The gradients of bias and weight."""
    sums[1] *= torch.rsqrt(moments[1] + eps)
    return sums


class _Moments:
    """Of the rows of a matrix, a chunk at a time."""

    def __init__(self, rows: int, channels: int, like: Tensor) -> None:
        self.rows = rows
        self.blocks = _vectors(like, -(-rows // ROW_MULTIPLE), 2, channels)

    def add(self, chunk: slice, values: Tensor) -> None:
        blocks = self.blocks[chunk.start // ROW_MULTIPLE : -(-chunk.stop // ROW_MULTIPLE)]
        steps_of("cpu").row_moments_into(blocks, values)

    def result(self) -> Tensor:
        out = torch.empty_like(self.blocks[0])
        steps_of("cpu").combine_moments_into(out, self.blocks, self.rows)
        return out


def batch_moments(x: Tensor) -> Tensor:
    rows = _rows(x)
    moments = _Moments(rows.shape[0], rows.shape[1], x)
    moments.add(slice(0, rows.shape[0]), rows)
    return moments.result()


def norm_relu(
    x: Tensor,
    skip: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    eps: float,
    of_batch: bool,
) -> Tensor:
    out, pixels = _map(x, x.shape[1]), x.shape[2] * x.shape[3]
    of_skip = None if skip is None else _rows(skip)
    steps_of("cpu").norm_relu_into(
        as_matrix(out), _rows(x), moments, weight, bias, eps, of_skip, keep, pixels
    )
    return out


def norm_relu_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    eps: float,
    of_batch: bool,
) -> list[Tensor]:
    ops, pixels = steps_of("cpu"), x.shape[2] * x.shape[3]
    rows, of_grad = _rows(x), _rows(grad)
    result = None if out is None else as_matrix(out)
    grad_x, sums = _map(x, x.shape[1]), _vectors(x, 2, x.shape[1]).zero_()
    grad_skip = x.new_empty(0) if out is None else _map(x, x.shape[1])
    passed = as_matrix(grad_x if out is None else grad_skip)
    ops.norm_relu_backward_into(
        passed, None, sums, of_grad, rows, moments, weight, bias, eps, result, keep, pixels
    )
    ops.norm_backward_into(
        as_matrix(grad_x), passed, rows, moments, weight, eps, sums if of_batch else None, keep,
        pixels,
    )  # fmt: skip
    return [grad_x, grad_skip, _parameter_sums(sums, moments, eps)]


def norm_relu_conv(
    x: Tensor,
    matrix: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    of_batch: bool,
    measured: bool,
) -> tuple[Tensor, Tensor]:
    ops, out_channels, channels = steps_of("cpu"), *matrix.shape[:2]
    rows, out = _rows(x), _map(x, out_channels)
    of_out = as_matrix(out)
    chunks = Chunks(rows, max(channels, out_channels))
    (memory,) = chunks.memory(0 if moments is None else channels)
    found = _Moments(chunks.rows, out_channels, x) if measured else None
    product = MatmulWeight(matrix.flatten(1), chunks.rows)
    for chunk in chunks:
        inputs, target = rows[chunk], of_out[chunk]
        if moments is not None:
            activated = memory[: inputs.shape[0]]
            ops.norm_relu_into(activated, inputs, moments, weight, bias, eps, None, None, 1)
            inputs = activated
        result = product.matmul(inputs, target)
        if result is not target:
            target.copy_(result)
        if found is not None:
            found.add(chunk, target)
    return out, _vectors(x, 2, 0) if found is None else found.result()


def norm_relu_conv_backward(
    grad: Tensor,
    x: Tensor,
    matrix: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    of_batch: bool,
    wants_x: bool,
    wants_matrix: bool,
) -> list[Tensor]:
    ops, out_channels, channels = steps_of("cpu"), *matrix.shape[:2]
    rows, of_grad = _rows(x), _rows(grad)
    grad_x = _map(x, channels) if wants_x else x.new_empty(0)
    of_grad_x = as_matrix(grad_x) if wants_x else grad_x
    sums = _vectors(x, 2, channels).zero_()
    chunks = Chunks(rows, max(channels, out_channels))
    (memory,) = chunks.memory(0 if moments is None else channels)
    transposed = MatmulWeight(matrix.flatten(1).t(), chunks.rows)
    grad_matrix = torch.zeros_like(matrix.flatten(1)) if wants_matrix else x.new_empty(0)
    for chunk in chunks:
        inputs, g = rows[chunk], of_grad[chunk]
        activated = inputs
        if moments is not None:
            activated = memory[: inputs.shape[0]]
        if wants_x:
            target = of_grad_x[chunk]
            result = transposed.matmul(g, target)
            if moments is not None:
                ops.norm_relu_backward_into(
                    target, activated, sums, result, inputs, moments, weight, bias, eps, None, None,
                    1,
                )  # fmt: skip
            elif result is not target:
                target.copy_(result)
        elif moments is not None:
            ops.norm_relu_into(activated, inputs, moments, weight, bias, eps, None, None, 1)
        if wants_matrix:
            torch.addmm(grad_matrix, g.t(), activated, out=grad_matrix)
    if wants_x and moments is not None:
        ops.norm_backward_into(
            of_grad_x, of_grad_x, rows, moments, weight, eps, sums if of_batch else None, None, 1,
        )  # fmt: skip
        sums = _parameter_sums(sums, moments, eps)
    if wants_matrix:
        grad_matrix = grad_matrix.view(matrix.shape)
    return [grad_x, grad_matrix, sums]
