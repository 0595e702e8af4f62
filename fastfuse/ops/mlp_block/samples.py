"""Inputs that exercise mlp_block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from fastfuse.ops.ced_block.samples import block_parameters, block_shapes
from fastfuse.ops.define import Sample
from fastfuse.ops.layout import is_channels_last, memory_format
from fastfuse.ops.mlp_block.reference import reference

__all__ = ["samples"]

# name: (N, C, H, W), hidden, with layer scale and keep, recompute
_SMALL = {"small": ((2, 3, 3, 4), 6, True, True)}
_LARGE = {
    "scaled": ((2, 24, 9, 13), 96, True, True),
    "kept": ((2, 24, 9, 13), 96, True, False),
    "plain": ((1, 17, 12, 11), 68, False, True),
    "one pixel": ((3, 12, 1, 1), 48, True, True),
}


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples; ``small`` ones have few enough values for gradcheck."""
    from fastfuse.ops.mlp_block import mlp_block

    generator = torch.Generator().manual_seed(0)
    for name, (shape, hidden, scaled, recompute) in (_SMALL if small else _LARGE).items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        x = x.contiguous(memory_format=memory_format(channels_last))
        shapes = block_shapes(shape[1], hidden, scaled, steps=0)
        shapes = {"norm_weight": shape[1:2], "norm_bias": shape[1:2], **shapes}
        parameters = block_parameters(shapes, generator, device, dtype)
        keep = None
        if scaled:
            keep = torch.arange(shape[0], device=device, dtype=dtype) * 0.5 + 0.75
        pixels = float(shape[0] * shape[2] * shape[3])
        yield Sample(
            name=name,
            inputs=(x, *parameters),
            call=partial(mlp_block, keep=keep, recompute=recompute),
            exact=partial(reference, keep=None if keep is None else keep.double()),
            channels_last=is_channels_last([x]),
            reduction=(8.0, *[max(pixels, 8.0)] * len(parameters)),
            output_reduction=8.0,
            roundings=3,  # of the norm and the hidden tensor, on the way
        )
