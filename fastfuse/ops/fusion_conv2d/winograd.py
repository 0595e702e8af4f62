"""3x3 convolution of channels_last images by Winograd's F(4x4, 3x3), on CPUs.

A tile of 4 x 4 outputs takes 36 products per pair of channels instead of 144: the GEMM's work falls
by 4. Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks* (2015); its points
are others here (below), for their roundings. bfloat16 and float16 are transformed, multiplied and
transformed back in float32, and rounded once.

Tiles are processed a block at a time: transform, a product for each of a tile's elements, transform
back; a block is so large that what lies between stays in the last-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfuse import _extension
from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import COMPILED, Op
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = [
    "ELEMENTS",
    "OUTPUTS",
    "applies",
    "convolve",
    "input_gradient",
    "weight_gradient",
]

for _schema in (
    # tiles (36, count, C) of the count tiles from `first` on that make outputs height x width
    "winograd_input(Tensor(a!) tiles, Tensor image, SymInt first, SymInt height, SymInt width, "
    "SymInt padding) -> ()",
    # image = what becomes of the tiles with taps (9, C_out, C_in), or with these in reverse order
    "winograd_product(Tensor(a!) image, Tensor tiles, Tensor taps, bool flipped, SymInt first, "
    "Tensor? bias) -> ()",
    "winograd_output_adjoint(Tensor(a!) tiles, Tensor image, SymInt first) -> ()",
    # taps = [taps +] their gradient of tiles (36, count, C_in) and the output's (36, count, C_out)
    "winograd_gradient(Tensor(a!) taps, Tensor tiles, Tensor gradients, bool add) -> ()",
):
    Op(_schema, kernels={"cpu": COMPILED})

OUTPUTS = 4  # of a tile, on each side
ELEMENTS = (OUTPUTS + 2) ** 2  # of a transformed tile

BLOCK_MULTIPLE = 96  # tiles: what the products take at a time
# Consecutive matrices of a batch would fall into the same cache sets: their distance is odd lines.
SKEW_BYTES = 5 * 64


def applies(
    device: str,
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    pixels: int,
    kernel_size: int,
    padding: int,
) -> bool:
    """Whether a convolution runs this way, by the policy's rule.

    A padding above 2 would make that of the input's gradient negative.
    """
    rule = policy_of(device).winograd.get(dtype)
    return (
        rule is not None
        and _extension.module is not None
        and kernel_size == 3
        and padding <= 2
        and min(channels, out_channels) >= rule.channels
        and (pixels - rule.pixels) * channels * out_channels >= rule.work
    )


def _matrices(count: int, channels: int, like: Tensor) -> Tensor:
    """Room for (36, count, channels), in the accumulation dtype."""
    like = like.new_empty(0, dtype=accumulation_dtype(like.dtype))
    stride = count * channels + SKEW_BYTES // like.element_size()
    memory = empty((ELEMENTS * stride,), like)
    return memory.as_strided((ELEMENTS, count, channels), (stride, channels, 1))


def _blocks(image: Tensor, size: tuple[int, int], channels: int) -> Iterator[slice]:
    """The tiles of an image's outputs, in blocks of one length but the last, which is no longer;
    their rows have so many channels together."""
    tiles = image.shape[0] * -(-size[0] // OUTPUTS) * -(-size[1] // OUTPUTS)
    policy = policy_of("cpu")
    itemsize = accumulation_dtype(image.dtype).itemsize
    limit = policy.winograd_bytes // (ELEMENTS * channels * itemsize)
    count = -(-tiles // max(limit, BLOCK_MULTIPLE))
    length = -(-tiles // (count * BLOCK_MULTIPLE)) * BLOCK_MULTIPLE if count else 1
    for first in range(0, tiles, length):
        yield slice(first, min(first + length, tiles))


def _transform_inputs(
    tiles: Tensor, inputs: Sequence[Tensor], first: int, size: tuple[int, int], padding: int
) -> None:
    start = 0
    for image in inputs:
        end = start + image.shape[1]
        torch.ops.fastfuse.winograd_input(tiles[:, :, start:end], image, first, *size, padding)
        start = end


def convolve(
    out: Tensor,
    inputs: Sequence[Tensor],
    taps: Tensor,
    bias: Tensor | None,
    padding: int,
    *,
    flipped: bool = False,
) -> None:
    """out = the convolution of inputs, concatenated, with taps (9, C_out, C_in), or with these in
    reverse order.

    Images are channels_last.
    """
    dtype = accumulation_dtype(out.dtype)
    taps, bias = taps.to(dtype), None if bias is None else bias.to(dtype)
    size, channels = (out.shape[2], out.shape[3]), taps.shape[2]
    memory: Tensor | None = None
    for block in _blocks(out, size, channels):
        if memory is None:
            memory = _matrices(block.stop, channels, out)
        tiles = memory[:, : block.stop - block.start]
        _transform_inputs(tiles, inputs, block.start, size, padding)
        torch.ops.fastfuse.winograd_product(out, tiles, taps, flipped, block.start, bias)


def input_gradient(out: Tensor, grad_output: Tensor, taps: Tensor, padding: int) -> None:
    """out = the gradient of an input whose taps are (9, C_out, C_in): again a convolution."""
    convolve(out, [grad_output], taps.transpose(1, 2), None, 2 - padding, flipped=True)


def weight_gradient(
    taps: Tensor, grad_output: Tensor, inputs: Sequence[Tensor], padding: int
) -> None:
    """taps = their gradient, (9, C_out, C_in) in the accumulation dtype, with any strides."""
    size = (grad_output.shape[2], grad_output.shape[3])
    out_channels, channels = taps.shape[1:]
    memory: list[Tensor] = []
    for block in _blocks(grad_output, size, channels + out_channels):
        count = block.stop - block.start
        if not memory:
            memory = [_matrices(count, c, grad_output) for c in (channels, out_channels)]
        tiles, gradients = (m[:, :count] for m in memory)
        _transform_inputs(tiles, inputs, block.start, size, padding)
        torch.ops.fastfuse.winograd_output_adjoint(gradients, grad_output, block.start)
        torch.ops.fastfuse.winograd_gradient(taps, tiles, gradients, block.start > 0)
    if not memory:
        taps.zero_()
