"""tap_sum on CUDA devices: Triton kernels and their launchers.

Both kernels sum along one axis before they look at the other. The forward kernel owns a run of
output rows: what the taps of a kernel row give along x at one source row is summed once, and every
output row of the run that reads this source row takes it from registers. All levels add up in one
launch, so that the output is rounded once. The backward kernel is the gather of the adjoint, in a
fixed order and without atomics: a program owns source pixels and the taps of one kernel row; it
sums the readers in every column of the gradient once and gives the sum to each of these taps.

Rows are the same for all threads of a program; columns and channels are spread over them, whichever
of the two is contiguous. Programs that read the same source follow each other, for the L2 cache.
"""
# ruff: noqa: RUF005  (kernels keep a block per row in a tuple, and Triton knows no unpacking)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.bilinear_triton import sample_axis, target_range, weight_of
from fastfuse.ops.launch_triton import Launch, cdiv, planned, power_of_two

__all__ = ["backward", "backward_into", "forward", "forward_into"]

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
# Three programs per multiprocessor. Without a limit the assembler may spill to reach one it likes.
MAX_REGISTERS = 168
VECTOR_BYTES = 16  # the widest access of one thread
SPECIALIZED_MULTIPLE = 16  # Triton knows of an integer that it is a multiple of 16, or nothing
# Output rows of one program where every level at least doubles its height: four of them read three
# or four source rows, not eight.
RUN = 4
# Rows of the gradient in flight in the backward: all readers of a source row up to a ratio of 4.
MAX_READERS = 8
# Bytes of sums per thread, 16 float32 registers, where it does not hold one vector of channels.
MAX_SUM_BYTES = 64
# channels_last: a pixel's share of a tile is 32 bytes (a sector) to 256 (two full cache lines).
MIN_CHANNELS_BYTES, MAX_CHANNELS_BYTES = 32, 256
# contiguous: a full line of float32 along x; the channels below share their coordinates.
MAX_BLOCK_COLUMNS = 32


@triton.jit
def _split(index, parts):
    """``(index // parts, index % parts)``."""
    return index // parts, index % parts


@triton.jit
def _sample_inside(target, in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """``sample_axis`` at the target position nearest to ``target``, and whether that is it."""
    nearest = tl.minimum(tl.maximum(target, 0), out_size - 1)
    lower, upper, weight = sample_axis(nearest, in_size, out_size, ALIGN_CORNERS, DTYPE)
    return lower, upper, weight, target == nearest


@triton.jit
def _blend(rows, index, weight, scale):
    """``scale * ((1 - weight) * rows[index] + weight * rows[index + 1])``."""
    weight_above, weight_below = 1 - weight, weight
    if scale is not None:
        weight_above *= scale
        weight_below *= scale
    value = rows[0]
    for row in tl.static_range(1, len(rows) - 1):
        value = tl.where(index == row, rows[row], value)
    value *= weight_above
    if len(rows) > 1:
        below = rows[1]
        for row in tl.static_range(1, len(rows) - 1):
            below = tl.where(index == row, rows[row + 1], below)
        value += below * weight_below
    return value


@triton.jit
def _add_offsets(totals, offsets, x, y, channel, channels, height, width, kernel_size, padding):
    """Adds the offset of every tap to the output rows y, y + 1, ... where it falls inside."""
    DTYPE: tl.constexpr = totals[0].dtype
    for ky in range(kernel_size):
        row = tl.zeros(totals[0].shape, dtype=DTYPE)
        for kx in range(kernel_size):
            target_x = x + (kx - padding)
            inside = ((target_x >= 0) & (target_x < width))[:, None]
            tap_channel = ((ky * kernel_size + kx) * channels + channel)[None, :]
            tap_channel = tl.broadcast_to(tap_channel, row.shape)
            mask = inside & (channel < channels)[None, :]
            row += tl.load(offsets + tap_channel, mask=mask, other=0.0).to(DTYPE)
        for run in tl.static_range(len(totals)):
            target_y = y + run + (ky - padding)
            inside = (target_y >= 0) & (target_y < height)
            totals = totals[1:] + (tl.where(inside, totals[0] + row, totals[0]),)
    return totals


@triton.jit
def _add_level(
    totals, level, size, scale, image, x, y, channel, channels, height, width, kernel_size, padding,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
):  # fmt: skip
    """Adds ``scale`` times the upsampled taps to the output rows y, y + 1, ... where inside.

    At one ky these rows read up to ROWS source rows, and a pixel reads COLUMNS source columns: 1
    where sizes are equal.
    """
    DTYPE: tl.constexpr = totals[0].dtype
    taps, stride_n, stride_c, stride_h, stride_w = level
    in_height, in_width = size
    taps += image.to(tl.int64) * stride_n
    for ky in range(kernel_size):
        first, _, _, _ = _sample_inside(y + (ky - padding), in_height, height, ALIGN_CORNERS, DTYPE)

        # Along x: load, interpolate and sum the taps of this kernel row.
        rows = (tl.zeros(totals[0].shape, dtype=DTYPE),) * ROWS
        for kx in range(kernel_size):
            target_x = x + (kx - padding)
            sample = _sample_inside(target_x, in_width, width, ALIGN_CORNERS, DTYPE)
            left, right, weight_x, inside_x = sample  # [BLOCK_X]
            tap_channel = (ky * kernel_size + kx) * channels + channel
            start = taps + (tap_channel.to(tl.int64) * stride_c)[None, :]
            left_start = start + (left.to(tl.int64) * stride_w)[:, None]
            right_start = start + (right.to(tl.int64) * stride_w)[:, None]
            mask = inside_x[:, None] & (channel < channels)[None, :]
            for row in tl.static_range(ROWS):
                source_y = tl.minimum(first + row, in_height - 1)
                offset = source_y.to(tl.int64) * stride_h
                value = tl.load(left_start + offset, mask=mask, other=0.0).to(DTYPE)
                if COLUMNS > 1:
                    right_value = tl.load(right_start + offset, mask=mask, other=0.0).to(DTYPE)
                    value = value * (1 - weight_x)[:, None] + right_value * weight_x[:, None]
                rows = rows[1:] + (rows[0] + value,)

        # Along y: every output row finds the two source rows it reads.
        for run in tl.static_range(len(totals)):
            target_y = y + run + (ky - padding)
            sample = _sample_inside(target_y, in_height, height, ALIGN_CORNERS, DTYPE)
            lower, _, weight, inside = sample  # scalars
            value = _blend(rows, lower - first, weight, scale)
            totals = totals[1:] + (tl.where(inside, totals[0] + value, totals[0]),)
    return totals


@triton.jit(
    do_not_specialize=[
        "sizes", "out_height", "out_width", "height", "width", "kernel_size", "padding",
    ]
)  # fmt: skip
def _forward_kernel(
    out,
    levels,  # of every level: taps and the four strides
    scales,  # of what is there and of every level, or None
    offsets,  # one value per channel of taps, or None
    bias,  # one value per channel, or None
    sizes,  # height and width of every level
    channels, out_height, out_width, height, width,
    kernel_size,  # not a constant: unrolled, the loops over taps would take all registers
    padding, stride_n, stride_c, stride_h, stride_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # one value per level
    ACCUMULATE: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    RUN: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    block, channel_block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    block, x_block = _split(block, tl.cdiv(out_width, BLOCK_X))
    image, y_block = _split(block, tl.cdiv(out_height, RUN))
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    x = x_block * BLOCK_X + tl.arange(0, BLOCK_X)
    y = y_block * RUN
    inside = (x < out_width)[:, None] & (channel < channels)[None, :]  # [BLOCK_X, BLOCK_C]
    out += image.to(tl.int64) * stride_n
    out_offset = (x.to(tl.int64) * stride_w)[:, None] + (channel.to(tl.int64) * stride_c)[None, :]

    # Start from what is there.
    totals = (tl.zeros([BLOCK_X, BLOCK_C], dtype=DTYPE),) * RUN
    for run in tl.static_range(RUN):
        total = totals[0]
        if ACCUMULATE:
            row = tl.minimum(y + run, out_height - 1)
            start = out + row.to(tl.int64) * stride_h
            total = tl.load(start + out_offset, mask=inside, other=0.0).to(DTYPE)
            if scales is not None:
                total *= tl.load(scales).to(DTYPE)
        if bias is not None:
            pointer = bias + tl.broadcast_to(channel[None, :], inside.shape)
            total += tl.load(pointer, mask=inside, other=0.0).to(DTYPE)
        totals = totals[1:] + (total,)

    # Add the taps.
    if offsets is not None:
        totals = _add_offsets(
            totals, offsets, x, y, channel, channels, height, width, kernel_size, padding
        )
    for level in tl.static_range(len(ROWS)):
        scale = None if scales is None else tl.load(scales + 1 + level).to(DTYPE)
        totals = _add_level(
            totals, levels[level], sizes[level], scale, image, x, y, channel, channels, height,
            width, kernel_size, padding, ROWS[level], COLUMNS[level], ALIGN_CORNERS,
        )  # fmt: skip

    # Store.
    for run in tl.static_range(RUN):
        if y + run < out_height:
            start = out + (y + run).to(tl.int64) * stride_h
            tl.store(start + out_offset, totals[run].to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "out_height", "out_width", "in_height", "in_width", "height", "width", "padding",
    ]
)  # fmt: skip
def _backward_kernel(
    grad_out,
    grad_taps,
    scale,  # one value, or None
    channels, out_height, out_width, in_height, in_width, height, width, padding,
    grad_n, grad_c, grad_h, grad_w, stride_n, stride_c, stride_h, stride_w,
    KERNEL_SIZE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, READERS: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = tl.float64 if grad_out.dtype.element_ty == tl.float64 else tl.float32
    block, channel_block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    block, ky = _split(block, KERNEL_SIZE)
    block, x_block = _split(block, tl.cdiv(in_width, BLOCK_X))
    image, y = _split(block, in_height)
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    x = x_block * BLOCK_X + tl.arange(0, BLOCK_X)
    in_channel = (channel < channels)[None, :]
    start = grad_out + image.to(tl.int64) * grad_n + (channel.to(tl.int64) * grad_c)[None, :]

    first_y, last_y = target_range(y, in_height, height, ALIGN_CORNERS, DTYPE)
    first_x, last_x = target_range(x, in_width, width, ALIGN_CORNERS, DTYPE)  # [BLOCK_X]
    # The loop runs as long as the neediest pixel; the others' surplus is masked. A column that the
    # last tap reads at target position v is read by tap kx at v - (KERNEL_SIZE - 1 - kx).
    columns = tl.max(tl.where(x < in_width, last_x - first_x, -1)) + KERNEL_SIZE
    zeros = tl.zeros([BLOCK_X, BLOCK_C], dtype=DTYPE)
    totals = (zeros,) * KERNEL_SIZE
    for group in range(0, last_y - first_y + 1, READERS):
        # The rows of this group: where they are, how wide, and what they weigh.
        none_yet = (0,) * READERS
        row_offsets, row_widths, row_weights = none_yet, none_yet, none_yet
        for reader in tl.static_range(READERS):
            target_y = first_y + group + reader
            row_weight = weight_of(target_y, y, in_height, height, ALIGN_CORNERS, DTYPE)
            grad_y = target_y + (padding - ky)
            reads = (target_y <= last_y) & (row_weight > 0) & (grad_y >= 0) & (grad_y < out_height)
            row_offsets = row_offsets[1:] + (grad_y.to(tl.int64) * grad_h,)
            row_widths = row_widths[1:] + (tl.where(reads, out_width, 0),)  # 0: it is not read
            row_weights = row_weights[1:] + (row_weight,)
        weights = (tl.zeros([BLOCK_X], dtype=DTYPE),) * KERNEL_SIZE  # of the column, by tap
        for column in range(columns):
            # Along y: the rows in this column.
            target_x = first_x + column
            grad_x = target_x + (padding - (KERNEL_SIZE - 1))
            offset = (grad_x.to(tl.int64) * grad_w)[:, None]
            value = zeros
            for reader in tl.static_range(READERS):
                mask = ((grad_x >= 0) & (grad_x < row_widths[reader]))[:, None] & in_channel
                grad = tl.load(start + row_offsets[reader] + offset, mask=mask, other=0.0)
                value += grad.to(DTYPE) * row_weights[reader]
            # Along x: the column moves on from tap to tap.
            weight = weight_of(target_x, x, in_width, width, ALIGN_CORNERS, DTYPE)
            weights = weights[1:] + (tl.where(target_x <= last_x, weight, 0.0),)
            for kx in tl.static_range(KERNEL_SIZE):
                factor = weights[kx][:, None]
                total = tl.where(factor > 0, totals[0] + value * factor, totals[0])
                totals = totals[1:] + (total,)

    grad_taps += image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h
    mask = (x < in_width)[:, None] & in_channel
    total_scale = None if scale is None else tl.load(scale).to(DTYPE)
    for kx in tl.static_range(KERNEL_SIZE):
        total = totals[kx] if scale is None else totals[kx] * total_scale
        tap_channel = (ky * KERNEL_SIZE + kx) * channels + channel
        offset = (x.to(tl.int64) * stride_w)[:, None] + (tap_channel.to(tl.int64) * stride_c)[None]
        tl.store(grad_taps + offset, total.to(grad_taps.dtype.element_ty), mask=mask)


def _blocks(
    columns: int, channels: int, itemsize: int, channels_last: bool, sums: int
) -> tuple[int, int]:
    """``(BLOCK_X, BLOCK_C)`` for threads that hold ``sums`` sums of each of their values."""
    per_thread = max(MAX_SUM_BYTES // max(itemsize, 4) // power_of_two(sums), 1)
    if channels_last:
        if channels % SPECIALIZED_MULTIPLE == 0:  # else every value needs its address
            per_thread = VECTOR_BYTES // itemsize
        # The largest power of two that divides the channels, so that few blocks run over the end.
        block_c = max(channels & -channels, MIN_CHANNELS_BYTES // itemsize)
        block_c = min(block_c, MAX_CHANNELS_BYTES // itemsize, power_of_two(channels))
        return min(THREADS * per_thread // block_c, power_of_two(columns)), block_c
    block_x = min(MAX_BLOCK_COLUMNS, power_of_two(columns))
    return block_x, min(THREADS * per_thread // block_x, power_of_two(channels))


def _source_rows(in_height: int, height: int, run: int) -> int:
    """How many source rows ``run`` neighbouring target rows read at most."""
    if run == 1:
        return 1 if in_height == height else 2
    slack = 0.001 + in_height * 1e-6  # more than rounding moves a coordinate
    return math.floor((run - 1) * in_height / height + slack) + 3


def _reader_rows(in_height: int, height: int, align_corners: bool) -> int:
    """How many target rows may read a source row, but ``MAX_READERS`` at most."""
    readers = cdiv(2 * height, in_height)
    if align_corners or height % (2 * in_height):  # the range is not exact
        readers += 1
    return min(readers, MAX_READERS)


def _programs(
    images: int, rows: int, run: int, columns: int, channels: int, blocks: tuple[int, int]
) -> int:
    return images * cdiv(rows, run) * cdiv(columns, blocks[0]) * cdiv(channels, blocks[1])


def forward(
    taps: Tensor, offsets: Tensor | None, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """The sum of taps (N, k * k * C, h, w): (N, C, H + 2 * padding - (k - 1), likewise W)."""
    margin = 2 * padding - (kernel_size - 1)
    out = torch.empty(
        (taps.shape[0], taps.shape[1] // kernel_size**2, height + margin, width + margin),
        dtype=taps.dtype,
        device=taps.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    geometry = (height, width, kernel_size, padding, align_corners, channels_last)
    forward_into(out, [taps], None, offsets, None, False, *geometry)
    return out


@planned
def _forward_launch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...],
    sizes: tuple[tuple[int, int], ...], accumulate: bool, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> Launch:  # fmt: skip
    """``sizes``: height and width of every level."""
    batch, channels, out_height, out_width = shape
    run = RUN if all(2 * in_height <= height for in_height, _ in sizes) else 1
    blocks = _blocks(out_width, channels, dtype.itemsize, channels_last, run)
    constants = {
        "ROWS": tuple(_source_rows(in_height, height, run) for in_height, _ in sizes),
        "COLUMNS": tuple(1 if in_width == width else 2 for _, in_width in sizes),
        "ACCUMULATE": accumulate,
        "ALIGN_CORNERS": align_corners,
        "RUN": run,
        "BLOCK_X": blocks[0],
        "BLOCK_C": blocks[1],
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
    }
    integers = (
        sizes, channels, out_height, out_width, height, width, kernel_size, padding, *stride,
    )  # fmt: skip
    programs = _programs(batch, out_height, run, out_width, channels, blocks)
    return Launch(_forward_kernel, programs, device, integers, constants)


def forward_into(
    out: Tensor, taps: Sequence[Tensor], scales: Tensor | None, offsets: Tensor | None,
    bias: Tensor | None, accumulate: bool, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> None:  # fmt: skip
    """``out = scales[0] * out + bias + sum_i scales[1 + i] * tap_sum(taps[i]) + offsets inside``.

    Without ``accumulate`` what is in ``out`` is not read. ``scales`` is read on the device, and
    all levels add up in one launch: ``out`` is rounded once.
    """
    if out.numel() == 0:
        return
    launch = _forward_launch(
        out.device, out.dtype, out.shape, out.stride(),
        tuple([(level.shape[2], level.shape[3]) for level in taps]),
        accumulate, height, width, kernel_size, padding, align_corners, channels_last,
    )  # fmt: skip
    levels = tuple([(level, *level.stride()) for level in taps])
    launch(out, levels, *[None if v is None else v.contiguous() for v in (scales, offsets, bias)])


@planned
def _backward_launch(
    device: torch.device, dtype: torch.dtype, out_shape: tuple[int, ...],
    out_stride: tuple[int, ...], in_height: int, in_width: int, stride: tuple[int, ...],
    height: int, width: int, kernel_size: int, padding: int, align_corners: bool,
    channels_last: bool,
) -> Launch:  # fmt: skip
    batch, channels, out_height, out_width = out_shape
    sums = kernel_size + 1  # of every tap and of the column
    blocks = _blocks(in_width, channels, dtype.itemsize, channels_last, sums)
    constants = {
        "KERNEL_SIZE": kernel_size,
        "ALIGN_CORNERS": align_corners,
        "READERS": _reader_rows(in_height, height, align_corners),
        "BLOCK_X": blocks[0],
        "BLOCK_C": blocks[1],
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
    }
    integers = (
        channels, out_height, out_width, in_height, in_width, height, width, padding,
        *out_stride, *stride,
    )  # fmt: skip
    programs = _programs(batch * kernel_size, in_height, 1, in_width, channels, blocks)
    return Launch(_backward_kernel, programs, device, integers, constants)


def backward(
    grad_output: Tensor, in_height: int, in_width: int, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the taps, (N, k * k * C, in_height, in_width)."""
    batch, channels = grad_output.shape[:2]
    grad_taps = torch.empty(
        (batch, kernel_size**2 * channels, in_height, in_width),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    geometry = (height, width, kernel_size, padding, align_corners, channels_last)
    backward_into(grad_taps, grad_output, None, *geometry)
    return grad_taps


def backward_into(
    grad_taps: Tensor, grad_output: Tensor, scale: Tensor | None, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> None:  # fmt: skip
    """``grad_taps = scale * backward(grad_output)``; ``scale`` is read on the device."""
    if grad_taps.numel() == 0:
        return
    launch = _backward_launch(
        grad_taps.device, grad_taps.dtype, grad_output.shape, grad_output.stride(),
        *grad_taps.shape[2:], grad_taps.stride(), height, width, kernel_size, padding,
        align_corners, channels_last,
    )  # fmt: skip
    launch(grad_output, grad_taps, scale)
