"""The Triton kernels of linear layers with what follows them: how they are used is told in
``linear.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastfuse.ops.pointwise.kernels_triton import _gelu, _keep_of, _store, _store_sums

__all__ = ["linear_gelu_backward_kernel", "linear_gelu_kernel", "linear_residual_kernel"]


@triton.jit
def _tile(columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """``(block of rows, its first row, rows, columns)``: neighbours share rows of the input."""
    column_blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    block = program // column_blocks
    column = (program % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return block, block * BLOCK_R, tl.arange(0, BLOCK_R), column


@triton.jit
def _product(
    x, weight, row, column, rows, inner, columns, x_stride, weight_stride_out, weight_stride_in,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr,  # whether BLOCK_K divides inner
):  # fmt: skip
    """x weight^T of a tile; rows outside repeat the last one. # [row, column]"""
    row = tl.minimum(row, rows - 1).to(tl.int64)
    in_column = (column < columns)[None, :]  # a minimum would hide that columns are neighbours
    k = tl.arange(0, BLOCK_K)
    x += row[:, None] * x_stride + k[None, :]
    weight += column.to(tl.int64)[None, :] * weight_stride_out + k[:, None] * weight_stride_in
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN:
            left = tl.load(x)
            right = tl.load(weight, mask=in_column, other=0.0)
        else:
            inside = start + k < inner
            left = tl.load(x, mask=inside[None, :], other=0.0)
            right = tl.load(weight, mask=inside[:, None] & in_column, other=0.0)
        total = tl.dot(left, right, total)
        x += BLOCK_K
        weight += BLOCK_K * weight_stride_in
    return total


@triton.jit
def _vector(vector, column, columns):
    return tl.load(vector + column, mask=column < columns, other=0.0)[None, :]


@triton.jit(do_not_specialize=["rows"])
def linear_gelu_kernel(
    out,
    kept,  # the product before its bias, or None
    x, weight, bias, rows, inner, columns, x_stride, weight_stride_out, weight_stride_in,
    out_stride, kept_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    _, start, row, column = _tile(columns, BLOCK_R, BLOCK_C)
    row += start
    value = _product(
        x, weight, row, column, rows, inner, columns, x_stride, weight_stride_out,
        weight_stride_in, BLOCK_K, EVEN,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if kept is not None:
        _store(kept, row, column, kept_stride, inside, value)
    value, _ = _gelu(value + _vector(bias, column, columns), True)
    _store(out, row, column, out_stride, inside, value)


@triton.jit(do_not_specialize=["rows", "first", "pixels"])
def linear_residual_kernel(
    out, skip, x, weight, bias,
    scale,  # one value per column, or None
    keep,  # one value per image, or None
    rows, inner, columns, x_stride, weight_stride_out, weight_stride_in, out_stride, skip_stride,
    pixels, first,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    _, start, tile_row, column = _tile(columns, BLOCK_R, BLOCK_C)
    row = start + tile_row
    value = _product(
        x, weight, row, column, rows, inner, columns, x_stride, weight_stride_out,
        weight_stride_in, BLOCK_K, EVEN,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value += _vector(bias, column, columns)
    if scale is not None:
        value *= _vector(scale, column, columns)
    if keep is not None:
        value *= _keep_of(keep, start, tile_row, first, pixels, row < rows)
    offset = row.to(tl.int64)[:, None] * skip_stride + column[None, :]
    value += tl.load(skip + offset, mask=inside, other=0.0).to(tl.float32)
    _store(out, row, column, out_stride, inside, value)


@triton.jit(do_not_specialize=["rows"])
def linear_gelu_backward_kernel(
    grad_hidden, activated,
    partials,  # (blocks of rows, columns): of the bias's gradient
    grad, grad_weight,
    x,  # or, without a weight, the product before its bias
    weight, bias, rows, grad_inner, inner, columns, grad_stride, grad_weight_stride_out,
    grad_weight_stride_in, x_stride, weight_stride_out, weight_stride_in, grad_hidden_stride,
    activated_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GRAD_EVEN: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    block, start, row, column = _tile(columns, BLOCK_R, BLOCK_C)
    row += start
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if weight is None:
        offset = row.to(tl.int64)[:, None] * x_stride + column[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        value = _product(
            x, weight, row, column, rows, inner, columns, x_stride, weight_stride_out,
            weight_stride_in, BLOCK_K, EVEN,
        )  # fmt: skip
    value, slope = _gelu(value + _vector(bias, column, columns), False)
    _store(activated, row, column, activated_stride, inside, value)
    slope *= _product(
        grad, grad_weight, row, column, rows, grad_inner, columns, grad_stride,
        grad_weight_stride_out, grad_weight_stride_in, BLOCK_K, GRAD_EVEN,
    )  # fmt: skip
    _store(grad_hidden, row, column, grad_hidden_stride, inside, slope)
    _store_sums(partials, block, column, columns, tl.where(inside, slope, 0.0))
