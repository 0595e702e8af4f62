"""Inputs that exercise upsample_add, shared by ``verify`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.define import Sample
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["exact", "samples"]

# name: channels, x's size, skip's size
_SMALL = {
    "up": (3, (3, 2), (6, 5)),
    "down": (2, (5, 4), (3, 2)),
    "the same size": (2, (3, 2), (3, 2)),
}
_LARGE = {
    "power of two": (64, (8, 16), (16, 32)),
    "odd sizes": (35, (9, 11), (20, 23)),
    "up and down": (129, (5, 31), (13, 12)),
    "the same size": (33, (14, 15), (14, 15)),
    "the same height": (20, (12, 9), (12, 31)),
    "the same width": (18, (7, 40), (20, 40)),
    "one channel": (1, (13, 17), (20, 34)),
    "one pixel": (40, (3, 2), (1, 1)),
    "from one pixel": (7, (1, 1), (9, 20)),
    "large ratio": (20, (2, 3), (30, 66)),
}


def exact(x: Tensor, skip: Tensor, align_corners: bool, coordinates: torch.dtype) -> Tensor:
    """The definition in float64, at the coordinates of a dtype."""
    size = (skip.shape[2], skip.shape[3])
    return skip.double() + interpolate_exactly(
        x, size, align_corners=align_corners, coordinates=coordinates
    )


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples; ``small`` ones have few enough values for gradcheck."""
    from fastfuse.ops.upsample_add import upsample_add

    generator = torch.Generator().manual_seed(0)
    for i, (name, (channels, source, target)) in enumerate((_SMALL if small else _LARGE).items()):
        for align_corners in (False, True) if small else (i % 2 == 1,):
            x, skip = (
                torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
                .to(device=device, dtype=dtype)
                .contiguous(memory_format=memory_format(channels_last))
                for size in (source, target)
            )
            ratio = target[0] / source[0] * target[1] / source[1]
            yield Sample(
                name=f"{name}, align_corners={align_corners}",
                inputs=(x, skip),
                call=lambda x, skip, align=align_corners: upsample_add(
                    x, skip, align_corners=align
                ),
                exact=lambda x, skip, align=align_corners: exact(x, skip, align, dtype),
                channels_last=is_channels_last([x, skip]),
                reduction=(max(1.0, 4 * ratio), 1.0),
            )
