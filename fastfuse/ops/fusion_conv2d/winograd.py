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
from fastfuse.ops.matmul import MatmulWeight
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = [
    "ELEMENTS",
    "OUTPUTS",
    "applies",
    "convolve",
    "input_gradient",
    "transform_weight",
    "weight_gradient",
]

for _schema in (
    # tiles (36, count, C) of the count tiles from `first` on that make outputs height x width
    "winograd_input(Tensor(a!) tiles, Tensor image, SymInt first, SymInt height, SymInt width, "
    "SymInt padding) -> ()",
    "winograd_output(Tensor(a!) image, Tensor[] products, SymInt first, Tensor? bias) -> ()",
    "winograd_output_adjoint(Tensor(a!) tiles, Tensor image, SymInt first) -> ()",
):
    Op(_schema, kernels={"cpu": COMPILED})

OUTPUTS = 4  # of a tile, on each side
ELEMENTS = (OUTPUTS + 2) ** 2  # of a transformed tile

BLOCK_MULTIPLE = 32  # tiles
# Consecutive matrices of a batch would fall into the same cache sets: their distance is odd lines.
SKEW_BYTES = 5 * 64

# The points 0, a, -a, b, -b and infinity of the transforms in csrc/cpu/winograd_simd.cpp.
_A, _B = 0.625, 1.5


def _weight_transform() -> Tensor:
    """G (x) G, (36, 9): a transformed tile's elements from the taps."""
    a, b, a2, b2 = _A, _B, _A**2, _B**2
    rows = [
        [1 / (a2 * b2), 0, 0],
        *([x / (2 * a2 * (a2 - b2)) for x in (1, p, a2)] for p in (a, -a)),
        *([x / (2 * b2 * (b2 - a2)) for x in (1, p, b2)] for p in (b, -b)),
        [0, 0, 1],
    ]
    matrix = torch.tensor(rows, dtype=torch.float64, device="cpu")
    return torch.kron(matrix, matrix)


_G = _weight_transform()


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


def transform_weight(taps: Tensor) -> Tensor:
    """(9, A, B) -> (36, A, B), in the accumulation dtype."""
    taps = taps.to(accumulation_dtype(taps.dtype))
    out = empty((ELEMENTS, taps[0].numel()), taps)
    return torch.mm(_G.to(taps.dtype), taps.reshape(9, -1), out=out).view(-1, *taps.shape[1:])


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
    count = -(-tiles // max(limit, policy.winograd_tiles))
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
    out: Tensor, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, padding: int
) -> None:
    """out = the convolution of inputs, concatenated, with a transformed weight (36, C_out, C_in).

    Images are channels_last.
    """
    bias = None if bias is None else bias.to(accumulation_dtype(out.dtype))
    size = (out.shape[2], out.shape[3])
    out_channels, channels = weight.shape[1:]
    blocks = list(_blocks(out, size, channels + out_channels))
    if not blocks:
        return
    weights = [MatmulWeight(matrix, blocks[-1].stop) for matrix in weight]
    memory = _matrices(blocks[0].stop, channels, out)
    results: Sequence[Tensor | None] = [None] * ELEMENTS
    if weights[0].takes_out:
        results = _matrices(blocks[0].stop, out_channels, out).unbind()
    for block in blocks:
        count = block.stop - block.start
        transformed = memory[:, :count]
        _transform_inputs(transformed, inputs, block.start, size, padding)
        products = [
            w.matmul(x, None if result is None else result[:count])
            for w, x, result in zip(weights, transformed, results, strict=True)
        ]
        torch.ops.fastfuse.winograd_output(out, products, block.start, bias)


def input_gradient(out: Tensor, grad_output: Tensor, taps: Tensor, padding: int) -> None:
    """out = the gradient of an input whose taps are (9, C_out, C_in): again a convolution."""
    weight = transform_weight(taps.flip(0)).transpose(1, 2)
    convolve(out, [grad_output], weight, None, 2 - padding)


def weight_gradient(grad_output: Tensor, inputs: Sequence[Tensor], padding: int) -> Tensor:
    """The gradient of the taps, (9, C_out, C_in), in the accumulation dtype."""
    size = (grad_output.shape[2], grad_output.shape[3])
    channels = sum(image.shape[1] for image in inputs)
    out_channels = grad_output.shape[1]
    total = torch.zeros(
        (ELEMENTS, out_channels, channels),
        dtype=accumulation_dtype(grad_output.dtype),
        device=grad_output.device,
    )
    memory: list[Tensor] = []
    for block in _blocks(grad_output, size, channels + out_channels):
        count = block.stop - block.start
        if not memory:
            memory = [_matrices(count, c, grad_output) for c in (channels, out_channels)]
        transformed, gradients = (m[:, :count] for m in memory)
        _transform_inputs(transformed, inputs, block.start, size, padding)
        torch.ops.fastfuse.winograd_output_adjoint(gradients, grad_output, block.start)
        torch.baddbmm(total, gradients.transpose(1, 2), transformed, out=total)
    matrix = _G.to(total.dtype).t()
    return torch.mm(matrix, total.view(ELEMENTS, -1)).view(9, out_channels, channels)
