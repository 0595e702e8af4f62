"""upsample_add on CUDA devices: the Triton kernel of the forward and its launcher.

Programs own tiles of target pixels by channels, load the four corners of each pixel, interpolate,
add the skip connection and store. Neighbouring programs find shared source pixels in the L2 cache.
(The gradient of x is a kernel of upsample_equalize_concat, that of skip needs none.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.bilinear_triton import (
    NUM_WARPS,
    check_plane,
    dense_offset,
    load_interpolated,
    tile,
    tile_shape,
    tiles_of,
)
from fastfuse.ops.launch_triton import Launch, memory_format, planned

__all__ = ["forward"]

NAME = "upsample_add"

# Four programs per multiprocessor. Without a limit the assembler may spill to reach one it likes.
MAX_REGISTERS = 128


@triton.jit(do_not_specialize=["in_height", "in_width", "height", "width"])
def _forward_kernel(
    source,
    skip,
    out,
    channels,
    in_height,
    in_width,
    height,
    width,
    pixels,  # height * width: its own argument, for a multiple of 16 is seen without division
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    skip_stride_n,
    skip_stride_c,
    skip_stride_h,
    skip_stride_w,
    ALIGN_CORNERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    DENSE_SKIP: tl.constexpr,  # skip lies as out does
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    image, pixel, channel = tile(tl.program_id(0), pixels, channels, BLOCK_PIXELS, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]  # [BLOCK_PIXELS, BLOCK_C]
    y = pixel // width
    x = pixel % width

    # Load and interpolate.
    channel_start = source + image * stride_n + (channel.to(tl.int64) * stride_c)[None, :]
    value = load_interpolated(
        channel_start, y, x, mask, in_height, in_width, height, width, stride_h, stride_w,
        ALIGN_CORNERS, SAME_SIZE, DTYPE,
    )  # fmt: skip

    # Add.
    offset = dense_offset(image, pixel, channel, pixels, channels, CHANNELS_LAST)
    if DENSE_SKIP:
        skip_offset = offset
    else:
        skip_pixel = y.to(tl.int64) * skip_stride_h + x.to(tl.int64) * skip_stride_w
        skip_channel = image * skip_stride_n + channel.to(tl.int64) * skip_stride_c
        skip_offset = skip_pixel[:, None] + skip_channel[None, :]
    value += tl.load(skip + skip_offset, mask=mask, other=0.0).to(DTYPE)

    # Store.
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


@planned
def _forward_launch(
    device: torch.device, dtype: torch.dtype, in_size: tuple[int, ...], stride: tuple[int, ...],
    shape: tuple[int, ...], skip_stride: tuple[int, ...], dense_skip: bool, align_corners: bool,
    channels_last: bool,
) -> Launch:  # fmt: skip
    batch, channels, height, width = shape
    check_plane(NAME, height, width)
    pixels = height * width
    blocks = tile_shape(pixels, channels, dtype.itemsize, channels_last)
    constants = {
        "ALIGN_CORNERS": align_corners,
        "CHANNELS_LAST": channels_last,
        "SAME_SIZE": in_size == (height, width),
        "DENSE_SKIP": dense_skip,
        "BLOCK_PIXELS": blocks[0],
        "BLOCK_C": blocks[1],
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
    }
    integers = (channels, *in_size, height, width, pixels, *stride, *skip_stride)
    programs = tiles_of(batch, pixels, channels, blocks)
    return Launch(_forward_kernel, programs, device, integers, constants)


def forward(x: Tensor, skip: Tensor, align_corners: bool, channels_last: bool) -> Tensor:
    """``skip + UP(x)``, of skip's shape (N, C, H, W)."""
    layout = memory_format(channels_last)
    out = torch.empty(skip.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if out.numel() > 0:
        launch = _forward_launch(
            x.device, x.dtype, x.shape[2:], x.stride(), skip.shape, skip.stride(),
            skip.is_contiguous(memory_format=layout), align_corners, channels_last,
        )  # fmt: skip
        launch(x, skip, out)
    return out
