"""3x3 convolution of channels_last images by Winograd's F(2x2, 3x3), on CPUs.

A tile of 2 x 2 outputs takes 16 products per pair of channels instead of 36: the GEMM's work falls
by 2.25. Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks* (2015). The
transforms add and subtract only (the weights' halves too, exactly), so that in float32 the error
stays that of a few more roundings; in bfloat16 the transformed inputs would have to be rounded,
and this is not used.

Tiles are processed a block at a time: transform, one batched product, transform back; a block is
so large that what lies between stays in the last-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfuse import _extension
from fastfuse.ops.memory import empty

__all__ = ["applies", "convolve", "input_gradient", "transform_weight", "weight_gradient"]

_LIBRARY = torch.library.Library("fastfuse", "FRAGMENT")
for _schema in (
    # tiles (16, count, C) of the count tiles from `first` on that make outputs height x width
    "winograd_input(Tensor(a!) tiles, Tensor image, SymInt first, SymInt height, SymInt width, "
    "SymInt padding) -> ()",
    "winograd_output(Tensor(a!) image, Tensor tiles, SymInt first, Tensor? bias) -> ()",
    "winograd_output_adjoint(Tensor(a!) tiles, Tensor image, SymInt first) -> ()",
):
    _LIBRARY.define(_schema, tags=[torch.Tag.pt2_compliant_tag])

# Bytes of transformed inputs and outputs of a block.
BLOCK_BYTES = 32 << 20
MIN_BLOCK, BLOCK_MULTIPLE = 128, 32
# Below, transforms and the batched product's many small ones take what the fewer products save.
MIN_CHANNELS, MIN_TILES = 64, 64
# Consecutive matrices of a batch would fall into the same cache sets: their distance is odd lines.
SKEW_BYTES = 5 * 64

_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
_G16 = torch.kron(_G, _G)  # (16, 9): a transformed tile's elements from the taps


def applies(
    device: str,
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    pixels: int,
    kernel_size: int,
    padding: int,
) -> bool:
    """Whether a convolution runs this way; a static rule.

    float64 too, for PyTorch has no fast convolution for it. A padding above 2 would make that of
    the input's gradient negative.
    """
    return (
        device == "cpu"
        and _extension.module is not None
        and dtype in (torch.float32, torch.float64)
        and kernel_size == 3
        and padding <= 2
        and min(channels, out_channels) >= MIN_CHANNELS
        and pixels >= 4 * MIN_TILES
    )


def transform_weight(taps: Tensor) -> Tensor:
    """(9, A, B) -> (16, A, B)."""
    matrix = _G16.to(taps.dtype)
    return torch.mm(matrix, taps.reshape(9, -1)).view(16, *taps.shape[1:])


def _matrices(count: int, channels: int, like: Tensor) -> Tensor:
    """Room for (16, count, channels)."""
    stride = count * channels + SKEW_BYTES // like.element_size()
    memory = empty((16 * stride,), like)
    return memory.as_strided((16, count, channels), (stride, channels, 1))


def _blocks(image: Tensor, size: tuple[int, int], channels: int) -> Iterator[slice]:
    """The tiles of an image's outputs, in blocks whose rows have so many channels together."""
    tiles = image.shape[0] * ((size[0] + 1) // 2) * ((size[1] + 1) // 2)
    length = BLOCK_BYTES // (16 * channels * image.element_size())
    length = max(length // BLOCK_MULTIPLE * BLOCK_MULTIPLE, MIN_BLOCK)
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
    """out = the convolution of inputs, concatenated, with a transformed weight (16, C_out, C_in).

    Images are channels_last.
    """
    size = (out.shape[2], out.shape[3])
    out_channels, channels = weight.shape[1:]
    memory: list[Tensor] = []
    for block in _blocks(out, size, channels + out_channels):
        count = block.stop - block.start
        if not memory:
            memory = [_matrices(count, c, out) for c in (channels, out_channels)]
        transformed, products = (m[:, :count] for m in memory)
        _transform_inputs(transformed, inputs, block.start, size, padding)
        torch.bmm(transformed, weight.transpose(1, 2), out=products)
        torch.ops.fastfuse.winograd_output(out, products, block.start, bias)


def input_gradient(out: Tensor, grad_output: Tensor, taps: Tensor, padding: int) -> None:
    """out = the gradient of an input whose taps are (9, C_out, C_in): again a convolution."""
    weight = transform_weight(taps.flip(0)).transpose(1, 2)
    convolve(out, [grad_output], weight, None, 2 - padding)


def weight_gradient(grad_output: Tensor, inputs: Sequence[Tensor], padding: int) -> Tensor:
    """The gradient of the taps, (9, C_out, C_in)."""
    size = (grad_output.shape[2], grad_output.shape[3])
    channels = sum(image.shape[1] for image in inputs)
    out_channels = grad_output.shape[1]
    total = torch.zeros(
        (16, out_channels, channels), dtype=grad_output.dtype, device=grad_output.device
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
    matrix = _G16.to(total.dtype).t()
    return torch.mm(matrix, total.view(16, -1)).view(9, out_channels, channels)
