"""The Triton kernels of the pointwise steps: how they share the work is told in ``triton.py``."""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = [
    "add_sums_kernel", "bias_gelu_backward_kernel", "bias_gelu_kernel",
    "layer_norm_backward_kernel", "layer_norm_kernel", "residual_backward_kernel",
    "residual_kernel",
]  # fmt: skip

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
INVERSE_SQRT_TWO_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
MINUS_HALF_LOG2_E = tl.constexpr(-0.5 / math.log(2))


@triton.jit
def _reciprocal(x, STEPS: tl.constexpr):
    """1 / x of float32 from 1 to 2**126, by so many steps of Newton's: two leave 7e-6, three what
    rounding does. The compiler's division takes eight instructions."""
    result = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    for _ in tl.static_range(STEPS):
        result *= 2 - x * result
    return result


@triton.jit
def _normal(x, IS_NARROW: tl.constexpr):
    """``(exp(-x^2 / 2), Phi(x))``: the normal distribution's density but for a factor, and its
    integral up to x; in float32 or float64.

    In float32 Phi(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + c |x|), with P of csrc/cpu/gelu.h:
    nothing cancels. Relative error of GELU where it counts: 1e-6, and 2e-5 if that will do, because
    results are rounded to two bytes.
    """
    if x.dtype == tl.float64:
        return tl.exp(-0.5 * x * x), 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
    else:
        exponential = tl.exp2(x * x * MINUS_HALF_LOG2_E)
        c: tl.constexpr = 0.353553391 if IS_NARROW else 0.2828427125
        t = _reciprocal(tl.minimum(c * tl.abs(x) + 1, 1e30), 2 if IS_NARROW else 3)
        if IS_NARROW:
            p = -0.0850552082 * t + 0.2349880215
            p = p * t + 0.054788144
            p = p * t + 0.155355347
            p = p * t + 0.139963679
        else:
            p = 0.0201338832 * t - 0.0677361935
            p = p * t + 0.036922396
            p = p * t + 0.049863296
            p = p * t + 0.0357551713
            p = p * t + 0.098481087
            p = p * t + 0.1004793985
            p = p * t + 0.1132878405
            p = p * t + 0.11281315
        p = exponential * (p * t)
        return exponential, tl.where(x < 0, p, 1 - p)


@triton.jit
def _gelu(x, IS_NARROW: tl.constexpr):
    """``(gelu(x), its derivative)``."""
    exponential, integral = _normal(x, IS_NARROW)
    return x * integral, integral + x * (exponential * INVERSE_SQRT_TWO_PI)


@triton.jit
def _tile(channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """``(block of rows, rows, channel, whether there is such a channel)``; [BLOCK_R], [BLOCK_C]."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    channel = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // channel_blocks, tl.arange(0, BLOCK_R), channel, channel < channels


@triton.jit
def _offset(row, channel, stride):
    return row.to(tl.int64)[:, None] * stride + channel[None, :]


@triton.jit
def _load(matrix, row, channel, stride, mask, DTYPE: tl.constexpr):
    return tl.load(matrix + _offset(row, channel, stride), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _store(matrix, row, channel, stride, mask, value):
    offset = _offset(row, channel, stride)
    tl.store(matrix + offset, value.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def _row_vector(vector, channel, in_channel, BLOCK_R: tl.constexpr):
    """A vector's channels, for every row of tiles: each thread loads what it needs."""
    shape: tl.constexpr = [BLOCK_R, channel.shape[0]]
    mask = tl.broadcast_to(in_channel[None, :], shape)
    return tl.load(vector + tl.broadcast_to(channel[None, :], shape), mask=mask, other=0.0)


@triton.jit
def _store_sums(partials, block, channel, channels, total):
    """The sum of a tile's rows, as the block's row of ``partials``."""
    partials += block.to(tl.int64) * channels + channel
    tl.store(partials, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit
def _keep_of(keep, start, tile_row, first, pixels, mask):
    """The factor of every row's image, rows counted from ``start``. # [BLOCK_R, 1]"""
    position = first.to(tl.int64) + start  # one division of int64 for all rows
    left = (pixels - position % pixels).to(pixels.dtype)  # rows of the same image
    image = position // pixels + tl.where(tile_row < left, 0, 1 + (tile_row - left) // pixels)
    return tl.load(keep + image, mask=mask, other=0.0)[:, None]


@triton.jit
def _normalize(x, inside, channels, EPS: tl.constexpr):
    """Rows less their mean, over their deviation, and 1 / deviation."""
    mean = tl.sum(x, axis=1)[:, None] / channels
    x = tl.where(inside, x - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / channels + EPS)
    return x * inverse, inverse


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    out, x, weight, bias,
    skip,  # added, or None
    rows, channels, out_stride, x_stride, skip_stride,
    EPS: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight.dtype.element_ty
    block, row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    row += block * BLOCK_R
    inside = (row < rows)[:, None] & in_channel[None, :]
    value = _load(x, row, channel, x_stride, inside, DTYPE)
    value, _ = _normalize(value, inside, channels, EPS)
    value *= _row_vector(weight, channel, in_channel, BLOCK_R)
    value += _row_vector(bias, channel, in_channel, BLOCK_R)
    if GELU:
        value, _ = _gelu(value, False)
    if skip is not None:
        value += _load(skip, row, channel, skip_stride, inside, DTYPE)
    _store(out, row, channel, out_stride, inside, value)


@triton.jit(do_not_specialize=["rows", "rows_per_block"])
def layer_norm_backward_kernel(
    grad_x,
    partials,  # (2, blocks, channels): of the weight's gradient and the bias's
    grad_out, x, weight, bias,
    rows, channels, rows_per_block, grad_x_stride, grad_out_stride, x_stride,
    EPS: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    weight_sum = tl.zeros([BLOCK_R, BLOCK_C], dtype=DTYPE)
    bias_sum = weight_sum
    scale = _row_vector(weight, channel, in_channel, BLOCK_R)
    if GELU:
        shift = _row_vector(bias, channel, in_channel, BLOCK_R)
    first = block * rows_per_block
    for start in range(first, tl.minimum(first + rows_per_block, rows), BLOCK_R):
        row = start + tile_row
        inside = (row < rows)[:, None] & in_channel[None, :]
        value = _load(x, row, channel, x_stride, inside, DTYPE)
        value, inverse = _normalize(value, inside, channels, EPS)
        grad = _load(grad_out, row, channel, grad_out_stride, inside, DTYPE)
        if GELU:
            _, slope = _gelu(value * scale + shift, False)
            grad *= slope
        weight_sum += grad * value
        bias_sum += grad
        # Not a product, which could be fused: of one channel, grad - mean is exactly zero.
        grad = tl.fma(grad, scale, 0.0)
        mean = tl.sum(grad, axis=1)[:, None] / channels
        mean_product = tl.sum(grad * value, axis=1)[:, None] / channels
        grad = (grad - mean - value * mean_product) * inverse
        _store(grad_x, row, channel, grad_x_stride, inside, grad)
    _store_sums(partials, block, channel, channels, weight_sum)
    _store_sums(partials, tl.num_programs(0) + block, channel, channels, bias_sum)


@triton.jit(do_not_specialize=["rows"])
def bias_gelu_kernel(
    out, hidden, bias, rows, channels, out_stride, hidden_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,  # one below the other
):  # fmt: skip
    DTYPE: tl.constexpr = bias.dtype.element_ty
    block, row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    row += block * (BLOCK_R * TILES)
    shift = _row_vector(bias, channel, in_channel, BLOCK_R)
    for _ in tl.static_range(TILES):
        inside = (row < rows)[:, None] & in_channel[None, :]
        value = _load(hidden, row, channel, hidden_stride, inside, DTYPE) + shift
        value, _ = _gelu(value, out.dtype.element_ty.primitive_bitwidth < 32)
        _store(out, row, channel, out_stride, inside, value)
        row += BLOCK_R


@triton.jit(do_not_specialize=["rows", "rows_per_block"])
def bias_gelu_backward_kernel(
    grad, out,
    partials,  # (blocks, channels)
    hidden, bias, rows, channels, rows_per_block, grad_stride, out_stride, hidden_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = bias.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=DTYPE)
    shift = _row_vector(bias, channel, in_channel, BLOCK_R)
    first = block * rows_per_block
    for start in range(first, tl.minimum(first + rows_per_block, rows), BLOCK_R):
        row = start + tile_row
        inside = (row < rows)[:, None] & in_channel[None, :]
        value = _load(hidden, row, channel, hidden_stride, inside, DTYPE) + shift
        value, slope = _gelu(value, False)  # bytes are the limit
        slope *= _load(grad, row, channel, grad_stride, inside, DTYPE)
        total += slope
        _store(grad, row, channel, grad_stride, inside, slope)
        _store(out, row, channel, out_stride, inside, value)
    _store_sums(partials, block, channel, channels, total)


@triton.jit(do_not_specialize=["rows", "first", "pixels"])
def residual_kernel(
    out, x, product, bias,
    scale,  # one value per channel, or None
    keep,  # one value per image, or None
    rows, channels, pixels, first, out_stride, x_stride, product_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = bias.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    start = block * BLOCK_R
    row = start + tile_row
    inside = (row < rows)[:, None] & in_channel[None, :]
    value = _load(product, row, channel, product_stride, inside, DTYPE)
    value += _row_vector(bias, channel, in_channel, BLOCK_R)
    if scale is not None:
        value *= _row_vector(scale, channel, in_channel, BLOCK_R)
    if keep is not None:
        value *= _keep_of(keep, start, tile_row, first, pixels, row < rows)
    value += _load(x, row, channel, x_stride, inside, DTYPE)
    _store(out, row, channel, out_stride, inside, value)


@triton.jit(do_not_specialize=["rows", "rows_per_block", "first", "pixels"])
def residual_backward_kernel(
    out,
    partials,  # (blocks, channels)
    grad,
    keep,  # one value per image, or None
    rows, channels, rows_per_block, pixels, first, out_stride, grad_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = partials.dtype.element_ty
    block, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=DTYPE)
    first_row = block * rows_per_block
    for start in range(first_row, tl.minimum(first_row + rows_per_block, rows), BLOCK_R):
        row = start + tile_row
        inside = (row < rows)[:, None] & in_channel[None, :]
        value = _load(grad, row, channel, grad_stride, inside, DTYPE)
        if keep is not None:
            value *= _keep_of(keep, start, tile_row, first, pixels, row < rows)
            _store(out, row, channel, out_stride, inside, value)
        total += value
    _store_sums(partials, block, channel, channels, total)


@triton.jit(do_not_specialize=["blocks"])
def add_sums_kernel(
    sums,  # vectors
    partials,  # (vectors, blocks, channels)
    blocks, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    vector, tile_row, channel, in_channel = _tile(channels, BLOCK_R, BLOCK_C)
    partials += vector.to(tl.int64) * blocks * channels
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=partials.dtype.element_ty)
    for start in range(0, blocks, BLOCK_R):
        row = start + tile_row
        inside = (row < blocks)[:, None] & in_channel[None, :]
        total += tl.load(partials + _offset(row, channel, channels), mask=inside, other=0.0)
    for index in tl.static_range(len(sums)):
        if vector == index:
            there = tl.load(sums[index] + channel, mask=in_channel, other=0.0)
            tl.store(sums[index] + channel, there + tl.sum(total, axis=0), mask=in_channel)
