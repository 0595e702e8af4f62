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
# ruff: noqa: RUF005  (kernels keep a block per row in a tuple, and Triton knows no unpacking)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.launch_triton import Launch, cdiv, planned, power_of_two

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
# are cut) and the rows in flight: with more sums the assembler spills.
MAX_SUM_REGISTERS, MAX_RUN, MAX_TAPS = 44, 32, 7
RUNS = (1, 2, 4, 7, 8, 11, 16, 32)
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


@triton.jit
def _split(index, parts):
    """``(index // parts, index % parts)``."""
    return index // parts, index % parts


@triton.jit
def _count(digit, carry, size):
    """``(digit, carry)`` of a counter whose digits have different sizes, one step on."""
    digit += carry
    full = digit == size
    return tl.where(full, 0, digit), full.to(tl.int32)


@triton.jit
def _along_axes(x, channel, CHANNELS_LAST: tl.constexpr):
    """x and channel along the two last axes of a tile, the contiguous one last."""
    if CHANNELS_LAST:
        return x[None, :, None], channel[None, None, :]
    else:
        return x[None, None, :], channel[None, :, None]


@triton.jit
def _is_inside(y, height):
    """Whether there is such a row, as a block that broadcasts. # [1, 1, 1]"""
    return tl.full([1, 1, 1], y, tl.int32).to(tl.uint32) < height  # a negative one is large


@triton.jit(do_not_specialize=["height", "width", "run_blocks"])
def _forward_kernel(
    out, x,
    weight,  # its first tap; it may be walked backwards
    bias,  # one value per channel, or None
    addend,  # where out is, or None
    channels, height, width,
    run_blocks, residues,  # of rows that are ``dilation`` apart
    dilation, x_step, out_step,  # rows that are as far apart, in values
    x_n, x_c, x_h, x_w, weight_start, weight_c, weight_h, weight_w,
    out_n, out_c, out_h, out_w,
    KERNEL_SIZE: tl.constexpr, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    block, x_block = _split(tl.program_id(0), tl.cdiv(width, BLOCK_X))
    block, channel_block = _split(block, tl.cdiv(channels, BLOCK_C))
    block, residue = _split(block, residues)
    image, run_block = _split(block, run_blocks)
    y = run_block * (RUN * dilation) + residue
    column, channel = _along_axes(
        x_block * BLOCK_X + tl.arange(0, BLOCK_X),
        channel_block * BLOCK_C + tl.arange(0, BLOCK_C),
        CHANNELS_LAST,
    )
    inside = (column < width) & (channel < channels)
    # What is the same for all columns is loaded by each, for the layout of a tile.
    each_channel = tl.broadcast_to(channel, inside.shape)
    in_channel = each_channel < channels
    x += image.to(tl.int64) * x_n + channel.to(tl.int64) * x_c
    weight += weight_start + each_channel * weight_c

    # Start from the bias.
    total = tl.zeros(inside.shape, dtype=DTYPE)
    if bias is not None:
        total += tl.load(bias + each_channel, mask=in_channel, other=0.0).to(DTYPE)
    totals = (total,) * RUN

    for first in tl.static_range(0, KERNEL_SIZE, TAPS):
        for kx in range(KERNEL_SIZE):
            # The weights of a column.
            taps = totals[:0]
            tap = weight + (kx * weight_w + first * weight_h)
            for ky in tl.static_range(TAPS):
                if first + ky < KERNEL_SIZE:
                    taps = taps + (tl.load(tap, mask=in_channel, other=0.0).to(DTYPE),)
                    tap += weight_h
            # Down the input: each row is for as many output rows as there are taps.
            source_x = column + (kx - RADIUS) * dilation
            source_y = y + (first - RADIUS) * dilation
            source = x + source_x.to(tl.int64) * x_w + source_y.to(tl.int64) * x_h
            in_columns = (source_x >= 0) & (source_x < width) & (channel < channels)
            for row in tl.static_range(RUN + len(taps) - 1):
                in_rows = _is_inside(source_y + row * dilation, height)
                value = tl.load(source, mask=in_columns & in_rows, other=0.0).to(DTYPE)
                source += x_step
                for run in tl.static_range(RUN):
                    total = totals[0]
                    if row >= run and row - run < len(taps):
                        total += value * taps[row - run]
                    totals = totals[1:] + (total,)

    # Add, store.
    offset = image.to(tl.int64) * out_n + y.to(tl.int64) * out_h
    offset = offset + column.to(tl.int64) * out_w + channel.to(tl.int64) * out_c
    for run in tl.static_range(RUN):
        if y + run * dilation < height:
            total = totals[run]
            if addend is not None:
                total += tl.load(addend + offset, mask=inside, other=0.0).to(DTYPE)
            tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)
        offset += out_step


@triton.jit(do_not_specialize=["height", "width", "run_blocks", "tiles", "tiles_per_chunk"])
def _backward_weight_kernel(
    partials,  # (chunks, k * k + 1, channels): of the weights' gradient and, last, the bias's
    grad_out, x,
    channels, height, width, run_blocks, residues, dilation, x_step, grad_step,
    tiles, tiles_per_chunk,  # of RUN rows by BLOCK_X columns
    grad_n, grad_c, grad_h, grad_w, x_n, x_c, x_h, x_w,
    KERNEL_SIZE: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,  # of the kernel: per thread, and by threads
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = partials.dtype.element_ty
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    x_blocks = tl.cdiv(width, BLOCK_X)
    block, channel_block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    chunk, column_block = _split(block, tl.cdiv(KERNEL_SIZE, COLUMNS * BLOCK_K))
    kernel_x = column_block * (COLUMNS * BLOCK_K) + tl.arange(0, BLOCK_K)
    kx = kernel_x[:, None, None]
    channel_1d = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel, channel = _along_axes(tl.arange(0, BLOCK_X), channel_1d, CHANNELS_LAST)
    grad_out += channel.to(tl.int64) * grad_c
    x += channel.to(tl.int64) * x_c

    zeros = tl.zeros((kx + pixel + channel).shape, dtype=DTYPE)  # [BLOCK_K, ...]
    sums = (zeros,) * (COLUMNS * KERNEL_SIZE)
    bias_sum = zeros
    first = chunk * tiles_per_chunk
    block, x_block = _split(first, x_blocks)
    block, residue = _split(block, residues)
    image, run_block = _split(block, run_blocks)
    for _ in range(first, tl.minimum(first + tiles_per_chunk, tiles)):
        # The rows of the gradient.
        y = run_block * (RUN * dilation) + residue
        column = x_block * BLOCK_X + pixel
        start = grad_out + image.to(tl.int64) * grad_n + y.to(tl.int64) * grad_h
        source = tl.broadcast_to(start + column.to(tl.int64) * grad_w, zeros.shape)
        inside = tl.broadcast_to((column < width) & (channel < channels), zeros.shape)
        limit = tl.where(column < width, width, 0)  # a column outside reads nothing
        rows = sums[:0]
        for run in tl.static_range(RUN):
            mask = inside & _is_inside(y + run * dilation, height)
            value = tl.load(source, mask=mask, other=0.0).to(DTYPE)
            source += grad_step
            bias_sum += value
            rows = rows + (value,)
        # Down the input, for a column of the kernel: each row meets all taps.
        source_y = y - RADIUS * dilation
        start = x + image.to(tl.int64) * x_n + source_y.to(tl.int64) * x_h
        for index in tl.static_range(COLUMNS):
            tap_x = kx + index * BLOCK_K
            source_x = column + (tap_x - RADIUS) * dilation
            in_columns = (source_x >= 0) & (source_x < limit) & (tap_x < KERNEL_SIZE)
            in_columns &= channel < channels
            source = start + source_x.to(tl.int64) * x_w
            for row in tl.static_range(RUN + KERNEL_SIZE - 1):
                in_rows = _is_inside(source_y + row * dilation, height)
                value = tl.load(source, mask=in_columns & in_rows, other=0.0).to(DTYPE)
                source += x_step
                for ky in tl.static_range(KERNEL_SIZE):
                    total = sums[ky]
                    if row >= ky and row - ky < RUN:
                        total += value * rows[row - ky]
                    sums = sums[:ky] + (total,) + sums[ky + 1 :]
            sums = sums[KERNEL_SIZE:] + sums[:KERNEL_SIZE]
        x_block, carry = _count(x_block, 1, x_blocks)
        residue, carry = _count(residue, carry, residues)
        run_block, carry = _count(run_block, carry, run_blocks)
        image += carry

    # Reduce and store.
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 2
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    partials += chunk.to(tl.int64) * (TAPS + 1) * channels + channel_1d[None, :]
    in_channel = (channel_1d < channels)[None, :]
    for index in tl.static_range(COLUMNS):
        tap_x = (kernel_x + index * BLOCK_K)[:, None]
        mask = (tap_x < KERNEL_SIZE) & in_channel
        for ky in tl.static_range(KERNEL_SIZE):
            total = tl.sum(sums[index * KERNEL_SIZE + ky], axis=AXIS)
            tl.store(partials + (ky * KERNEL_SIZE + tap_x) * channels, total, mask=mask)
    tap_x = kernel_x[:, None]  # all hold the same sum
    total = tl.sum(bias_sum, axis=AXIS)
    tl.store(partials + (TAPS + tap_x) * channels, total, mask=(tap_x == 0) & in_channel)


@triton.jit(do_not_specialize=["chunks"])
def _reduce_kernel(
    partials, grad_weight, grad_bias, chunks, channels,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tap, channel_block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK, BLOCK_C], dtype=partials.dtype.element_ty)
    for first in range(0, chunks, BLOCK):
        chunk = (first + tl.arange(0, BLOCK))[:, None]
        offset = (chunk.to(tl.int64) * (TAPS + 1) + tap) * channels + channel[None, :]
        mask = (chunk < chunks) & (channel < channels)[None, :]
        total += tl.load(partials + offset, mask=mask, other=0.0)
    value = tl.sum(total, axis=0).to(grad_weight.dtype.element_ty)
    if tap < TAPS:
        tl.store(grad_weight + channel.to(tl.int64) * TAPS + tap, value, mask=channel < channels)
    else:
        tl.store(grad_bias + channel, value, mask=channel < channels)


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _with_unit_stride(image: Tensor, channels_last: bool) -> Tensor:
    """The image, copied unless neighbouring threads' values are neighbours in it."""
    if image.stride(1 if channels_last else 3) == 1:
        return image
    return image.contiguous(memory_format=_memory_format(channels_last))


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
    return Launch(_forward_kernel, tiles * run_blocks, device, integers, constants)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None,
    dilation: int, flip: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """``addend + conv2d(x, weight, bias)`` of stride 1 and the same size, every channel alone.

    With ``flip`` the kernel is turned by 180 degrees: the gradient of the input.
    """
    memory_format = _memory_format(channels_last)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    x = _with_unit_stride(x, channels_last)
    if addend is not None:
        addend = addend.contiguous(memory_format=memory_format)
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
    partial = Launch(_backward_weight_kernel, chunks * programs, device, integers, constants)
    block_c = min(REDUCED_CHANNELS, power_of_two(channels))
    constants = {
        "TAPS": kernel_size**2,
        "BLOCK": REDUCED_ROWS,
        "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
    }
    programs = (kernel_size**2 + 1) * cdiv(channels, block_c)
    return chunks, partial, Launch(_reduce_kernel, programs, device, (chunks, channels), constants)


def backward_weight(
    grad_output: Tensor, x: Tensor, kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The gradients of weight (C, 1, k, k) and bias (C,), in x's dtype."""
    channels, dtype, device = x.shape[1], x.dtype, x.device
    grad_weight = torch.empty((channels, 1, kernel_size, kernel_size), dtype=dtype, device=device)
    grad_bias = torch.empty((channels,), dtype=dtype, device=device)
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
