"""depthwise_conv2d on CUDA devices: Triton kernels and their launchers.

Not bytes limit it but instructions: loads and multiply-adds. So a thread holds a run of output rows
of one column in registers, ``dilation`` rows apart, and the weights of one column of the kernel;
each input row that it loads meets all these weights, k multiply-adds for a load. The gradient of
the weights exchanges roles, sums for weights and rows of the gradient for output rows. Its warps
take different columns of the kernel over the same pixels, which they find in the L1 cache. Programs
write partial sums, which a second kernel adds in a fixed order.

Rows are the same for all threads of a program; columns and channels are spread over them, whichever
of the two is contiguous. Neighbours along x, whose halos overlap, are neighbouring programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.ops.depthwise_conv2d.kernels_triton import (
    backward_weight_kernel,
    forward_kernel,
    reduce_kernel,
)
from fastfuse.ops.launch_triton import Launch, cdiv, memory_format, planned, power_of_two

__all__ = ["backward_weight", "forward"]

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
# Three programs per multiprocessor. Without a limit the assembler may spill to reach one it likes.
MAX_REGISTERS = 168
SPECIALIZED_MULTIPLE = 16  # Triton knows of an integer that it is a multiple of 16, or nothing
# channels_last: channels of one thread. Four float32 are 16 bytes, the widest access. So are eight
# bfloat16, but in float32 they would leave registers for half the rows.
VECTOR, VECTOR_BYTES = 4, 16
# channels_last: a pixel's share of a tile, a full cache line of float32. More would narrow the tile
# and widen its halo.
BLOCK_CHANNELS = 32
MIN_BLOCK_CHANNELS = 16
# contiguous: a full line of float32 along x. A thread has one column: neighbours' loads, shifted by
# a tap, are not aligned, and several columns would only lie farther apart.
MAX_BLOCK_COLUMNS = 32
# Registers of a run's sums. Beside them are the weights of at most MAX_TAPS taps (larger kernels
# are cut) and the rows in flight: with more sums the assembler spills. Runs have one of a few
# lengths: each is a compilation.
MAX_SUM_REGISTERS, MAX_RUN, MAX_TAPS = 44, 32, 7
RUNS = (1, 2, 4, 7, 11, 16, 32)
# The gradient of the weights: sums of a thread for each of its channels, registers of one column's
# sums, and rows that they meet, of single values and of vectors.
MAX_WEIGHT_SUMS, MAX_COLUMN_REGISTERS = 14, 64
MAX_ROWS, MAX_VECTOR_ROWS = 16, 7
# Programs that fill today's devices about twice: below, runs are shortened for more of them. So
# many write partial sums, if there are so many tiles: every order of summation is one of the shape.
MIN_PROGRAMS = 256
PARTIAL_PROGRAMS = 1024
# Reducing the partial sums: rows of them in flight, and channels of one program.
REDUCED_ROWS, REDUCED_CHANNELS = 64, 32


def _with_unit_stride(image: Tensor, channels_last: bool) -> Tensor:
    """The image, copied unless neighbouring threads' values are neighbours in it."""
    if image.stride(1 if channels_last else 3) == 1:
        return image
    return image.contiguous(memory_format=memory_format(channels_last))


def _tile(columns: int, channels: int, values: int, channels_last: bool) -> tuple[int, int]:
    """``(BLOCK_X, BLOCK_C)`` of ``values`` values."""
    if not channels_last:
        block_x = min(MAX_BLOCK_COLUMNS, power_of_two(columns))
        return block_x, min(max(values // block_x, 1), power_of_two(channels))
    # The largest power of two that divides the channels, so that few blocks run over the end.
    block_c = min(max(channels & -channels, MIN_BLOCK_CHANNELS), BLOCK_CHANNELS)
    block_x = min(max(values // block_c, 1), power_of_two(columns))
    return block_x, min(values // block_x, power_of_two(channels))


def _vector(channels: int, itemsize: int, channels_last: bool) -> int:
    """Values of one thread in a tile."""
    if not channels_last or channels % SPECIALIZED_MULTIPLE:  # every value needs its address
        return 1
    return min(VECTOR, VECTOR_BYTES // itemsize)


def _run(rows: int, limit: int, kernel_size: int) -> int:
    """Rows of a run, ``limit`` at most: of a few lengths, for each is a compilation, the one whose
    runs load the fewest rows, halos and what is beyond the image included."""
    lengths = [length for length in RUNS if length <= limit] or [limit]
    return min(
        lengths, key=lambda length: (cdiv(rows, length) * (length + kernel_size - 1), -length)
    )


def _even(rows: int, limit: int) -> int:
    """Rows cut into runs of about one length, ``limit`` at most."""
    return cdiv(rows, cdiv(rows, max(limit, 1)))


@planned
def _forward_launch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...],
    out_stride: tuple[int, ...], weight_stride: tuple[int, ...], kernel_size: int, dilation: int,
    flip: bool, channels_last: bool,
) -> Launch:  # fmt: skip
    batch, channels, height, width = shape
    weight_c, weight_h, weight_w = weight_stride
    start = (kernel_size - 1) * (weight_h + weight_w) if flip else 0
    if flip:
        weight_h, weight_w = -weight_h, -weight_w
    dilation = min(dilation, max(height, width))  # what is beyond is outside
    residues = min(dilation, height)
    vector = _vector(channels, dtype.itemsize, channels_last)
    block_x, block_c = _tile(width, channels, THREADS * vector, channels_last)
    tiles = batch * residues * cdiv(width, block_x) * cdiv(channels, block_c)
    rows = cdiv(height, dilation)
    limit = min(MAX_SUM_REGISTERS // (vector * max(dtype.itemsize // 4, 1)), MAX_RUN)
    while limit > 4 and tiles * cdiv(rows, limit) < MIN_PROGRAMS:
        limit //= 2
    run = _run(rows, limit, kernel_size)
    run_blocks = cdiv(rows, run)
    integers = (
        channels, height, width, run_blocks, residues, dilation, dilation * stride[2],
        dilation * out_stride[2], *stride, start, weight_c, weight_h, weight_w, *out_stride,
    )  # fmt: skip
    constants = {
        "KERNEL_SIZE": kernel_size,
        "TAPS": _even(kernel_size, MAX_TAPS),
        "CHANNELS_LAST": channels_last,
        "RUN": run,
        "BLOCK_X": block_x,
        "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
    }
    return Launch(forward_kernel, tiles * run_blocks, device, integers, constants)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None,
    dilation: int, flip: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """``addend + conv2d(x, weight, bias)`` of stride 1 and the same size, every channel alone.

    With ``flip`` the kernel is turned by 180 degrees: the gradient of the input.
    """
    layout = memory_format(channels_last)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if out.numel() == 0:
        return out
    x = _with_unit_stride(x, channels_last)
    if addend is not None:
        addend = addend.contiguous(memory_format=layout)
    kernel_size = weight.shape[2]
    channel, _, row, column = weight.stride()
    if channels_last:  # a copy, so that what a thread loads of it is contiguous too
        accumulation = torch.promote_types(x.dtype, torch.float32)
        shape = (kernel_size, kernel_size, weight.shape[0])
        taps = weight.as_strided(shape, (row, column, channel))
        weight = torch.empty(shape, dtype=accumulation, device=x.device).copy_(taps)
        row, column, channel = weight.stride()
    launch = _forward_launch(
        x.device, x.dtype, x.shape, x.stride(), out.stride(), (channel, row, column), kernel_size,
        dilation, flip, channels_last,
    )  # fmt: skip
    launch(out, x, weight, None if bias is None else bias.contiguous(), addend)
    return out


@planned
def _backward_weight_launches(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], grad_stride: tuple[int, ...],
    stride: tuple[int, ...], kernel_size: int, dilation: int, channels_last: bool,
) -> tuple[int, Launch, Launch]:  # fmt: skip
    """How many partial sums there are, what writes and what adds them."""
    batch, channels, height, width = shape
    dilation = min(dilation, max(height, width))
    residues = min(dilation, height)
    registers = max(dtype.itemsize // 4, 1)  # of one sum
    vector = _vector(channels, dtype.itemsize, channels_last)
    while vector > 1 and kernel_size * vector * registers > MAX_COLUMN_REGISTERS:
        vector //= 2
    sums = max(MAX_WEIGHT_SUMS // kernel_size, 1)
    block_k = 1  # by warps: threads of one share their pixels' coordinates
    while block_k < NUM_WARPS and cdiv(kernel_size, block_k) > sums:
        block_k *= 2
    columns = min(cdiv(kernel_size, block_k), sums)
    block_x, block_c = _tile(width, channels, THREADS * vector // block_k, channels_last)
    rows = cdiv(height, dilation)
    run = _run(rows, MAX_ROWS if vector == 1 else MAX_VECTOR_ROWS, kernel_size)
    run_blocks = cdiv(rows, run)
    tiles = batch * residues * run_blocks * cdiv(width, block_x)
    programs = cdiv(channels, block_c) * cdiv(kernel_size, columns * block_k)
    tiles_per_chunk = cdiv(tiles, min(cdiv(PARTIAL_PROGRAMS, programs), tiles))
    chunks = cdiv(tiles, tiles_per_chunk)
    integers = (
        channels, height, width, run_blocks, residues, dilation, dilation * stride[2],
        dilation * grad_stride[2], tiles, tiles_per_chunk, *grad_stride, *stride,
    )  # fmt: skip
    constants = {
        "KERNEL_SIZE": kernel_size,
        "CHANNELS_LAST": channels_last,
        "RUN": run,
        "COLUMNS": columns,
        "BLOCK_K": block_k,
        "BLOCK_X": block_x,
        "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
    }
    partial = Launch(backward_weight_kernel, chunks * programs, device, integers, constants)
    block_c = min(REDUCED_CHANNELS, power_of_two(channels))
    constants = {
        "TAPS": kernel_size**2,
        "BLOCK": REDUCED_ROWS,
        "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
    }
    programs = (kernel_size**2 + 1) * cdiv(channels, block_c)
    return chunks, partial, Launch(reduce_kernel, programs, device, (chunks, channels), constants)


def empty_gradients(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Memory for those of weight and bias."""
    channels = x.shape[1]
    shape = (channels, 1, kernel_size, kernel_size)
    grad_weight = torch.empty(shape, dtype=x.dtype, device=x.device)
    return grad_weight, torch.empty((channels,), dtype=x.dtype, device=x.device)


def backward_weight(
    grad_output: Tensor, x: Tensor, kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The gradients of weight (C, 1, k, k) and bias (C,), in x's dtype."""
    channels, dtype, device = x.shape[1], x.dtype, x.device
    grad_weight, grad_bias = empty_gradients(x, kernel_size)
    if x.numel() == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    channels_last = x.stride(1) == 1 != x.stride(3)
    x, grad_output = (_with_unit_stride(image, channels_last) for image in (x, grad_output))
    chunks, partial, reduce = _backward_weight_launches(
        device, dtype, x.shape, grad_output.stride(), x.stride(), kernel_size, dilation,
        channels_last,
    )  # fmt: skip
    partials = torch.empty(
        (chunks, kernel_size**2 + 1, channels),
        dtype=torch.promote_types(dtype, torch.float32),
        device=device,
    )
    partial(partials, grad_output, x)
    reduce(partials, grad_weight, grad_bias)
    return grad_weight, grad_bias
