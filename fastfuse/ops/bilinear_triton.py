"""The sampling rule of bilinear interpolation and tiles of images, once, for every Triton kernel.

``bilinear.py`` states the rule. Coordinates have the accumulation dtype (float64 for float64, else
float32) and every rounding is written out, by ``div_rn`` and ``fma``: however the compiler fuses
what surrounds it, lower, upper and weight are those of ``axis_table`` bit for bit. Equal sizes give
the identity, for the scale is then exactly 1 (up to 2**23 positions in float32).

A tile is a block of an image's pixels, in the order of its rows, by a block of its channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastfuse.ops.launch_triton import cdiv, power_of_two

__all__ = [
    "between",
    "check_plane",
    "dense_offset",
    "load_interpolated",
    "sample_axis",
    "target_range",
    "tile",
    "tile_shape",
    "tiles_of",
    "weight_of",
]

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
VECTOR_BYTES = 16  # the widest access of one thread
SPECIALIZED_MULTIPLE = 16  # Triton knows of an integer that it is a multiple of 16, or nothing
# channels_last: two vectors per thread and corner, eight loads in flight in a forward kernel.
VECTORS_PER_THREAD = 2
# contiguous: every value has its own coordinates, whose registers are the limit.
ELEMENTS_PER_THREAD = 8
# channels_last: a pixel's share of a tile is 32 bytes (a sector) to 256 (two full cache lines).
MIN_CHANNELS_BYTES, MAX_CHANNELS_BYTES = 32, 256
# contiguous: long runs of pixels, or of their taps, make full lines; the channels below share their
# coordinates.
MAX_BLOCK_PIXELS, MAX_BLOCK_READS = 256, 128
# Bytes of sums per thread in channels_last, where taps are summed: 32 float32 registers.
MAX_SUM_BYTES = 128

# Pixels of one image are counted in int32, with room for the last tile; offsets are int64.
MAX_PIXELS = 2**30


@triton.jit
def _axis_scale(in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """Source positions per target position."""
    if ALIGN_CORNERS:
        numerator = tl.cast(in_size - 1, DTYPE)
        denominator = tl.cast(tl.maximum(out_size - 1, 1), DTYPE)
    else:
        numerator = tl.cast(in_size, DTYPE)
        denominator = tl.cast(out_size, DTYPE)
    is_double: tl.constexpr = numerator.dtype == tl.float64
    # A plain float32 division may be 2 ulp off, a float64 one is not.
    return numerator / denominator if is_double else tl.div_rn(numerator, denominator)


@triton.jit
def sample_axis(target, in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """``(lower, upper, weight)`` of a block of target positions: int32, int32 and DTYPE.

    Target positions outside the axis are answered with source positions inside it.
    """
    scale = _axis_scale(in_size, out_size, ALIGN_CORNERS, DTYPE)
    position = target.to(DTYPE)
    if ALIGN_CORNERS:
        # Not a product: the compiler could fuse it into `source - lower` and round differently.
        source = tl.fma(scale, position, 0.0)
    else:
        source = tl.maximum(tl.fma(scale, position + 0.5, -0.5), 0.0)
    lower = tl.minimum(source.to(tl.int32), in_size - 1)
    upper = tl.minimum(lower + 1, in_size - 1)
    weight = tl.minimum(tl.maximum(source - lower.to(DTYPE), 0.0), 1.0)
    return lower, upper, weight


@triton.jit
def weight_of(target, source, in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """The weight with which ``target`` reads ``source``, a block that broadcasts against it.

    Zero where it does not; at the last source position lower == upper, and both weights count.
    """
    lower, upper, weight = sample_axis(target, in_size, out_size, ALIGN_CORNERS, DTYPE)
    return tl.where(lower == source, 1 - weight, 0.0) + tl.where(upper == source, weight, 0.0)


@triton.jit
def target_range(source, in_size, out_size, ALIGN_CORNERS: tl.constexpr, DTYPE: tl.constexpr):
    """``(first, last)``: every target position that reads ``source`` lies in first .. last.

    The range inverts the rule, source(target) in (source - 1, source + 1), and adds more than the
    rounding of either, so it may hold a position whose weight is zero. It may be empty.
    """
    scale = _axis_scale(in_size, out_size, ALIGN_CORNERS, DTYPE)
    position = source.to(DTYPE)
    if ALIGN_CORNERS:
        step = tl.where(scale > 0, scale, 1.0)
        low = (position - 1.0) / step
        high = (position + 1.0) / step
    else:
        low = (position - 0.5) / scale - 0.5
        high = (position + 1.5) / scale - 0.5
    # Rounding moves a position by a few 2**-24 of itself; a sixteenth costs few candidates.
    slack = 0.0625 + high * 0.000001
    first = tl.maximum(tl.ceil(low - slack), 0.0).to(tl.int32)
    last = tl.minimum(tl.floor(high + slack), tl.cast(out_size - 1, DTYPE)).to(tl.int32)
    if ALIGN_CORNERS:  # one source position: every target reads it; one target: it reads the first
        first = tl.where(scale > 0, first, 0)
        last = tl.where(scale > 0, last, out_size - 1)
    return first, last


@triton.jit
def tile(program, pixels, channels, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """``(image, pixel, channel)`` of a program: int64 scalar, [BLOCK_PIXELS], [BLOCK_C]."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    block = program // channel_blocks
    image = (block // pixel_blocks).to(tl.int64)
    pixel = (block % pixel_blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return image, pixel, channel


@triton.jit
def dense_offset(image, pixel, channel, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Where a tile lies in a dense tensor of ``channels`` channels. # [BLOCK_PIXELS, BLOCK_C]"""
    if CHANNELS_LAST:
        offset = ((image * pixels + pixel) * channels)[:, None] + channel[None, :]
    else:
        offset = ((image * channels + channel) * pixels)[None, :] + pixel[:, None]
    return offset


@triton.jit
def between(first, second, weight):
    """``first * (1 - weight) + second * weight``: the same bits wherever it is compiled."""
    return tl.fma(second, weight, first * (1 - weight))


@triton.jit
def load_interpolated(
    channel_start,  # of the source's channels  # [1, BLOCK_C]
    y,  # of the target's pixels  # [BLOCK_PIXELS]
    x,
    mask,  # [BLOCK_PIXELS, BLOCK_C]
    in_height,
    in_width,
    height,
    width,
    stride_h,
    stride_w,
    ALIGN_CORNERS: tl.constexpr,
    SAME_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of the source, upsampled to the target's size. # [BLOCK_PIXELS, BLOCK_C]"""
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
        upper_row = between(top_left.to(DTYPE), top_right.to(DTYPE), weight_x)
        lower_row = between(bottom_left.to(DTYPE), bottom_right.to(DTYPE), weight_x)
        value = between(upper_row, lower_row, weight_y)
    return value


def tile_shape(
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
        block_c = min(block_c, MAX_CHANNELS_BYTES // itemsize, power_of_two(channels))
        return min(elements // block_c, power_of_two(pixels)), block_c
    elements = THREADS * ELEMENTS_PER_THREAD // taps
    run = MAX_BLOCK_PIXELS if taps == 1 else MAX_BLOCK_READS
    block_pixels = min(run // taps, power_of_two(pixels))
    return block_pixels, min(elements // block_pixels, power_of_two(channels))


def tiles_of(batch: int, pixels: int, channels: int, blocks: tuple[int, int]) -> int:
    """How many tiles there are, each for a program."""
    return batch * cdiv(pixels, blocks[0]) * cdiv(channels, blocks[1])


def check_plane(op: str, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{op}: expected at most {MAX_PIXELS} pixels per image for the triton kernels; "
            f"got {height} x {width}"
        )
