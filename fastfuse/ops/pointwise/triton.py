"""Layer norm, bias and GELU, residual, and their gradients on CUDA devices.

All are bound by bytes: every matrix is read and written once, in registers it is float32 (float64
for float64). Where a gradient is a sum over rows, a program walks over a block of them, keeps the
sums of its columns in registers and writes them once; a second kernel adds the programs' sums, in a
fixed order, to what is there. Row blocks depend on shapes only, so results are the same bits from
run to run. Every element is read and written by one program, the read first: outputs may be inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.launch_triton import Launch, cdiv, planned, power_of_two
from fastfuse.ops.pointwise.kernels_triton import (
    add_sums_kernel,
    bias_gelu_backward_kernel,
    bias_gelu_kernel,
    layer_norm_backward_kernel,
    layer_norm_kernel,
    residual_backward_kernel,
    residual_kernel,
)

__all__ = [
    "add_launch", "bias_gelu_backward_into", "bias_gelu_into", "layer_norm_backward_into",
    "layer_norm_into", "residual_backward_into", "residual_into",
]  # fmt: skip

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
# Values of a matrix that a thread holds at once: two accesses of 16 bytes in float32, one in
# two-byte dtypes. A long row of layer norm has more warps, and more values beyond MAX_WARPS.
VALUES, MAX_WARPS = 8, 16
# Tiles of a program that does much before its first value.
TILES = 4
# Elsewhere a row is cut: into 128 bytes of float32 (a cache line), or more if it divides it.
MIN_BLOCK_CHANNELS, MAX_BLOCK_CHANNELS = 32, 256
# Programs that write sums of columns, if there are so many rows: five per multiprocessor of today's
# devices, that all run at once.
SUM_PROGRAMS = 640
# As many as there are: without a limit the assembler may spill to reach more programs.
MAX_REGISTERS = 255
# Adding these up: rows of sums in flight, and channels of one program.
ADDED_ROWS, ADDED_CHANNELS = 128, 32


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
    kernel: Any, device: torch.device, rows: int, channels: int, others: tuple[int, ...],
    tiles: int | None = None,
) -> Launch:  # fmt: skip
    """Of a kernel of pieces of rows, a program for each tile, or for so many of them."""
    block_r, block_c = _blocks(channels)
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": NUM_WARPS}
    if tiles is not None:
        constants["TILES"] = tiles
    programs = cdiv(rows, block_r * (tiles or 1)) * cdiv(channels, block_c)
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
    if whole_rows is None:
        constants["maxnreg"] = MAX_REGISTERS
    channel_blocks = cdiv(channels, block_c)
    rows_per_block, blocks = _rows_per_block(rows, channel_blocks, block_r)
    integers = (rows, channels, rows_per_block, *others)
    partial = Launch(kernel, blocks * channel_blocks, device, integers, constants)
    return blocks, partial, add_launch(device, vectors, blocks, channels)


@planned
def add_launch(device: torch.device, vectors: int, blocks: int, channels: int) -> Launch:
    """Of what adds blocks' sums to vectors."""
    constants = {"BLOCK_R": ADDED_ROWS, "BLOCK_C": ADDED_CHANNELS, "num_warps": NUM_WARPS}
    programs = vectors * cdiv(channels, ADDED_CHANNELS)
    return Launch(add_sums_kernel, programs, device, (blocks, channels), constants)


def layer_norm_into(
    out: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    skip: Tensor | None, gelu: bool,
) -> None:  # fmt: skip
    """``out = [skip +] [gelu](layer_norm(x) * norm_weight + norm_bias)``."""
    if out.numel() == 0:
        return
    strides = (out.stride(0), x.stride(0), None if skip is None else skip.stride(0))
    launch = _rows_launch(layer_norm_kernel, x.device, *x.shape, strides, eps, gelu)
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
        layer_norm_backward_kernel, x.device, 2, *x.shape, strides, (eps, gelu)
    )
    partials = grad_weight.new_empty((2, blocks, x.shape[1]))
    partial(grad_x, partials, grad_output, x, norm_weight, norm_bias)
    add((grad_weight, grad_bias), partials)


def bias_gelu_into(out: Tensor, hidden: Tensor, bias: Tensor) -> None:
    """``out = gelu(hidden + bias)``; ``out`` may be ``hidden``."""
    if out.numel() == 0:
        return
    strides = (out.stride(0), hidden.stride(0))
    launch = _tiles_launch(bias_gelu_kernel, hidden.device, *hidden.shape, strides, TILES)
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
        bias_gelu_backward_kernel, grad.device, 1, *hidden.shape, strides
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
    launch = _tiles_launch(residual_kernel, x.device, *x.shape, others)
    launch(out, x, product, bias, scale, keep)


def residual_backward_into(
    out: Tensor, sums: Tensor, grad: Tensor, keep: Tensor | None, pixels: int, first: int
) -> None:
    """``out = keep[image] * grad`` if there is ``keep``, ``sums +=`` the sum of its rows."""
    if grad.numel() == 0:
        return
    others = (pixels, first, out.stride(0), grad.stride(0))
    blocks, partial, add = _summing_launches(
        residual_backward_kernel, grad.device, 1, *grad.shape, others
    )
    partials = sums.new_empty((1, blocks, grad.shape[1]))
    partial(out, partials, grad, keep)
    add((sums,), partials)
