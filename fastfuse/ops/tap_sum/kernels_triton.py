"""The Triton kernels of tap_sum: what a program does, and why, is told in ``triton.py``."""
# ruff: noqa: RUF005  (kernels keep a block per row in a tuple, and Triton knows no unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from fastfuse.ops.bilinear_triton import sample_axis, target_range, weight_of
from fastfuse.ops.split_triton import part_of, split_of

__all__ = ["backward_kernel", "forward_kernel"]


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
def _add_columns(
    rows, taps, first, stride_c, stride_h, stride_w, ky, x, channel, channels, in_height, in_width,
    width, kernel_size, padding, COLUMNS: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
):  # fmt: skip
    """Adds to ``rows`` what the taps of kernel row ``ky`` give along x at the source rows
    first, first + 1, ...; a pixel reads COLUMNS source columns: 1 where sizes are equal."""
    DTYPE: tl.constexpr = rows[0].dtype
    for kx in range(kernel_size):
        target_x = x + (kx - padding)
        sample = _sample_inside(target_x, in_width, width, ALIGN_CORNERS, DTYPE)
        left, right, weight_x, inside_x = sample  # [BLOCK_X]
        tap_channel = (ky * kernel_size + kx) * channels + channel
        start = taps + (tap_channel.to(tl.int64) * stride_c)[None, :]
        left_start = start + (left.to(tl.int64) * stride_w)[:, None]
        right_start = start + (right.to(tl.int64) * stride_w)[:, None]
        mask = inside_x[:, None] & (channel < channels)[None, :]
        left_weight, right_weight = (1 - weight_x)[:, None], weight_x[:, None]
        for row in tl.static_range(len(rows)):
            source_y = tl.minimum(tl.maximum(first + row, 0), in_height - 1)
            offset = source_y.to(tl.int64) * stride_h
            total = rows[0]
            value = tl.load(left_start + offset, mask=mask, other=0.0).to(DTYPE)
            if COLUMNS > 1:
                total += value * left_weight
                value = tl.load(right_start + offset, mask=mask, other=0.0).to(DTYPE)
                value *= right_weight
            rows = rows[1:] + (total + value,)
    return rows


@triton.jit
def _add_level(
    totals, level, size, scale, image, x, y, channel, channels, height, width, kernel_size, padding,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
):  # fmt: skip
    """Adds ``scale`` times the upsampled taps to the output rows y, y + 1, ... where inside.

    At one ky these rows read up to ROWS source rows.
    """
    DTYPE: tl.constexpr = totals[0].dtype
    taps, stride_n, stride_c, stride_h, stride_w = level
    in_height, in_width = size
    taps += image.to(tl.int64) * stride_n
    for ky in range(kernel_size):
        first, _, _, _ = _sample_inside(y + (ky - padding), in_height, height, ALIGN_CORNERS, DTYPE)
        rows = _add_columns(
            (tl.zeros(totals[0].shape, dtype=DTYPE),) * ROWS, taps, first, stride_c, stride_h,
            stride_w, ky, x, channel, channels, in_height, in_width, width, kernel_size, padding,
            COLUMNS, ALIGN_CORNERS,
        )  # fmt: skip
        # Along y: every output row finds the two source rows it reads.
        for run in tl.static_range(len(totals)):
            target_y = y + run + (ky - padding)
            sample = _sample_inside(target_y, in_height, height, ALIGN_CORNERS, DTYPE)
            lower, _, weight, inside = sample  # scalars
            total = totals[0]
            if inside:
                total += _blend(rows, lower - first, weight, scale)
            totals = totals[1:] + (total,)
    return totals


@triton.jit
def _add_blended(
    total, rows, scale, y, height, SHIFT: tl.constexpr, FIRST: tl.constexpr, RATIO: tl.constexpr,
    MAY_BE_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Adds ``scale`` times what target row y + SHIFT reads of the source rows FIRST, ..."""
    INDEX: tl.constexpr = (2 * SHIFT + 1 + RATIO) // (2 * RATIO) - 1 - FIRST
    BELOW: tl.constexpr = (2 * SHIFT + 1 + RATIO) % (2 * RATIO) / (2 * RATIO)
    ABOVE: tl.constexpr = 1 - BELOW
    if scale is None:
        result = total + rows[INDEX] * ABOVE + rows[INDEX + 1] * BELOW
    else:
        result = total + rows[INDEX] * (scale * ABOVE) + rows[INDEX + 1] * (scale * BELOW)
    if MAY_BE_OUTSIDE:
        result = tl.where((y + SHIFT >= 0) & (y + SHIFT < height), result, total)
    return result


@triton.jit
def _add_kernel_row(
    totals, taps, stride_c, stride_h, stride_w, scale, x, y, channel, channels, in_height, in_width,
    height, width, kernel_size, SHIFT: tl.constexpr, RATIO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The taps of the kernel row whose target row is y + SHIFT for the first of the output rows."""
    DTYPE: tl.constexpr = totals[0].dtype
    # The lower source row of target row y + q is so many from y // RATIO.
    FIRST: tl.constexpr = (2 * SHIFT + 1 + RATIO) // (2 * RATIO) - 1
    LAST: tl.constexpr = (2 * (SHIFT + len(totals) - 1) + 1 + RATIO) // (2 * RATIO)
    rows = _add_columns(
        (tl.zeros(totals[0].shape, dtype=DTYPE),) * (LAST - FIRST + 1), taps, y // RATIO + FIRST,
        stride_c, stride_h, stride_w, SHIFT + 1, x, channel, channels, in_height, in_width, width,
        kernel_size, 1, COLUMNS, False,
    )  # fmt: skip
    for run in tl.static_range(len(totals)):
        total = _add_blended(
            totals[0], rows, scale, y, height, run + SHIFT, FIRST, RATIO,
            run + SHIFT < 0 or SHIFT > 0,
        )  # fmt: skip
        totals = totals[1:] + (total,)
    return totals


@triton.jit
def _add_level_of_ratio(
    totals, level, size, scale, image, x, y, channel, channels, height, width, kernel_size,
    RATIO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``_add_level`` of a 3x3 kernel where the height is RATIO times the source's, RATIO divides y,
    corners are not aligned and the output has the target's size: the compiler knows which rows are
    read, and their weights."""
    taps, stride_n, stride_c, stride_h, stride_w = level
    in_height, in_width = size
    taps += image.to(tl.int64) * stride_n
    for ky in tl.static_range(3):
        # Always, which the compiler does not know: else it would put off all sums until the last.
        if ky < kernel_size:
            totals = _add_kernel_row(
                totals, taps, stride_c, stride_h, stride_w, scale, x, y, channel, channels,
                in_height, in_width, height, width, kernel_size, ky - 1, RATIO, COLUMNS,
            )  # fmt: skip
    return totals


@triton.jit(
    do_not_specialize=[
        "sizes", "out_height", "out_width", "height", "width", "kernel_size", "padding",
    ]
)  # fmt: skip
def forward_kernel(
    out,
    levels,  # of every level: taps and the four strides
    scales,  # of what is there and of every level, or None
    offsets,  # one value per channel of taps, or None
    bias,  # one value per channel, or None
    sizes,  # height and width of every level
    channels, out_height, out_width, height, width,
    kernel_size,  # not a constant: unrolled, the loops over taps would take all registers
    padding, stride_n, stride_c, stride_h, stride_w,
    RATIOS: tl.constexpr,  # of every level: that of heights for ``_add_level_of_ratio``, or 0
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

    totals = (tl.zeros([BLOCK_X, BLOCK_C], dtype=DTYPE),) * RUN
    if offsets is not None:
        totals = _add_offsets(
            totals, offsets, x, y, channel, channels, height, width, kernel_size, padding
        )
    for level in tl.static_range(len(ROWS)):
        scale = None if scales is None else tl.load(scales + 1 + level).to(DTYPE)
        if RATIOS[level] > 0:
            totals = _add_level_of_ratio(
                totals, levels[level], sizes[level], scale, image, x, y, channel, channels, height,
                width, kernel_size, RATIOS[level], COLUMNS[level],
            )  # fmt: skip
        else:
            totals = _add_level(
                totals, levels[level], sizes[level], scale, image, x, y, channel, channels, height,
                width, kernel_size, padding, ROWS[level], COLUMNS[level], ALIGN_CORNERS,
            )  # fmt: skip

    # Add what is there, and store.
    base = tl.load(scales).to(DTYPE) if ACCUMULATE and scales is not None else None
    for run in tl.static_range(RUN):
        # A condition would make the compiler put off the sums until there.
        start = out + (y + run).to(tl.int64) * stride_h
        mask = inside & (y + run < out_height)
        total = totals[run]
        if ACCUMULATE:
            there = tl.load(start + out_offset, mask=mask, other=0.0).to(DTYPE)
            total += there if base is None else there * base
        if bias is not None:
            pointer = bias + tl.broadcast_to(channel[None, :], inside.shape)
            total += tl.load(pointer, mask=inside, other=0.0).to(DTYPE)
        tl.store(start + out_offset, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "out_height", "out_width", "in_height", "in_width", "height", "width", "padding",
        "values",
    ]
)  # fmt: skip
def backward_kernel(
    grad_out,
    grad_taps,
    scale,  # one value, or None
    channels, out_height, out_width, in_height, in_width, height, width, padding,
    grad_n, grad_c, grad_h, grad_w, stride_n, stride_c, stride_h, stride_w,
    splits,  # of the target rows, each with a map of its own in grad_taps
    values,  # of a map
    KERNEL_SIZE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, READERS: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = tl.float64 if grad_out.dtype.element_ty == tl.float64 else tl.float32
    program, split = split_of(splits)
    block, channel_block = _split(program, tl.cdiv(channels, BLOCK_C))
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
    first, end = part_of(split, splits, last_y - first_y + 1, READERS)
    for group in range(first, end, READERS):
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

    grad_taps += (
        split.to(tl.int64) * values + image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h
    )
    mask = (x < in_width)[:, None] & in_channel
    total_scale = None if scale is None else tl.load(scale).to(DTYPE)
    for kx in tl.static_range(KERNEL_SIZE):
        total = totals[kx] if scale is None else totals[kx] * total_scale
        tap_channel = (ky * KERNEL_SIZE + kx) * channels + channel
        offset = (x.to(tl.int64) * stride_w)[:, None] + (tap_channel.to(tl.int64) * stride_c)[None]
        tl.store(grad_taps + offset, total.to(grad_taps.dtype.element_ty), mask=mask)
