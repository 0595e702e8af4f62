"""Layer norm, bias and GELU, residual, and their gradients on CUDA devices.

All are bound by bytes: every matrix is read and written once, in registers it is float32 (float64
for float64). Where a gradient is a sum over rows, a program walks over a block of them, keeps the
sums of its columns in registers and writes them once; a second kernel adds the programs' sums, in a
fixed order, to what is there. Row blocks depend on shapes only, so results are the same bits from
run to run. Every element is read and written by one program, the read first: outputs may be inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.launch_triton import Launch, cdiv, planned, power_of_two

__all__ = [
    "bias_gelu_backward_into", "bias_gelu_into", "layer_norm_backward_into", "layer_norm_into",
    "residual_backward_into", "residual_into",
]  # fmt: skip

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
# Values of a matrix that a thread holds at once: two accesses of 16 bytes in float32, one in
# two-byte dtypes. A long row of layer norm has more warps, and more values beyond MAX_WARPS.
VALUES, MAX_WARPS = 8, 16
# Elsewhere a row is cut: into 128 bytes of float32 (a cache line), or more if it divides it.
MIN_BLOCK_CHANNELS, MAX_BLOCK_CHANNELS = 32, 256
# Programs that write sums of columns, if there are so many rows: as many as today's devices hold.
SUM_PROGRAMS = 1024
# Adding these up: rows of sums in flight, and channels of one program.
ADDED_ROWS, ADDED_CHANNELS = 128, 32

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
INVERSE_SQRT_TWO_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _gelu(x):
    """``(gelu(x), its derivative)``: x times the normal distribution's integral up to x."""
    integral = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
    return x * integral, integral + x * (tl.exp(-0.5 * x * x) * INVERSE_SQRT_TWO_PI)


@triton.jit
def _tile(channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """``(block of rows, rows, channel, whether there is such a channel)``; [BLOCK_R], [BLOCK_C]."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    channel = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // channel_blocks, tl.arange(0, BLOCK_R), channel, channel < channels


@triton.jit
def _offset(row, channel, stride):
    return row.to(tl.int64)[:, None] * stride + channel[None, :]


@triton.jit
def _load(matrix, row, channel, stride, mask, DTYPE: tl.constexpr):
    return tl.load(matrix + _offset(row, channel, stride), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _store(matrix, row, channel, stride, mask, value):
    offset = _offset(row, channel, stride)
    tl.store(matrix + offset, value.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def _row_vector(vector, channel, mask):
    """A vector's channels, for every row of a tile: each thread loads what it needs."""
    return tl.load(vector + tl.broadcast_to(channel[None, :], mask.shape), mask=mask, other=0.0)


@triton.jit
def _store_sums(partials, block, channel, channels, total):
    """The sum of a tile's rows, as the block's row of ``partials``."""
    partials += block.to(tl.int64) * channels + channel
    tl.store(partials, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit
def _keep_of(keep, start, tile_row, first, pixels, mask):
    """The factor of every row's image, rows counted from ``start``. # [BLOCK_R, 1]"""
    position = first.to(tl.int64) + start  # one division of int64 for all rows
    left = (pixels - position % pixels).to(pixels.dtype)  # rows of the same image
    image = position // pixels + tl.where(tile_row < left, 0, 1 + (tile_row - left) // pixels)
    return tl.load(keep + image, mask=mask, other=0.0)[:, None]


@triton.jit
def _normalize(x, inside, channels, EPS: tl.constexpr):
    """Rows less their mean, over their deviation, and 1 / deviation."""
    mean = tl.sum(x, axis=1)[:, None] / channels
    x = tl.where(inside, x - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / channels + EPS)
    return x * inverse, inverse


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    out, x, weight, bias,
    skip,  # added, or None
    rows, channels, out_stride, x_stride, skip_stride,
    EPS: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight.dtype.element_ty
    block, row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    row += block * BLOCK_R
    inside = (row < rows)[:, None] & in_channel[None, :]
    value = _load(x, row, channel, x_stride, inside, DTYPE)
    value, _ = _normalize(value, inside, channels, EPS)
    value = value * _row_vector(weight, channel, inside) + _row_vector(bias, channel, inside)
    if GELU:
        value, _ = _gelu(value)
    if skip is not None:
        value += _load(skip, row, channel, skip_stride, inside, DTYPE)
    _store(out, row, channel, out_stride, inside, value)


@triton.jit(do_not_specialize=["rows", "rows_per_block"])
def _layer_norm_backward_kernel(
    grad_x,
    partials,  # (2, blocks, channels): of the weight's gradient and the bias's
    grad_out, x, weight, bias,
    rows, channels, rows_per_block, grad_x_stride, grad_out_stride, x_stride,
    EPS: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    weight_sum = tl.zeros([BLOCK_R, BLOCK_C], dtype=DTYPE)
    bias_sum = weight_sum
    first = block * rows_per_block
    for start in range(first, tl.minimum(first + rows_per_block, rows), BLOCK_R):
        row = start + tile_row
        inside = (row < rows)[:, None] & in_channel[None, :]
        value = _load(x, row, channel, x_stride, inside, DTYPE)
        value, inverse = _normalize(value, inside, channels, EPS)
        grad = _load(grad_out, row, channel, grad_out_stride, inside, DTYPE)
        scale = _row_vector(weight, channel, inside)
        if GELU:
            _, slope = _gelu(value * scale + _row_vector(bias, channel, inside))
            grad *= slope
        weight_sum += grad * value
        bias_sum += grad
        # Not a product, which could be fused: of one channel, grad - mean is exactly zero.
        grad = tl.fma(grad, scale, 0.0)
        mean = tl.sum(grad, axis=1)[:, None] / channels
        mean_product = tl.sum(grad * value, axis=1)[:, None] / channels
        grad = (grad - mean - value * mean_product) * inverse
        _store(grad_x, row, channel, grad_x_stride, inside, grad)
    _store_sums(partials, block, channel, channels, weight_sum)
    _store_sums(partials, tl.num_programs(0) + block, channel, channels, bias_sum)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_kernel(
    out, hidden, bias, rows, channels, out_stride, hidden_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = bias.dtype.element_ty
    block, row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    row += block * BLOCK_R
    inside = (row < rows)[:, None] & in_channel[None, :]
    value = _load(hidden, row, channel, hidden_stride, inside, DTYPE)
    value, _ = _gelu(value + _row_vector(bias, channel, inside))
    _store(out, row, channel, out_stride, inside, value)


@triton.jit(do_not_specialize=["rows", "rows_per_block"])
def _bias_gelu_backward_kernel(
    grad, out,
    partials,  # (blocks, channels)
    hidden, bias, rows, channels, rows_per_block, grad_stride, out_stride, hidden_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = bias.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=DTYPE)
    first = block * rows_per_block
    for start in range(first, tl.minimum(first + rows_per_block, rows), BLOCK_R):
        row = start + tile_row
        inside = (row < rows)[:, None] & in_channel[None, :]
        value = _load(hidden, row, channel, hidden_stride, inside, DTYPE)
        value, slope = _gelu(value + _row_vector(bias, channel, inside))
        slope *= _load(grad, row, channel, grad_stride, inside, DTYPE)
        total += slope
        _store(grad, row, channel, grad_stride, inside, slope)
        _store(out, row, channel, out_stride, inside, value)
    _store_sums(partials, block, channel, channels, total)


@triton.jit(do_not_specialize=["rows", "first", "pixels"])
def _residual_kernel(
    out, x, product, bias,
    scale,  # one value per channel, or None
    keep,  # one value per image, or None
    rows, channels, pixels, first, out_stride, x_stride, product_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = bias.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    start = block * BLOCK_R
    row = start + tile_row
    inside = (row < rows)[:, None] & in_channel[None, :]
    value = _load(product, row, channel, product_stride, inside, DTYPE)
    value += _row_vector(bias, channel, inside)
    if scale is not None:
        value *= _row_vector(scale, channel, inside)
    if keep is not None:
        value *= _keep_of(keep, start, tile_row, first, pixels, row < rows)
    value += _load(x, row, channel, x_stride, inside, DTYPE)
    _store(out, row, channel, out_stride, inside, value)


@triton.jit(do_not_specialize=["rows", "rows_per_block", "first", "pixels"])
def _residual_backward_kernel(
    out,
    partials,  # (blocks, channels)
    grad,
    keep,  # one value per image, or None
    rows, channels, rows_per_block, pixels, first, out_stride, grad_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = partials.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=DTYPE)
    first_row = block * rows_per_block
    for start in range(first_row, tl.minimum(first_row + rows_per_block, rows), BLOCK_R):
        row = start + tile_row
        inside = (row < rows)[:, None] & in_channel[None, :]
        value = _load(grad, row, channel, grad_stride, inside, DTYPE)
        if keep is not None:
            value *= _keep_of(keep, start, tile_row, first, pixels, row < rows)
            _store(out, row, channel, out_stride, inside, value)
        total += value
    _store_sums(partials, block, channel, channels, total)


@triton.jit(do_not_specialize=["blocks"])
def _add_sums_kernel(
    sums,  # vectors
    partials,  # (vectors, blocks, channels)
    blocks, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    vector, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    partials += vector.to(tl.int64) * blocks * channels
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=partials.dtype.element_ty)
    for start in range(0, blocks, BLOCK_R):
        row = start + tile_row
        inside = (row < blocks)[:, None] & in_channel[None, :]
        total += tl.load(partials + _offset(row, channel, channels), mask=inside, other=0.0)
    for index in tl.static_range(len(sums)):
        if vector == index:
            there = tl.load(sums[index] + channel, mask=in_channel, other=0.0)
            tl.store(sums[index] + channel, there + tl.sum(total, axis=0), mask=in_channel)


def _row_blocks(channels: int) -> tuple[int, int, int]:
    """``(BLOCK_R, BLOCK_C, warps)`` of tiles of whole rows."""
    block_c = power_of_two(channels)
    warps = min(max(block_c // (32 * VALUES), NUM_WARPS), MAX_WARPS)
    return max(THREADS * VALUES // block_c, 1), block_c, warps


def _blocks(channels: int) -> tuple[int, int]:
    """``(BLOCK_R, BLOCK_C)``: the largest power of two that divides the channels, within limits."""
    block_c = min(max(channels & -channels, MIN_BLOCK_CHANNELS), MAX_BLOCK_CHANNELS)
    return THREADS * VALUES // block_c, block_c


def _rows_per_block(rows: int, channel_blocks: int, block_r: int) -> tuple[int, int]:
    """``(rows of a program, blocks of so many)`` for ``SUM_PROGRAMS`` programs; whole tiles."""
    tiles = cdiv(rows, block_r)
    rows_per_block = cdiv(tiles, cdiv(SUM_PROGRAMS, channel_blocks)) * block_r
    return rows_per_block, cdiv(rows, rows_per_block)


@planned
def _rows_launch(
    kernel: Any, device: torch.device, rows: int, channels: int, strides: tuple[int | None, ...],
    eps: float, gelu: bool,
) -> Launch:  # fmt: skip
    """Of a kernel of whole rows, a program for each tile."""
    block_r, block_c, warps = _row_blocks(channels)
    constants = {
        "EPS": eps, "GELU": gelu, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps,
    }  # fmt: skip
    return Launch(kernel, cdiv(rows, block_r), device, (rows, channels, *strides), constants)


@planned
def _tiles_launch(
    kernel: Any, device: torch.device, rows: int, channels: int, others: tuple[int, ...]
) -> Launch:
    """Of a kernel of pieces of rows, a program for each tile."""
    block_r, block_c = _blocks(channels)
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": NUM_WARPS}
    programs = cdiv(rows, block_r) * cdiv(channels, block_c)
    return Launch(kernel, programs, device, (rows, channels, *others), constants)


@planned
def _summing_launches(
    kernel: Any, device: torch.device, vectors: int, rows: int, channels: int,
    others: tuple[int, ...], whole_rows: tuple[float, bool] | None = None,
) -> tuple[int, Launch, Launch]:  # fmt: skip
    """How many rows of partial sums there are, what writes and what adds them.

    ``whole_rows``: EPS and GELU of a kernel whose tiles are of whole rows.
    """
    constants: dict[str, Any] = {}
    if whole_rows is None:
        block_r, block_c = _blocks(channels)
        warps = NUM_WARPS
    else:
        block_r, block_c, warps = _row_blocks(channels)
        constants = {"EPS": whole_rows[0], "GELU": whole_rows[1]}
    constants |= {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
    channel_blocks = cdiv(channels, block_c)
    rows_per_block, blocks = _rows_per_block(rows, channel_blocks, block_r)
    integers = (rows, channels, rows_per_block, *others)
    partial = Launch(kernel, blocks * channel_blocks, device, integers, constants)
    constants = {"BLOCK_R": ADDED_ROWS, "BLOCK_C": ADDED_CHANNELS, "num_warps": NUM_WARPS}
    programs = vectors * cdiv(channels, ADDED_CHANNELS)
    return (
        blocks,
        partial,
        Launch(_add_sums_kernel, programs, device, (blocks, channels), constants),
    )


def layer_norm_into(
    out: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    skip: Tensor | None, gelu: bool,
) -> None:  # fmt: skip
    """``out = [skip +] [gelu](layer_norm(x) * norm_weight + norm_bias)``."""
    if out.numel() == 0:
        return
    strides = (out.stride(0), x.stride(0), None if skip is None else skip.stride(0))
    launch = _rows_launch(_layer_norm_kernel, x.device, *x.shape, strides, eps, gelu)
    launch(out, x, norm_weight, norm_bias, skip)


def layer_norm_backward_into(
    grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_output: Tensor, x: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, eps: float, gelu: bool,
) -> None:  # fmt: skip
    """The gradients of ``[gelu](layer_norm(x))``: ``grad_x = ``, the others ``+=``."""
    if x.numel() == 0:
        return
    strides = (grad_x.stride(0), grad_output.stride(0), x.stride(0))
    blocks, partial, add = _summing_launches(
        _layer_norm_backward_kernel, x.device, 2, *x.shape, strides, (eps, gelu)
    )
    partials = grad_weight.new_empty((2, blocks, x.shape[1]))
    partial(grad_x, partials, grad_output, x, norm_weight, norm_bias)
    add((grad_weight, grad_bias), partials)


def bias_gelu_into(out: Tensor, hidden: Tensor, bias: Tensor) -> None:
    """``out = gelu(hidden + bias)``; ``out`` may be ``hidden``."""
    if out.numel() == 0:
        return
    strides = (out.stride(0), hidden.stride(0))
    launch = _tiles_launch(_bias_gelu_kernel, hidden.device, *hidden.shape, strides)
    launch(out, hidden, bias)


def bias_gelu_backward_into(
    grad: Tensor, out: Tensor, grad_bias: Tensor, hidden: Tensor, bias: Tensor
) -> None:
    """``grad *= gelu'(hidden + bias)``, ``out = gelu(hidden + bias)``, ``grad_bias += sum(grad)``.

    ``out`` may be ``hidden``.
    """
    if grad.numel() == 0:
        return
    strides = (grad.stride(0), out.stride(0), hidden.stride(0))
    blocks, partial, add = _summing_launches(
        _bias_gelu_backward_kernel, grad.device, 1, *hidden.shape, strides
    )
    partials = grad_bias.new_empty((1, blocks, hidden.shape[1]))
    partial(grad, out, partials, hidden, bias)
    add((grad_bias,), partials)


def residual_into(
    out: Tensor, x: Tensor, product: Tensor, bias: Tensor, scale: Tensor | None,
    keep: Tensor | None, pixels: int, first: int,
) -> None:  # fmt: skip
    """``out = x + keep[image] * scale * (product + bias)``, image = ``(first + row) // pixels``."""
    if out.numel() == 0:
        return
    others = (pixels, first, out.stride(0), x.stride(0), product.stride(0))
    launch = _tiles_launch(_residual_kernel, x.device, *x.shape, others)
    launch(out, x, product, bias, scale, keep)


def residual_backward_into(
    out: Tensor, sums: Tensor, grad: Tensor, keep: Tensor | None, pixels: int, first: int
) -> None:
    """``out = keep[image] * grad`` if there is ``keep``, ``sums +=`` the sum of its rows."""
    if grad.numel() == 0:
        return
    others = (pixels, first, out.stride(0), grad.stride(0))
    blocks, partial, add = _summing_launches(
        _residual_backward_kernel, grad.device, 1, *grad.shape, others
    )
    partials = sums.new_empty((1, blocks, grad.shape[1]))
    partial(out, partials, grad, keep)
    add((sums,), partials)
