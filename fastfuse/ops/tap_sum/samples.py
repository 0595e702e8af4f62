"""Inputs that exercise tap_sum, shared by ``verify`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.define import Sample
from fastfuse.ops.layout import is_channels_last, memory_format
from fastfuse.ops.tap_sum.reference import sum_of_shifted

__all__ = ["exact", "samples"]

# name: (C, h, w), target size, kernel size, padding
_SMALL = {
    "ratio 2": ((2, 3, 4), (6, 8), 3, 1),
    "1x1": ((3, 2, 3), (5, 4), 1, 0),
}
_LARGE = {
    "ratio 2": ((32, 16, 16), (32, 32), 3, 1),
    "ratio 8": ((35, 5, 4), (40, 32), 3, 1),
    "odd sizes": ((7, 12, 17), (23, 31), 3, 1),
    "5x5": ((9, 7, 9), (20, 16), 5, 2),
    "1x1": ((33, 6, 5), (23, 29), 1, 0),
    "no padding": ((8, 6, 6), (12, 13), 3, 0),
    "wide padding": ((8, 5, 6), (11, 12), 3, 3),
    "downsampled": ((8, 19, 23), (9, 11), 3, 1),
    "same size": ((17, 9, 10), (9, 10), 3, 1),
    "one pixel": ((16, 1, 1), (14, 15), 3, 1),
    "one channel": ((1, 5, 6), (9, 13), 3, 1),
}


def exact(
    taps: Tensor,
    offsets: Tensor | None,
    size: tuple[int, int],
    kernel_size: int,
    padding: int,
    align_corners: bool,
    coordinates: torch.dtype,
) -> Tensor:
    """The definition in float64, at the coordinates of a dtype."""
    return sum_of_shifted(
        taps.double(),
        None if offsets is None else offsets.double(),
        kernel_size,
        padding,
        lambda x: interpolate_exactly(
            x, size, align_corners=align_corners, coordinates=coordinates
        ),
    )


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples; ``small`` ones have few enough values for gradcheck."""
    from fastfuse.ops.tap_sum import tap_sum

    generator = torch.Generator().manual_seed(0)
    for name, (shape, size, k, padding) in (_SMALL if small else _LARGE).items():
        for align_corners in (False, True):
            channels, height, width = shape
            taps, offsets = (
                torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype)
                for s in ((2, k * k * channels, height, width), (k * k * channels,))
            )
            taps = taps.contiguous(memory_format=memory_format(channels_last))
            how = {"kernel_size": k, "padding": padding, "align_corners": align_corners}
            yield Sample(
                name=f"{name}, align_corners={align_corners}",
                inputs=(taps, offsets),
                call=lambda t, o, size=size, how=how: tap_sum(t, size, offsets=o, **how),
                exact=lambda t, o, size=size, how=how: exact(t, o, size, **how, coordinates=dtype),
                channels_last=is_channels_last([taps]),
                reduction=(
                    max(1.0, 4 * size[0] * size[1] / (height * width)),
                    2.0 * size[0] * size[1],
                ),
            )
