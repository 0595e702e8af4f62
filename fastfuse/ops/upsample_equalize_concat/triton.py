"""upsample_equalize_concat on CUDA devices: Triton kernels and their launchers.

One launch per level. The forward kernel writes the level into its slice of the channels; programs
own tiles of target pixels by channels, stored contiguously in the output's memory format. The
backward kernel is the gather of the adjoint: programs own tiles of source pixels and sum, in a
fixed order and without atomics, the target pixels that read them. Both move each byte of the wide
side once from memory; neighbouring programs find shared rows in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.bilinear_triton import sample_axis, target_range, weight_of

__all__ = ["backward", "forward"]

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
VECTOR_BYTES = 16  # the widest access of one thread
SPECIALIZED_MULTIPLE = 16  # Triton knows of an integer that it is a multiple of 16, or nothing
# channels_last: two vectors per thread and corner, eight loads in flight in the forward.
VECTORS_PER_THREAD = 2
# contiguous: every value has its own coordinates, whose registers are the limit.
ELEMENTS_PER_THREAD = 8
# channels_last: a pixel's share of a tile is 32 bytes (a sector) to 256 (two full cache lines).
MIN_CHANNELS_BYTES, MAX_CHANNELS_BYTES = 32, 256
# contiguous: long runs of pixels, or of their taps, make full lines; the channels below share their
# coordinates.
MAX_BLOCK_PIXELS, MAX_BLOCK_READS = 256, 128
# Taps summed at once along x: all readers of a source pixel up to a ratio of 8.
MAX_BLOCK_TAPS = 16
# Bytes of sums per thread in the channels_last backward: 32 float32 registers.
MAX_SUM_BYTES = 128

# Pixels of one image are counted in int32, with room for the last tile; offsets are int64.
MAX_PIXELS = 2**30


@triton.jit
def _tile(pixels, channels, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """``(image, pixel, channel)`` of this program: int64 scalar, [BLOCK_PIXELS], [BLOCK_C]."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    program = tl.program_id(0)
    block = program // channel_blocks
    image = (block // pixel_blocks).to(tl.int64)
    pixel = (block % pixel_blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return image, pixel, channel


@triton.jit
def _dense_offset(image, pixel, channel, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Where a tile lies in a dense tensor of ``channels`` channels. # [BLOCK_PIXELS, BLOCK_C]"""
    if CHANNELS_LAST:
        offset = ((image * pixels + pixel) * channels)[:, None] + channel[None, :]
    else:
        offset = ((image * channels + channel) * pixels)[None, :] + pixel[:, None]
    return offset


@triton.jit(do_not_specialize=["level"])
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
    image, pixel, channel = _tile(pixels, channels, BLOCK_PIXELS, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]  # [BLOCK_PIXELS, BLOCK_C]
    y = pixel // width
    x = pixel % width

    # Load and interpolate.
    channel_start = feature + image * stride_n + (channel.to(tl.int64) * stride_c)[None, :]
    if SAME_SIZE:
        offset = y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
        value = tl.load(channel_start + offset[:, None], mask=mask, other=0.0).to(DTYPE)
    else:
        top, bottom, weight_y = sample_axis(y, in_height, height, ALIGN_CORNERS, DTYPE)
        left, right, weight_x = sample_axis(x, in_width, width, ALIGN_CORNERS, DTYPE)
        top = top.to(tl.int64) * stride_h
        bottom = bottom.to(tl.int64) * stride_h
        left = left.to(tl.int64) * stride_w
        right = right.to(tl.int64) * stride_w
        top_left = tl.load(channel_start + (top + left)[:, None], mask=mask, other=0.0)
        top_right = tl.load(channel_start + (top + right)[:, None], mask=mask, other=0.0)
        bottom_left = tl.load(channel_start + (bottom + left)[:, None], mask=mask, other=0.0)
        bottom_right = tl.load(channel_start + (bottom + right)[:, None], mask=mask, other=0.0)
        weight_x = weight_x[:, None]
        weight_y = weight_y[:, None]
        upper_row = top_left.to(DTYPE) * (1 - weight_x) + top_right.to(DTYPE) * weight_x
        lower_row = bottom_left.to(DTYPE) * (1 - weight_x) + bottom_right.to(DTYPE) * weight_x
        value = upper_row * (1 - weight_y) + lower_row * weight_y

    # Equalize.
    if mean is not None:
        value -= tl.load(mean + level).to(DTYPE)
    if std is not None:
        value *= 1 / tl.load(std + level).to(DTYPE)

    # Store.
    out_channel = channel_offset + channel
    offset = _dense_offset(image, pixel, out_channel, pixels, out_channels, CHANNELS_LAST)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["level"])
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
    ALIGN_CORNERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if grad_out.dtype.element_ty == tl.float64 else tl.float32
    image, pixel, channel = _tile(in_pixels, channels, BLOCK_PIXELS, BLOCK_C)
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
        tap = tl.arange(0, BLOCK_TAPS)[None, :]
        partial = tl.zeros([BLOCK_PIXELS, BLOCK_TAPS, BLOCK_C], dtype=DTYPE)
        for row in range(rows):
            target_y = first_y + row
            weight_y = weight_of(target_y, source_y, in_height, height, ALIGN_CORNERS, DTYPE)
            reads_row = in_pixel & (target_y <= last_y) & (weight_y > 0)  # [BLOCK_PIXELS]
            row_start = target_y.to(tl.int64) * stride_h
            for column in range(0, columns, BLOCK_TAPS):
                target_x = first_x[:, None] + column + tap  # [BLOCK_PIXELS, BLOCK_TAPS]
                weight_x = weight_of(
                    target_x, source_x[:, None], in_width, width, ALIGN_CORNERS, DTYPE
                )
                reads = reads_row[:, None] & (target_x <= last_x[:, None]) & (weight_x > 0)
                offset = row_start[:, None] + target_x.to(tl.int64) * stride_w
                grad = tl.load(
                    channel_start[None, None, :] + offset[:, :, None],
                    mask=reads[:, :, None] & in_channel[None, None, :],
                    other=0.0,
                )  # [BLOCK_PIXELS, BLOCK_TAPS, BLOCK_C]
                partial += grad.to(DTYPE) * (weight_x * weight_y[:, None])[:, :, None]
        total = tl.sum(partial, axis=1)  # [BLOCK_PIXELS, BLOCK_C]

    if std is not None:
        total *= 1 / tl.load(std + level).to(DTYPE)

    offset = _dense_offset(image, pixel, channel, in_pixels, channels, CHANNELS_LAST)
    mask = in_pixel[:, None] & in_channel[None, :]
    tl.store(grad_feature + offset, total.to(grad_feature.dtype.element_ty), mask=mask)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _blocks(
    pixels: int, channels: int, itemsize: int, channels_last: bool, taps: int = 1
) -> tuple[int, int]:
    """``(BLOCK_PIXELS, BLOCK_C)``: a map of ``pixels`` by ``channels`` summing ``taps`` at once."""
    if channels_last:
        elements = THREADS * VECTORS_PER_THREAD * VECTOR_BYTES // itemsize
        if taps > 1:
            elements = min(elements, THREADS * MAX_SUM_BYTES // max(itemsize, 4) // taps)
        if channels % SPECIALIZED_MULTIPLE:  # no vectors: every value needs its address
            elements //= 2
        # The largest power of two that divides the channels, so that few blocks run over the end.
        block_c = max(channels & -channels, MIN_CHANNELS_BYTES // itemsize)
        block_c = min(block_c, MAX_CHANNELS_BYTES // itemsize, _power_of_two(channels))
        return min(elements // block_c, _power_of_two(pixels)), block_c
    elements = THREADS * ELEMENTS_PER_THREAD // taps
    run = MAX_BLOCK_PIXELS if taps == 1 else MAX_BLOCK_READS
    block_pixels = min(run // taps, _power_of_two(pixels))
    return block_pixels, min(elements // block_pixels, _power_of_two(channels))


def _grid(batch: int, pixels: int, channels: int, blocks: tuple[int, int]) -> tuple[int]:
    return (batch * triton.cdiv(pixels, blocks[0]) * triton.cdiv(channels, blocks[1]),)


def _check_plane(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"upsample_equalize_concat: expected at most {MAX_PIXELS} pixels per image for the "
            f"triton kernels; got {height} x {width}"
        )


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
    batch = first.shape[0]
    out_channels = sum(feature.shape[1] for feature in features)
    out = torch.empty(
        (batch, out_channels, height, width),
        dtype=first.dtype,
        device=first.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    mean = None if mean is None else mean.contiguous()
    std = None if std is None else std.contiguous()
    _check_plane(height, width)
    pixels = height * width
    itemsize = first.element_size()
    channel_offset = 0
    with torch.cuda.device_of(first):
        for level, feature in enumerate(features):
            _, channels, in_height, in_width = feature.shape
            if feature.numel() > 0 and pixels > 0:
                blocks = _blocks(pixels, channels, itemsize, channels_last)
                _forward_kernel[_grid(batch, pixels, channels, blocks)](
                    feature,
                    out,
                    mean,
                    std,
                    level,
                    channel_offset,
                    channels,
                    out_channels,
                    in_height,
                    in_width,
                    height,
                    width,
                    pixels,
                    *feature.stride(),
                    ALIGN_CORNERS=align_corners,
                    CHANNELS_LAST=channels_last,
                    SAME_SIZE=(in_height, in_width) == (height, width),
                    BLOCK_PIXELS=blocks[0],
                    BLOCK_C=blocks[1],
                    num_warps=NUM_WARPS,
                    enable_fp_fusion=True,
                )
            channel_offset += channels
    return out


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
    batch, _, height, width = grad_output.shape
    std = None if std is None else std.contiguous()
    itemsize = grad_output.element_size()
    gradients = []
    with torch.cuda.device_of(grad_output):
        for level, (offset, level_channels, in_height, in_width) in enumerate(
            zip(offsets, channels, heights, widths, strict=True)
        ):
            gradient = torch.empty(
                (batch, level_channels, in_height, in_width),
                dtype=grad_output.dtype,
                device=grad_output.device,
                memory_format=torch.channels_last if channels_last else torch.contiguous_format,
            )
            gradients.append(gradient)
            if gradient.numel() == 0:
                continue
            _check_plane(in_height, in_width)
            same_size = (in_height, in_width) == (height, width)
            # A source position is read by two times the ratio of targets.
            readers = 1 if same_size else triton.cdiv(2 * width, in_width)
            block_taps = min(_power_of_two(readers), MAX_BLOCK_TAPS)
            pixels = in_height * in_width
            blocks = _blocks(pixels, level_channels, itemsize, channels_last, block_taps)
            _backward_kernel[_grid(batch, pixels, level_channels, blocks)](
                grad_output,
                gradient,
                std,
                level,
                offset,
                level_channels,
                in_height,
                in_width,
                pixels,
                height,
                width,
                *grad_output.stride(),
                ALIGN_CORNERS=align_corners,
                CHANNELS_LAST=channels_last,
                SAME_SIZE=same_size,
                BLOCK_PIXELS=blocks[0],
                BLOCK_TAPS=block_taps,
                BLOCK_C=blocks[1],
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return gradients
