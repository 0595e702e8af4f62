"""upsample_equalize_concat on CUDA devices: Triton kernels and their launchers.

One launch per level. The forward kernel writes the level into its slice of the channels; programs
own tiles of target pixels by channels, stored contiguously in the output's memory format. The
backward kernel is the gather of the adjoint: programs own tiles of source pixels and sum, in a
fixed order and without atomics, the target pixels that read them. Both move each byte of the wide
side once from memory; neighbouring programs find shared rows in the L2 cache.
"""
# ruff: noqa: RUF005  (kernels keep a block per tap in a tuple, and Triton knows no unpacking)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.bilinear_triton import (
    NUM_WARPS,
    SPECIALIZED_MULTIPLE,
    check_plane,
    dense_offset,
    load_interpolated,
    target_range,
    tile,
    tile_shape,
    tiles_of,
    weight_of,
)
from fastfuse.ops.launch_triton import Launch, cdiv, memory_format, planned, power_of_two
from fastfuse.ops.split_triton import (
    add_partial_sums,
    are_few,
    part_of,
    partial_sums,
    split_of,
    splits_of,
)

__all__ = ["backward", "forward"]

NAME = "upsample_equalize_concat"

# Taps summed at once along x: by a thread, where a vector of channels leaves registers for their
# weights, all readers of a source pixel up to a ratio of 2; by several, up to a ratio of 8.
MAX_TAPS, MAX_BLOCK_TAPS = 4, 16
# Four programs per multiprocessor. Without a limit the assembler may spill to reach one it likes.
MAX_REGISTERS = 128
MAX_REGISTERS_OF_FEW = 168  # three, where there are few programs, or every value has its address


@triton.jit(do_not_specialize=["level", "in_height", "in_width", "height", "width"])
def _forward_kernel(
    feature,
    out,
    mean,  # one value per level, or None
    std,
    level,
    channel_offset,
    channels,
    out_channels,
    in_height,
    in_width,
    height,
    width,
    pixels,  # height * width: its own argument, for a multiple of 16 is seen without division
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    ALIGN_CORNERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if feature.dtype.element_ty == tl.float64 else tl.float32
    image, pixel, channel = tile(tl.program_id(0), pixels, channels, BLOCK_PIXELS, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]  # [BLOCK_PIXELS, BLOCK_C]
    y = pixel // width
    x = pixel % width

    # Load and interpolate.
    channel_start = feature + image * stride_n + (channel.to(tl.int64) * stride_c)[None, :]
    value = load_interpolated(
        channel_start, y, x, mask, in_height, in_width, height, width, stride_h, stride_w,
        ALIGN_CORNERS, SAME_SIZE, DTYPE,
    )  # fmt: skip

    # Equalize.
    if mean is not None:
        value -= tl.load(mean + level).to(DTYPE)
    if std is not None:
        value *= 1 / tl.load(std + level).to(DTYPE)

    # Store.
    out_channel = channel_offset + channel
    offset = dense_offset(image, pixel, out_channel, pixels, out_channels, CHANNELS_LAST)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["level", "values"])  # sizes: without what is known of them it spills
def _backward_kernel(
    grad_out,
    grad_feature,
    std,  # one value per level, or None
    level,
    channel_offset,
    channels,
    in_height,
    in_width,
    in_pixels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    splits,  # of the target rows, each with a map of its own in grad_feature
    values,  # of a map
    ALIGN_CORNERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    TAPS: tl.constexpr,  # along x of a thread at once, each for itself
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,  # by threads
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if grad_out.dtype.element_ty == tl.float64 else tl.float32
    program, split = split_of(splits)
    image, pixel, channel = tile(program, in_pixels, channels, BLOCK_PIXELS, BLOCK_C)
    in_pixel = pixel < in_pixels
    in_channel = channel < channels
    source_y = pixel // in_width
    source_x = pixel % in_width
    channel_start = grad_out + image * stride_n
    channel_start += (channel_offset + channel).to(tl.int64) * stride_c  # [BLOCK_C]

    if SAME_SIZE:
        offset = source_y.to(tl.int64) * stride_h + source_x.to(tl.int64) * stride_w
        mask = in_pixel[:, None] & in_channel[None, :]
        total = tl.load(channel_start[None, :] + offset[:, None], mask=mask, other=0.0).to(DTYPE)
    else:
        first_y, last_y = target_range(source_y, in_height, height, ALIGN_CORNERS, DTYPE)
        first_x, last_x = target_range(source_x, in_width, width, ALIGN_CORNERS, DTYPE)
        # The loops run as long as the neediest pixel; the others' surplus is masked.
        rows = tl.max(tl.where(in_pixel, last_y - first_y + 1, 0))
        columns = tl.max(tl.where(in_pixel, last_x - first_x + 1, 0))
        first, end = part_of(split, splits, rows, 1)
        block = tl.arange(0, BLOCK_TAPS)[None, :]
        partial = tl.zeros([BLOCK_PIXELS, BLOCK_TAPS, BLOCK_C], dtype=DTYPE)
        for column in range(0, columns, TAPS * BLOCK_TAPS):
            # Along x: what is read in every row, and its weights.
            weights, offsets, masks = (0,) * TAPS, (0,) * TAPS, (0,) * TAPS
            for tap in tl.static_range(TAPS):
                # [BLOCK_PIXELS, BLOCK_TAPS]
                target_x = first_x[:, None] + (column + tap * BLOCK_TAPS) + block
                weight_x = weight_of(
                    target_x, source_x[:, None], in_width, width, ALIGN_CORNERS, DTYPE
                )
                weights = weights[1:] + (weight_x,)
                offsets = offsets[1:] + (target_x.to(tl.int64) * stride_w,)
                masks = masks[1:] + ((target_x <= last_x[:, None]) & (weight_x > 0),)
            for row in range(first, end):
                target_y = first_y + row
                weight_y = weight_of(target_y, source_y, in_height, height, ALIGN_CORNERS, DTYPE)
                reads_row = in_pixel & (target_y <= last_y) & (weight_y > 0)  # [BLOCK_PIXELS]
                row_start = (target_y.to(tl.int64) * stride_h)[:, None]
                for tap in tl.static_range(TAPS):
                    grad = tl.load(
                        channel_start[None, None, :] + (row_start + offsets[tap])[:, :, None],
                        mask=(reads_row[:, None] & masks[tap])[:, :, None]
                        & in_channel[None, None, :],
                        other=0.0,
                    )  # [BLOCK_PIXELS, BLOCK_TAPS, BLOCK_C]
                    weight = weights[tap] * weight_y[:, None]
                    partial += grad.to(DTYPE) * weight[:, :, None]
        total = tl.sum(partial, axis=1)  # [BLOCK_PIXELS, BLOCK_C]

    if std is not None:
        total *= 1 / tl.load(std + level).to(DTYPE)

    offset = dense_offset(image, pixel, channel, in_pixels, channels, CHANNELS_LAST)
    mask = in_pixel[:, None] & in_channel[None, :]
    grad_feature += split.to(tl.int64) * values
    tl.store(grad_feature + offset, total.to(grad_feature.dtype.element_ty), mask=mask)


@planned
def _forward_plan(
    device: torch.device, dtype: torch.dtype, shapes: tuple[Any, ...], strides: tuple[Any, ...],
    height: int, width: int, align_corners: bool, channels_last: bool,
) -> tuple[tuple[int, ...], list[Launch | None]]:  # fmt: skip
    """The output's shape, and the launch of each level."""
    check_plane(NAME, height, width)
    batch, pixels = shapes[0][0], height * width
    out_channels = sum(shape[1] for shape in shapes)
    launches: list[Launch | None] = []
    channel_offset = 0
    for level, ((_, channels, in_height, in_width), stride) in enumerate(
        zip(shapes, strides, strict=True)
    ):
        if batch * channels == 0:
            launches.append(None)
            continue
        blocks = tile_shape(pixels, channels, dtype.itemsize, channels_last)
        integers = (
            level, channel_offset, channels, out_channels, in_height, in_width, height, width,
            pixels, *stride,
        )  # fmt: skip
        constants = {
            "ALIGN_CORNERS": align_corners,
            "CHANNELS_LAST": channels_last,
            "SAME_SIZE": (in_height, in_width) == (height, width),
            "BLOCK_PIXELS": blocks[0],
            "BLOCK_C": blocks[1],
            "num_warps": NUM_WARPS,
            "maxnreg": MAX_REGISTERS,
        }
        programs = tiles_of(batch, pixels, channels, blocks)
        launches.append(Launch(_forward_kernel, programs, device, integers, constants))
        channel_offset += channels
    return (batch, out_channels, height, width), launches


def forward(
    features: Sequence[Tensor],
    height: int,
    width: int,
    mean: Tensor | None,
    std: Tensor | None,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    """``out[:, o_i : o_i + C_i] = (UP(features[i]) - mean[i]) / std[i]``, of shape (N, C, H, W).

    ``mean`` and ``std`` hold one value per level on the features' device and are read there.
    """
    first = features[0]
    shape, launches = _forward_plan(
        first.device, first.dtype, tuple([f.shape for f in features]),
        tuple([f.stride() for f in features]), height, width, align_corners, channels_last,
    )  # fmt: skip
    layout = memory_format(channels_last)
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    mean = None if mean is None else mean.contiguous()
    std = None if std is None else std.contiguous()
    for feature, launch in zip(features, launches, strict=True):
        if launch is not None:
            launch(feature, out, mean, std)
    return out


@planned
def _backward_launch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...],
    level: int, offset: int, channels: int, in_height: int, in_width: int, align_corners: bool,
    channels_last: bool,
) -> tuple[int, Launch]:  # fmt: skip
    """Into how many parts the target rows are split, and the launch."""
    check_plane(NAME, in_height, in_width)
    batch, _, height, width = shape
    same_size = (in_height, in_width) == (height, width)
    # A source position is read by two times the ratio of targets.
    readers = 1 if same_size else cdiv(2 * width, in_width)
    pixels = in_height * in_width
    taps, block_taps = min(readers, MAX_TAPS), 1
    blocks = tile_shape(pixels, channels, dtype.itemsize, channels_last)
    programs = tiles_of(batch, pixels, channels, blocks)
    has_vectors = channels_last and channels % SPECIALIZED_MULTIPLE == 0
    if not has_vectors or are_few(programs):
        taps, block_taps = 1, min(power_of_two(readers), MAX_BLOCK_TAPS)
        blocks = tile_shape(pixels, channels, dtype.itemsize, channels_last, block_taps)
        programs = tiles_of(batch, pixels, channels, blocks)
    splits = 1 if same_size else splits_of(programs, min(cdiv(2 * height, in_height), height))
    constants = {
        "ALIGN_CORNERS": align_corners,
        "CHANNELS_LAST": channels_last,
        "SAME_SIZE": same_size,
        "TAPS": taps,
        "BLOCK_PIXELS": blocks[0],
        "BLOCK_TAPS": block_taps,
        "BLOCK_C": blocks[1],
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS_OF_FEW if channels_last and block_taps > 1 else MAX_REGISTERS,
    }
    integers = (
        level, offset, channels, in_height, in_width, pixels, height, width, *stride, splits,
        batch * channels * pixels,
    )  # fmt: skip
    return splits, Launch(_backward_kernel, splits * programs, device, integers, constants)


def backward(
    grad_output: Tensor,
    offsets: Sequence[int],
    channels: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    std: Tensor | None,
    align_corners: bool,
    channels_last: bool,
) -> list[Tensor]:
    """The gradients of the levels that lie at ``offsets`` in ``grad_output`` (N, C, H, W).

    Each has shape (N, channels[i], heights[i], widths[i]); ``std`` holds one value per such level.
    """
    device, dtype, shape = grad_output.device, grad_output.dtype, grad_output.shape
    std = None if std is None else std.contiguous()
    layout = memory_format(channels_last)
    gradients = []
    for level, of_level in enumerate(zip(offsets, channels, heights, widths, strict=True)):
        size = (shape[0], *of_level[1:])
        gradient = torch.empty(size, dtype=dtype, device=device, memory_format=layout)
        gradients.append(gradient)
        if gradient.numel() == 0:
            continue
        splits, launch = _backward_launch(
            device, dtype, shape, grad_output.stride(), level, *of_level, align_corners,
            channels_last,
        )  # fmt: skip
        if splits == 1:
            launch(grad_output, gradient, std)
            continue
        partials = partial_sums(splits, gradient)
        launch(grad_output, partials, None)
        order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
        add_partial_sums(gradient, partials, std, index=level, is_inverse=True, order=order)
    return gradients
