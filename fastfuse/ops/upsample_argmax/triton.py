"""upsample_argmax on CUDA devices: the Triton kernel and its launchers.

Programs own strips of target pixels and walk over the classes, block by block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.bilinear_triton import check_plane
from fastfuse.ops.launch_triton import Launch, planned
from fastfuse.ops.strip_triton import (
    add_exponential,
    are_classes_innermost,
    class_axis,
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

__all__ = ["forward", "forward_confidence"]

NAME = "upsample_argmax"


@triton.jit(do_not_specialize=["in_height", "in_width", "height", "width"])
def _forward_kernel(
    logits,
    out,
    confidence,  # or None
    classes,
    in_height,
    in_width,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    ALIGN_CORNERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 2 if CHANNELS_LAST else 0
    image, y, x = strip(height, width, ROWS, BLOCK_X)
    samples = sample_strip(
        y, x, in_height, in_width, height, width, stride_h, stride_w, ALIGN_CORNERS, DTYPE
    )
    place = lanes(BLOCK_C)
    best = strip_filled(float("-inf"), ROWS, BLOCK_X, BLOCK_C, CHANNELS_LAST, DTYPE)
    best_start = strip_filled(0, ROWS, BLOCK_X, BLOCK_C, CHANNELS_LAST, tl.int32)
    if confidence is not None:
        top, total = no_exponentials(ROWS, BLOCK_X, BLOCK_C, CHANNELS_LAST, DTYPE)
    for start in range(0, classes, BLOCK_C):
        value = load_strip(
            logits + image * stride_n, start + place, start + place < classes, stride_c, x < width,
            samples, SAME_SIZE, CHANNELS_LAST, ROWS, DTYPE,
        )  # fmt: skip
        # NaN is the largest, and the first one stays.
        better = (value > best) | ((value != value) & (best == best))
        best = tl.where(better, value, best)
        best_start = tl.where(better, start, best_start)
        if confidence is not None:
            top, total = add_exponential(value, top, total)

    # Of the places with the largest value, the lowest class.
    is_nan = best != best
    any_nan = tl.max(is_nan.to(tl.int32), axis=AXIS)
    largest = tl.max(tl.where(is_nan, float("-inf"), best), axis=AXIS)
    wins = tl.where(
        tl.expand_dims(any_nan, AXIS) > 0, is_nan, best == tl.expand_dims(largest, AXIS)
    )
    best_class = best_start + class_axis(place, CHANNELS_LAST)
    winner = tl.min(tl.where(wins, best_class, classes), axis=AXIS)  # [ROWS, BLOCK_X]
    offset = (image * height + y)[:, None] * width + x[None, :]
    mask = (y < height)[:, None] & (x < width)[None, :]
    tl.store(out + offset, winner.to(tl.int64), mask=mask)
    if confidence is not None:
        top, total = log_sum_exp(top, total, AXIS)
        tl.store(confidence + offset, tl.exp(largest - top) / total, mask=mask)


@planned
def _forward_launch(
    device: torch.device, dtype: torch.dtype, logits_shape: tuple[int, ...],
    stride: tuple[int, ...], height: int, width: int, align_corners: bool, channels_last: bool,
) -> Launch:  # fmt: skip
    check_plane(NAME, height, width)
    batch, classes, in_height, in_width = logits_shape
    in_size, size = (in_height, in_width), (height, width)
    shape = strip_shape(dtype.itemsize, classes, in_size, size, align_corners, channels_last)
    constants = {
        "ALIGN_CORNERS": align_corners,
        "CHANNELS_LAST": channels_last,
        "SAME_SIZE": in_size == size,
        **shape,
    }
    integers = (classes, *in_size, *size, *stride)
    programs = strips_of(batch, size, shape)
    return Launch(_forward_kernel, programs, device, integers, constants)


def _launch(
    logits: Tensor, height: int, width: int, align_corners: bool, confidence: Tensor | None
) -> Tensor:
    shape = (logits.shape[0], height, width)
    out = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if out.numel() > 0:
        launch = _forward_launch(
            logits.device, logits.dtype, logits.shape, logits.stride(), height, width,
            align_corners, are_classes_innermost(logits),
        )  # fmt: skip
        launch(logits, out, confidence)
    return out


def forward(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """The class of each pixel of ``UP(logits)`` (N, C, height, width): int64 (N, height, width).

    As in ``argmax``, the lowest class of equals; NaN is the largest value.
    """
    return _launch(logits, height, width, align_corners, None)


def forward_confidence(
    logits: Tensor, height: int, width: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """``forward``, and the softmax probability of that class: float32, float64 for float64."""
    confidence = torch.empty(
        (logits.shape[0], height, width),
        dtype=torch.promote_types(logits.dtype, torch.float32),
        device=logits.device,
    )
    return _launch(logits, height, width, align_corners, confidence), confidence
