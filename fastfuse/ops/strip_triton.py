"""Strips of upsampled images, for Triton kernels that reduce over channels, here called classes.

A strip is a few target rows, close enough to read three source rows at most, by a run of columns by
a block of classes. Source rows are interpolated along x once for all of its rows. Threads lie along
what is contiguous in memory: columns, or the classes in channels_last. Kernels walk over the blocks
of classes, and each place in a block keeps what it needs of the classes that came by: the places
are brought together once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.bilinear_triton import NUM_WARPS, THREADS, between, sample_axis
from fastfuse.ops.launch_triton import cdiv, power_of_two

__all__ = [
    "add_exponential",
    "are_classes_innermost",
    "class_axis",
    "column_run",
    "lanes",
    "load_strip",
    "log_sum_exp",
    "no_exponentials",
    "sample_strip",
    "strip",
    "strip_filled",
    "strip_shape",
    "strips_of",
]

# Target rows of a strip at most, and values that a thread has of each: 24 loads at once, and 16
# running maxima and sums. (In float64 it has one of each row.)
MAX_ROWS, VALUES_PER_ROW = 4, 4
# Three programs of four warps per multiprocessor. Without a limit the assembler may spill to reach
# one it likes.
MAX_REGISTERS = 168
# channels_last: threads along the classes; the fewest may have no class in the last block.
MIN_LANES, MAX_LANES = 8, 32


@triton.jit
def lanes(COUNT: tl.constexpr):
    """0 .. COUNT - 1, for one thread each: a strip in vectors would change threads on its way."""
    return tl.max_contiguous(tl.arange(0, COUNT), 1)


@triton.jit
def strip(height, width, ROWS: tl.constexpr, BLOCK_X: tl.constexpr):
    """``(image, y, x)`` of this program: int64 scalar, [ROWS], [BLOCK_X]."""
    x_blocks = tl.cdiv(width, BLOCK_X)
    row_blocks = tl.cdiv(height, ROWS)
    program = tl.program_id(0)
    block = program // x_blocks
    y = (block % row_blocks) * ROWS + tl.arange(0, ROWS)
    x = (program % x_blocks) * BLOCK_X + lanes(BLOCK_X)
    return (block // row_blocks).to(tl.int64), y, x


# The axes of a strip are [rows, columns, classes] in channels_last, else [classes, rows, columns].


@triton.jit
def class_axis(block, CHANNELS_LAST: tl.constexpr):
    return block[None, None, :] if CHANNELS_LAST else block[:, None, None]


@triton.jit
def row_axis(block, CHANNELS_LAST: tl.constexpr):
    return block[:, None, None] if CHANNELS_LAST else block[None, :, None]


@triton.jit
def sample_strip(
    y, x, in_height, in_width, height, width, stride_h, stride_w,
    ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What ``load_strip`` asks: offsets of three source rows and of the columns' two, and weights.

    Rows are as in ``strip_shape``: each reads the first two source rows, or is ``second``.
    """
    lower, _, weight_y = sample_axis(y, in_height, height, ALIGN_CORNERS, DTYPE)
    first = tl.min(lower, axis=0)
    last = tl.cast(in_height - 1, tl.int32)
    top = first.to(tl.int64) * stride_h
    middle = tl.minimum(first + 1, last).to(tl.int64) * stride_h
    bottom = tl.minimum(first + 2, last).to(tl.int64) * stride_h
    left, right, weight_x = sample_axis(x, in_width, width, ALIGN_CORNERS, DTYPE)
    left = left.to(tl.int64) * stride_w
    right = right.to(tl.int64) * stride_w
    return top, middle, bottom, left, right, lower > first, weight_y, weight_x


@triton.jit
def _load_row(start, left, right, weight, mask, SAME_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    value = tl.load(start + left, mask=mask, other=0.0).to(DTYPE)
    if not SAME_SIZE:
        right = tl.load(start + right, mask=mask, other=0.0).to(DTYPE)
        value = between(value, right, weight)
    return value


@triton.jit
def load_strip(
    image_start,
    classes,  # [BLOCK_C]
    in_classes,
    stride_c,
    in_row,  # [BLOCK_X]
    samples,  # of sample_strip
    SAME_SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Classes of a strip, upsampled; those beyond the last are -inf."""
    top, middle, bottom, left, right, second, weight_y, weight_x = samples
    COLUMN: tl.constexpr = 1 if CHANNELS_LAST else 0
    ROW: tl.constexpr = 0 if CHANNELS_LAST else 1
    start = image_start + tl.expand_dims(classes.to(tl.int64) * stride_c, 1 - COLUMN)
    mask = tl.expand_dims(in_classes, 1 - COLUMN) & tl.expand_dims(in_row, COLUMN)
    left = tl.expand_dims(left, COLUMN)
    right = tl.expand_dims(right, COLUMN)
    weight_x = tl.expand_dims(weight_x, COLUMN)
    value = _load_row(start + top, left, right, weight_x, mask, SAME_SIZE, DTYPE)
    value = tl.expand_dims(value, ROW)
    if not SAME_SIZE:
        lower_row = _load_row(start + middle, left, right, weight_x, mask, False, DTYPE)
        lower_row = tl.expand_dims(lower_row, ROW)
        weight_y = row_axis(weight_y, CHANNELS_LAST)
        if ROWS > 1:
            below = _load_row(start + bottom, left, right, weight_x, mask, False, DTYPE)
            second = row_axis(second, CHANNELS_LAST)
            value = tl.where(second, lower_row, value)
            lower_row = tl.where(second, tl.expand_dims(below, ROW), lower_row)
        value = between(value, lower_row, weight_y)
    return tl.where(class_axis(in_classes, CHANNELS_LAST), value, float("-inf"))


@triton.jit
def strip_filled(
    fill, ROWS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    if CHANNELS_LAST:
        return tl.full([ROWS, BLOCK_X, BLOCK_C], fill, dtype=DTYPE)
    else:
        return tl.full([BLOCK_C, ROWS, BLOCK_X], fill, dtype=DTYPE)


@triton.jit
def no_exponentials(
    ROWS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``(top, total)`` to begin with: the lowest finite number, for -inf less -inf is NaN."""
    is_double: tl.constexpr = DTYPE == tl.float64  # noqa: SIM300
    LOWEST: tl.constexpr = -1.7976931348623157e308 if is_double else -3.4028234663852886e38
    top = strip_filled(LOWEST, ROWS, BLOCK_X, BLOCK_C, CHANNELS_LAST, DTYPE)
    return top, strip_filled(0, ROWS, BLOCK_X, BLOCK_C, CHANNELS_LAST, DTYPE)


@triton.jit
def add_exponential(value, top, total):
    """``(top, total)`` with ``value``: the largest value, and the sum of exp(value - top).

    Each place has its own, and one exponential whichever of the two is larger.
    """
    step = value - top
    decay = tl.exp(-tl.abs(step))
    return tl.maximum(top, value), tl.where(step > 0, total * decay + 1, total + decay)


@triton.jit
def log_sum_exp(top, total, AXIS: tl.constexpr):
    """``(largest, sum of exp(value - largest))`` along an axis of what ``add_exponential`` made."""
    largest = tl.max(top, axis=AXIS)
    # Not a product, which could be fused with the first sum: each thread would round its own, and
    # threads that have the same sum would differ in it.
    total = tl.fma(total, tl.exp(top - tl.expand_dims(largest, AXIS)), 0.0)
    return largest, tl.sum(total, axis=AXIS)


def are_classes_innermost(logits: Tensor) -> bool:
    """Whether to walk ``logits`` as channels_last."""
    _, classes, _, width = logits.shape
    return classes > 1 and 0 < logits.stride(1) < logits.stride(3 if width > 1 else 2)


def column_run(width: int) -> int:
    """Columns of a program, a thread each: of the runs that leave the fewest idle, the longest."""
    return min((THREADS, THREADS // 2, THREADS // 4), key=lambda run: -width % run)


def strip_shape(
    itemsize: int, classes: int, in_size: tuple[int, int], size: tuple[int, int],
    align_corners: bool, channels_last: bool,
) -> dict[str, int]:  # fmt: skip
    """``ROWS``, ``BLOCK_X`` and ``BLOCK_C`` of a strip of ``size``, and the options of its launch.

    (ROWS - 1) / ratio < 1: ``lower`` of the rows of a strip differs by one at most.
    """
    values = 1 if itemsize == 8 else VALUES_PER_ROW
    corner = int(align_corners)
    ratio = (size[0] - corner) // max(in_size[0] - corner, 1)
    rows = 1 << (min(max(ratio, 1), MAX_ROWS).bit_length() - 1)
    if in_size == size:
        rows = 1
    if channels_last:
        # The largest power of two that divides the classes, so that few blocks run over the end.
        block_c = min(max(classes & -classes, MIN_LANES), MAX_LANES, power_of_two(classes))
        block_x = min(THREADS * values // block_c, power_of_two(size[1]))
        warps = NUM_WARPS
    else:
        block_c = min(values, power_of_two(classes))
        block_x = column_run(size[1])
        warps = block_x // 32
    return {
        "ROWS": rows,
        "BLOCK_X": block_x,
        "BLOCK_C": block_c,
        "num_warps": warps,
        "maxnreg": MAX_REGISTERS,
    }


def strips_of(batch: int, size: tuple[int, int], shape: dict[str, int]) -> int:
    """How many strips there are, each for a program."""
    return batch * cdiv(size[0], shape["ROWS"]) * cdiv(size[1], shape["BLOCK_X"])
