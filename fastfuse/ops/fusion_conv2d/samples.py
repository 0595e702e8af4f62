"""Inputs that exercise fusion_conv2d, shared by ``verify`` and the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.define import Sample
from fastfuse.ops.layout import is_channels_last, memory_format
from fastfuse.ops.upsample_equalize_concat.samples import exact as concatenated

__all__ = ["exact", "samples"]

# name: levels (C, H, W), output channels, target size or None, kernel size, padding
_SMALL = {
    "at its own size": ([(2, 4, 6), (6, 2, 3)], 2, None, 3, 1),
    "at the target's": ([(2, 4, 6), (1, 5, 5)], 2, None, 3, 1),
    "1x1": ([(2, 4, 4), (12, 1, 1)], 2, None, 1, 0),
}
_LARGE = {
    "powers of two": ([(64, 16, 16), (64, 8, 8), (64, 4, 4), (64, 2, 2)], 64, None, 3, 1),
    "several of the size": ([(40, 18, 15), (40, 18, 15), (16, 3, 3)], 64, None, 3, 1),
    "larger than the size": ([(64, 17, 16), (48, 30, 31)], 64, (17, 16), 3, 2),
    "odd sizes": ([(35, 23, 31), (40, 12, 16), (7, 45, 60)], 33, (23, 31), 3, 1),
    "pooled": ([(48, 24, 24), (32, 1, 1), (32, 2, 2), (32, 3, 3), (32, 6, 6)], 40, None, 3, 1),
    "1x1": ([(64, 16, 24), (64, 8, 12), (64, 4, 6)], 32, None, 1, 0),
    "5x5": ([(16, 12, 14), (16, 6, 7)], 16, None, 5, 2),
    "no padding": ([(32, 16, 16), (32, 8, 8)], 24, None, 3, 0),
    "no level of the size": ([(64, 8, 8), (64, 4, 4)], 24, (24, 20), 3, 1),
    "one level": ([(24, 14, 11)], 16, None, 3, 1),
    "by Winograd": ([(64, 29, 30), (32, 7, 7)], 64, None, 3, 1),
    "wide padding": ([(40, 9, 8), (40, 3, 4)], 16, None, 3, 2),
}


def exact(
    features: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    size: tuple[int, int] | None,
    mean: list[float] | None,
    std: list[float] | None,
    padding: int,
    align_corners: bool,
    coordinates: torch.dtype,
) -> Tensor:
    """The definition in float64, at the coordinates of a dtype."""
    fused = concatenated(features, size, mean, std, align_corners, coordinates)
    return F.conv2d(fused, weight, bias, padding=padding)


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples; ``small`` ones have few enough values for gradcheck."""
    from fastfuse.ops.fusion_conv2d import fusion_conv2d

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return x.to(device=device, dtype=dtype)

    for name, (shapes, outputs, size, k, padding) in (_SMALL if small else _LARGE).items():
        for align_corners in (False, True):
            features = tuple(
                random(2, *shape).contiguous(memory_format=memory_format(channels_last))
                for shape in shapes
            )
            products = k * k * sum(shape[0] for shape in shapes)
            weight = random(outputs, products // (k * k), k, k, scale=products**-0.5)
            bias = random(outputs)
            mean = torch.randn(len(shapes), generator=generator).tolist()
            std = (torch.rand(len(shapes), generator=generator) + 0.5).tolist()
            target = size or (max(s[1] for s in shapes), max(s[2] for s in shapes))
            ratio = max(target[0] / s[1] * target[1] / s[2] for s in shapes)
            pixels = 2.0 * target[0] * target[1]
            how = {
                "size": size, "mean": mean, "std": std, "padding": padding,
                "align_corners": align_corners,
            }  # fmt: skip
            yield Sample(
                name=f"{name}, align_corners={align_corners}",
                inputs=(weight, bias, *features),
                call=lambda w, b, *f, how=how: fusion_conv2d(f, w, b, **how),
                exact=lambda w, b, *f, how=how: exact(f, w, b, **how, coordinates=dtype),
                channels_last=is_channels_last(features),
                reduction=(
                    pixels,
                    pixels,
                    *[max(1.0, ratio) * k * k * math.sqrt(outputs)] * len(features),
                ),
                output_reduction=math.sqrt(products),
                roundings=2,
            )
