"""upsample_cross_entropy on CUDA devices: Triton kernels and their launchers.

Forward: programs own strips of target pixels and walk over the classes with running maxima and sums
of exponentials; the target's logit is loaded by itself at the end. Backward: programs own a few
rows of source pixels by a block of classes, a column per thread, and walk down the target rows.
What lies between two source rows is computed once, for both; along x it is computed by both columns
that it counts for. Sums have a fixed order and there are no atomics. The upsampled logits, computed
again from the classes' log-sum-exp, are never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.bilinear_triton import (
    between,
    check_plane,
    load_interpolated,
    sample_axis,
    target_range,
    weight_of,
)
from fastfuse.ops.launch_triton import Launch, cdiv, memory_format, planned, power_of_two
from fastfuse.ops.strip_triton import (
    add_exponential,
    are_classes_innermost,
    class_axis,
    column_run,
    lanes,
    load_strip,
    log_sum_exp,
    no_exponentials,
    sample_strip,
    strip,
    strip_filled,
    strip_shape,
    strips_of,
)

__all__ = ["backward", "forward"]

NAME = "upsample_cross_entropy"

# Backward: source rows of a program, which computes the target rows above the first as the one
# above does; classes of a thread, that share a target pixel's coordinates (float64: half); and a
# limit without which the assembler may spill to reach one it likes.
SOURCE_ROWS, CLASSES, MAX_REGISTERS = 8, 4, 168


@triton.jit
def _load_target(target, offset, mask, classes, ignore_index):
    """``(class, is ignored, is a class)`` of pixels; the class is 0 where there is none."""
    label = tl.load(target + offset, mask=mask, other=0)
    is_class = (label >= 0) & (label < classes)
    return tl.where(is_class, label, 0).to(tl.int32), label == ignore_index, is_class


@triton.jit(do_not_specialize=["ignore_index", "in_height", "in_width", "height", "width"])
def _forward_kernel(
    logits,
    target,
    weight,  # one value per class, or None
    weight_sum,  # None without weight or smoothing
    loss,
    logsumexp,
    ignore_index,
    classes,
    in_height,
    in_width,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    SMOOTHING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = loss.dtype.element_ty
    AXIS: tl.constexpr = 2 if CHANNELS_LAST else 0
    image, y, x = strip(height, width, ROWS, BLOCK_X)
    samples = sample_strip(
        y, x, in_height, in_width, height, width, stride_h, stride_w, ALIGN_CORNERS, DTYPE
    )
    image_start = logits + image * stride_n
    place = lanes(BLOCK_C)
    top, total = no_exponentials(ROWS, BLOCK_X, BLOCK_C, CHANNELS_LAST, DTYPE)
    if SMOOTHING > 0:
        weighted = strip_filled(0, ROWS, BLOCK_X, BLOCK_C, CHANNELS_LAST, DTYPE)
    for start in range(0, classes, BLOCK_C):
        in_classes = start + place < classes
        value = load_strip(
            image_start, start + place, in_classes, stride_c, x < width, samples, SAME_SIZE,
            CHANNELS_LAST, ROWS, DTYPE,
        )  # fmt: skip
        top, total = add_exponential(value, top, total)
        if SMOOTHING > 0:
            if weight is not None:
                factor = tl.load(weight + start + place, mask=in_classes, other=1.0)
                value *= class_axis(factor, CHANNELS_LAST)
            weighted += tl.where(class_axis(in_classes, CHANNELS_LAST), value, 0.0)
    top, total = log_sum_exp(top, total, AXIS)
    log_sum = top + tl.log(total)  # [ROWS, BLOCK_X]

    # The target's logit and weight.
    mask = (y < height)[:, None] & (x < width)[None, :]
    offset = (image * height + y)[:, None] * width + x[None, :]
    label, ignored, is_class = _load_target(target, offset, mask, classes, ignore_index)
    value = load_interpolated(
        image_start + (label.to(tl.int64) * stride_c)[:, None], y[:, None], x[None, :],
        mask[:, None], in_height, in_width, height, width, stride_h, stride_w, ALIGN_CORNERS,
        SAME_SIZE, DTYPE,
    )  # fmt: skip
    result = log_sum - tl.reshape(value, [ROWS, BLOCK_X])
    if weight is not None:
        result *= tl.load(weight + label)
    if SMOOTHING > 0:
        factors = tl.load(weight_sum) if weight is not None else tl.cast(classes, DTYPE)
        # Not a product, which could be fused: of one class, the difference is exactly zero.
        smooth = tl.fma(log_sum, factors, 0.0) - tl.sum(weighted, axis=AXIS)
        result = (1 - SMOOTHING) * result + smooth * (SMOOTHING / tl.cast(classes, DTYPE))
    result = tl.where(is_class, result, float("nan"))
    tl.store(loss + offset, tl.where(ignored, 0.0, result), mask=mask)
    tl.store(logsumexp + offset, log_sum, mask=mask)


@triton.jit
def _load_between(above, below, column, weight, mask, DTYPE: tl.constexpr):
    """Columns of two source rows, interpolated along y. # [BLOCK_C, BLOCK_X]"""
    upper = tl.load(above + column[None, :], mask=mask, other=0.0).to(DTYPE)
    lower = tl.load(below + column[None, :], mask=mask, other=0.0).to(DTYPE)
    return between(upper, lower, weight)


@triton.jit(do_not_specialize=["ignore_index", "in_height", "in_width", "height", "width"])
def _backward_kernel(
    grad,
    logits,  # contiguous
    target,
    weight,  # one value per class, or None
    weight_sum,  # None without weight or smoothing
    logsumexp,
    grad_logits,
    ignore_index,
    classes,
    in_height,
    in_width,
    height,
    width,
    grad_stride_n,
    grad_stride_h,
    grad_stride_w,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    SMOOTHING: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    SOURCE_ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = logsumexp.dtype.element_ty
    x_blocks = tl.cdiv(in_width, BLOCK_X)
    class_blocks = tl.cdiv(classes, BLOCK_C)
    row_blocks = tl.cdiv(in_height, SOURCE_ROWS)
    program = tl.program_id(0)
    block = program // x_blocks
    source_x = (program % x_blocks) * BLOCK_X + lanes(BLOCK_X)
    class_ = (block % class_blocks) * BLOCK_C + lanes(BLOCK_C)
    block = block // class_blocks
    first_row = (block % row_blocks) * SOURCE_ROWS
    image = (block // row_blocks).to(tl.int64)

    in_row = source_x < in_width
    in_classes = class_ < classes
    mask = in_classes[:, None] & in_row[None, :]  # [BLOCK_C, BLOCK_X]
    column = tl.minimum(source_x, in_width - 1)
    left_column = tl.maximum(column - 1, 0)
    right_column = tl.minimum(column + 1, in_width - 1)
    plane = tl.cast(in_height, tl.int64) * in_width
    start = logits + ((image * classes + class_) * plane)[:, None]
    out_start = grad_logits + image * out_stride_n + source_x.to(tl.int64)[None, :] * out_stride_w
    out_start += (class_.to(tl.int64) * out_stride_c)[:, None]
    if SAME_SIZE:
        first_x, last_x = column, column
        columns = 1
    else:
        first_x, last_x = target_range(column, in_width, width, ALIGN_CORNERS, DTYPE)
        # The loop runs as long as the neediest column; the others' surplus is masked.
        columns = tl.max(last_x - first_x + 1, axis=0)
    if SMOOTHING > 0:
        share = SMOOTHING / tl.cast(classes, DTYPE)
        if weight is not None:
            factors = tl.load(weight_sum)
            smooth = share * tl.load(weight + class_, mask=in_classes, other=0.0)[:, None]
        else:
            factors = tl.cast(classes, DTYPE)
            smooth = share

    lower_sum = tl.zeros([BLOCK_C, BLOCK_X], dtype=DTYPE)
    last_row = tl.minimum(first_row + SOURCE_ROWS, in_height)
    for row in range(tl.maximum(first_row - 1, 0), last_row):
        row = tl.cast(row, tl.int32)  # the interpreter's is a number of Python, as y below
        upper_sum = lower_sum
        lower_sum = tl.zeros([BLOCK_C, BLOCK_X], dtype=DTYPE)
        first_y, last_y = target_range(row, in_height, height, ALIGN_CORNERS, DTYPE)
        for y in range(first_y, last_y + 1):
            y = tl.cast(y, tl.int32)
            lower, upper, weight_y = sample_axis(y, in_height, height, ALIGN_CORNERS, DTYPE)
            if lower == row:
                here = start + row.to(tl.int64) * in_width
                if SAME_SIZE:
                    value = tl.load(here + column[None, :], mask=mask, other=0.0).to(DTYPE)
                else:  # loaded for every target row: all six would take the registers of the sums
                    below = start + upper.to(tl.int64) * in_width
                    at_left = _load_between(here, below, left_column, weight_y, mask, DTYPE)
                    at_middle = _load_between(here, below, column, weight_y, mask, DTYPE)
                    at_right = _load_between(here, below, right_column, weight_y, mask, DTYPE)
                total = tl.zeros([BLOCK_C, BLOCK_X], dtype=DTYPE)
                pixel_row = (image * height + y) * width
                grad_row = grad + image * grad_stride_n + y.to(tl.int64) * grad_stride_h
                for tap in range(columns):
                    x = first_x + tap
                    reads = in_row & (x <= last_x)
                    if not SAME_SIZE:
                        lower_x, _, weight_x = sample_axis(x, in_width, width, ALIGN_CORNERS, DTYPE)
                        counts = weight_of(x, column, in_width, width, ALIGN_CORNERS, DTYPE)
                        reads = reads & (counts > 0)
                        is_right = (lower_x == column)[None, :]
                        left = tl.where(is_right, at_middle, at_left)
                        right = tl.where(is_right, at_right, at_middle)
                        value = between(left, right, weight_x[None, :])
                    label, ignored, is_class = _load_target(
                        target, pixel_row + x, reads, classes, ignore_index
                    )
                    log_sum = tl.load(logsumexp + pixel_row + x, mask=reads, other=0.0)
                    g = tl.load(grad_row + x.to(tl.int64) * grad_stride_w, mask=reads, other=0.0)
                    g = tl.where(ignored, 0.0, tl.where(is_class, g.to(DTYPE), float("nan")))
                    if not SAME_SIZE:
                        g *= counts
                    hit = g
                    if weight is not None:
                        hit *= tl.load(weight + label, mask=reads, other=0.0)
                    everywhere = hit
                    if SMOOTHING > 0:
                        hit *= 1 - SMOOTHING
                        everywhere = hit + g * share * factors
                    change = tl.exp(value - log_sum[None, :]) * everywhere[None, :]
                    change -= tl.where(class_[:, None] == label[None, :], hit[None, :], 0.0)
                    if SMOOTHING > 0:
                        change -= g[None, :] * smooth
                    total += tl.where(reads[None, :], change, 0.0)
                upper_sum += total * (1 - weight_y)
                lower_sum += tl.where(weight_y > 0, total * weight_y, 0.0)  # total may be NaN
        if row == in_height - 1:  # the two rows are one
            upper_sum += lower_sum
        if row >= first_row:
            value = upper_sum.to(grad_logits.dtype.element_ty)
            tl.store(out_start + row.to(tl.int64) * out_stride_h, value, mask=mask)


def sum_of(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return weight.sum() if weight is not None and label_smoothing > 0 else None


@planned
def _forward_launch(
    device: torch.device, dtype: torch.dtype, logits_shape: tuple[int, ...],
    stride: tuple[int, ...], height: int, width: int, ignore_index: int, label_smoothing: float,
    align_corners: bool, channels_last: bool,
) -> Launch:  # fmt: skip
    check_plane(NAME, height, width)
    batch, classes, in_height, in_width = logits_shape
    in_size, size = (in_height, in_width), (height, width)
    shape = strip_shape(dtype.itemsize, classes, in_size, size, align_corners, channels_last)
    constants = {
        "SMOOTHING": label_smoothing,
        "ALIGN_CORNERS": align_corners,
        "CHANNELS_LAST": channels_last,
        "SAME_SIZE": in_size == size,
        **shape,
    }
    integers = (ignore_index, classes, *in_size, *size, *stride)
    programs = strips_of(batch, size, shape)
    return Launch(_forward_kernel, programs, device, integers, constants)


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """``(loss, logsumexp)`` of each pixel of ``UP(logits)``, both (N, H, W) as ``target``.

    Both have the accumulation dtype. The loss of an ignored pixel is 0, that of one whose target is
    no class is NaN: nobody waits for the device to tell.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(target.shape, dtype=dtype, device=logits.device)
    logsumexp = torch.empty_like(loss)
    if loss.numel() > 0:
        weight = None if weight is None else weight.contiguous()
        launch = _forward_launch(
            logits.device, logits.dtype, logits.shape, logits.stride(), *target.shape[1:],
            ignore_index, label_smoothing, align_corners, are_classes_innermost(logits),
        )  # fmt: skip
        weight_sum = sum_of(weight, label_smoothing)
        launch(logits, target.contiguous(), weight, weight_sum, loss, logsumexp)
    return loss, logsumexp


@planned
def _backward_launch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...],
    height: int, width: int, grad_stride: tuple[int, ...], ignore_index: int,
    label_smoothing: float, align_corners: bool,
) -> Launch:  # fmt: skip
    batch, classes, in_height, in_width = shape
    check_plane(NAME, height, width)
    check_plane(NAME, in_height, in_width)
    block_x = column_run(in_width)
    block_c = min(CLASSES // (2 if dtype.itemsize == 8 else 1), power_of_two(classes))
    blocks = (in_width, block_x), (classes, block_c), (in_height, SOURCE_ROWS)
    x_blocks, class_blocks, row_blocks = (cdiv(n, block) for n, block in blocks)
    constants = {
        "SMOOTHING": label_smoothing,
        "ALIGN_CORNERS": align_corners,
        "SAME_SIZE": (in_height, in_width) == (height, width),
        "SOURCE_ROWS": SOURCE_ROWS,
        "BLOCK_X": block_x,
        "BLOCK_C": block_c,
        "num_warps": block_x // 32,
        "maxnreg": MAX_REGISTERS,
    }
    integers = (
        ignore_index, classes, in_height, in_width, height, width, *grad_stride, *stride,
    )  # fmt: skip
    programs = batch * x_blocks * class_blocks * row_blocks
    return Launch(_backward_kernel, programs, device, integers, constants)


def backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logsumexp: Tensor,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    """The gradient of the logits, where ``grad`` (N, H, W) is that of the loss, of any strides.

    A pixel whose target is no class makes it NaN in all classes of the source pixels it reads.
    """
    layout = memory_format(channels_last)
    grad_logits = torch.empty(
        logits.shape, dtype=logits.dtype, device=logits.device, memory_format=layout
    )
    if grad_logits.numel() == 0:
        return grad_logits
    weight = None if weight is None else weight.contiguous()
    launch = _backward_launch(
        logits.device, logits.dtype, logits.shape, grad_logits.stride(), *target.shape[1:],
        grad.stride(), ignore_index, label_smoothing, align_corners,
    )  # fmt: skip
    # A thread has a column's classes whatever the layout; a copy costs little beside the walk.
    launch(
        grad, logits.contiguous(), target.contiguous(), weight, sum_of(weight, label_smoothing),
        logsumexp.contiguous(), grad_logits,
    )  # fmt: skip
    return grad_logits
