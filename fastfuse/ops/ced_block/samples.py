"""Inputs that exercise ced_block, shared by ``verify`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastfuse.ops.ced_block.reference import reference
from fastfuse.ops.define import Sample
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["block_parameters", "block_shapes", "samples"]

# name: (N, C, H, W), hidden, with layer scale and keep, recompute
_SMALL = {"small": ((2, 3, 3, 4), 6, True, True)}
_LARGE = {
    "scaled": ((2, 24, 9, 13), 96, True, True),
    "kept": ((2, 24, 9, 13), 96, True, False),
    "plain": ((1, 17, 12, 11), 68, False, True),
    "several chunks": ((1, 8, 40, 45), 1024, True, True),
    "one pixel": ((3, 12, 1, 1), 48, True, True),
}


def block_parameters(
    shapes: dict[str, tuple[int, ...]],
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Random ones at which every step is of order one; of norms the weights are around one."""
    parameters = []
    for name, shape in shapes.items():
        fan_in = 1
        for extent in shape[1:]:
            fan_in *= extent
        value = torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5
        if name.startswith("norm") and name.endswith("weight"):
            value = 1 + 0.2 * value
        parameters.append(value.to(device, dtype))
    return parameters


def block_shapes(
    channels: int, hidden: int, scaled: bool, steps: int = 1
) -> dict[str, tuple[int, ...]]:
    """Of a block's parameters, in their order; an LR block has two convolutions and norms."""
    shapes: dict[str, tuple[int, ...]] = {}
    for step in ("", "2")[:steps]:
        shapes[f"dw{step}_weight"] = (channels, 1, 7, 7)
        shapes[f"dw{step}_bias"] = (channels,)
        shapes[f"norm{step}_weight"] = (channels,)
        shapes[f"norm{step}_bias"] = (channels,)
    shapes["fc1_weight"], shapes["fc1_bias"] = (hidden, channels), (hidden,)
    shapes["fc2_weight"], shapes["fc2_bias"] = (channels, hidden), (channels,)
    if scaled:
        shapes["layer_scale"] = (channels,)
    return shapes


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples; ``small`` ones have few enough values for gradcheck."""
    from fastfuse.ops.ced_block import ced_block

    generator = torch.Generator().manual_seed(0)
    for name, (shape, hidden, scaled, recompute) in (_SMALL if small else _LARGE).items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        x = x.contiguous(memory_format=memory_format(channels_last))
        shapes = block_shapes(shape[1], hidden, scaled)
        parameters = block_parameters(shapes, generator, device, dtype)
        keep = None
        if scaled:
            keep = torch.arange(shape[0], device=device, dtype=dtype) * 0.5 + 0.75
        pixels = float(shape[0] * shape[2] * shape[3])
        yield Sample(
            name=name,
            inputs=(x, *parameters),
            call=partial(ced_block, keep=keep, recompute=recompute),
            exact=partial(reference, keep=None if keep is None else keep.double()),
            channels_last=is_channels_last([x]),
            reduction=(8.0, *[max(pixels, 8.0)] * len(parameters)),
            output_reduction=8.0,
            roundings=3,  # of the convolution, the norm and the hidden tensor, on the way
        )  # fmt: skip
