"""The Triton kernels of depthwise_conv2d: what a program does is told in ``triton.py``."""
# ruff: noqa: RUF005  (kernels keep a block per row in a tuple, and Triton knows no unpacking)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_weight_kernel", "forward_kernel", "reduce_kernel"]


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
def forward_kernel(
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
def backward_weight_kernel(
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
def reduce_kernel(
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
