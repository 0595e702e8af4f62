"""Inputs that exercise upsample_equalize_concat, shared by ``verify`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.define import Sample
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["exact", "samples"]

# name: levels (C, H, W), target size or None
_SMALL = {
    "pyramid": ([(3, 8, 6), (5, 4, 3), (2, 2, 2)], None),
    "up and down": ([(4, 3, 5), (1, 9, 7), (2, 1, 1)], (7, 4)),
}
_LARGE = {
    "powers of two": ([(64, 32, 32), (64, 16, 16), (64, 8, 8), (64, 4, 4)], None),
    "odd sizes": ([(35, 23, 31), (129, 12, 16), (7, 45, 60)], (23, 31)),
    "pooled": ([(48, 24, 24), (16, 1, 1), (16, 2, 2), (16, 3, 3), (16, 6, 6)], None),
    "one channel": ([(1, 13, 17), (1, 5, 40)], (20, 34)),
    "one pixel": ([(33, 1, 1), (40, 3, 2)], (1, 1)),
    "large ratios": ([(20, 2, 3), (20, 61, 67)], (60, 66)),
}


def exact(
    features: tuple[Tensor, ...],
    size: tuple[int, int] | None,
    mean: list[float] | None,
    std: list[float] | None,
    align_corners: bool,
    coordinates: torch.dtype,
) -> Tensor:
    """The definition in float64, at the coordinates of a dtype."""
    if size is None:
        size = (max(f.shape[2] for f in features), max(f.shape[3] for f in features))
    levels = [
        interpolate_exactly(f, size, align_corners=align_corners, coordinates=coordinates)
        for f in features
    ]
    if mean is not None:
        levels = [level - m for level, m in zip(levels, mean, strict=True)]
    if std is not None:
        levels = [level / s for level, s in zip(levels, std, strict=True)]
    return torch.cat(levels, dim=1)


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples; ``small`` ones have few enough values for gradcheck."""
    from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

    generator = torch.Generator().manual_seed(0)
    for name, (shapes, size) in (_SMALL if small else _LARGE).items():
        for align_corners in (False, True):
            features = tuple(
                torch.randn(2, *shape, generator=generator, dtype=torch.float64)
                .to(device=device, dtype=dtype)
                .contiguous(memory_format=memory_format(channels_last))
                for shape in shapes
            )
            mean = torch.randn(len(shapes), generator=generator).tolist()
            std = (torch.rand(len(shapes), generator=generator) + 0.5).tolist()
            target = size or (max(s[1] for s in shapes), max(s[2] for s in shapes))
            ratio = max(target[0] / s[1] * target[1] / s[2] for s in shapes)
            yield Sample(
                name=f"{name}, align_corners={align_corners}",
                inputs=features,
                call=lambda *f, size=size, mean=mean, std=std, align=align_corners: (
                    upsample_equalize_concat(f, size=size, mean=mean, std=std, align_corners=align)
                ),
                exact=lambda *f, size=size, mean=mean, std=std, align=align_corners: exact(
                    f, size, mean, std, align, dtype
                ),
                channels_last=is_channels_last(features),
                reduction=max(1.0, 4 * ratio),
            )
