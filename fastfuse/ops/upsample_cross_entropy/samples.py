"""Inputs that exercise upsample_cross_entropy, shared by ``verify`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.define import Sample
from fastfuse.ops.layout import memory_format

__all__ = ["samples"]

# name: (N, C, h, w), target size, weighted, smoothing
_SMALL: dict[str, Any] = {
    "up": ((2, 5, 3, 4), (7, 9), False, 0.0),
    "down, weighted and smoothed": ((1, 3, 6, 5), (2, 3), True, 0.2),
}
_LARGE: dict[str, Any] = {
    "ratio 4": ((2, 150, 12, 16), (48, 64), False, 0.0),
    "odd, weighted and smoothed": ((1, 19, 13, 7), (31, 40), True, 0.1),
    "two classes": ((2, 2, 4, 4), (9, 9), False, 0.0),  # of one all is 0: errors have no scale
    "one size": ((1, 21, 9, 11), (9, 11), True, 0.0),
    "one pixel": ((3, 33, 1, 1), (5, 6), False, 0.3),
    "down": ((1, 65, 30, 40), (11, 13), False, 0.0),
}
_IGNORED = 255


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples, some of whose pixels do not count; losses are rounded to the dtype."""
    from fastfuse.ops.upsample_cross_entropy import upsample_cross_entropy

    generator = torch.Generator().manual_seed(0)
    for name, (shape, size, weighted, smoothing) in (_SMALL if small else _LARGE).items():
        for align_corners in (False, True):
            logits = torch.randn(shape, generator=generator, dtype=torch.float64)
            logits = logits.to(device, dtype).contiguous(memory_format=memory_format(channels_last))
            target = torch.randint(shape[1], (shape[0], *size), generator=generator)
            target[torch.rand(target.shape, generator=generator) < 0.1] = _IGNORED
            target = target.to(device)
            weight = None
            if weighted:
                weight = (torch.rand(shape[1], generator=generator) + 0.5).to(device)
            options: Any = {
                "ignore_index": _IGNORED, "label_smoothing": smoothing, "reduction": "none",
            }  # fmt: skip

            def call(
                x: Tensor, target: Any = target, weight: Any = weight, options: Any = options,
                align: bool = align_corners,
            ) -> Tensor:  # fmt: skip
                loss = upsample_cross_entropy(
                    x, target, weight=weight, align_corners=align, **options
                )
                return loss[:, None].to(x.dtype)

            def exact(
                x: Tensor, target: Any = target, weight: Any = weight, options: Any = options,
                align: bool = align_corners,
            ) -> Tensor:  # fmt: skip
                up = interpolate_exactly(
                    x, tuple(target.shape[1:]), align_corners=align, coordinates=dtype
                )
                weight = None if weight is None else weight.double()
                return F.cross_entropy(up, target, weight, **options)[:, None]

            ratio = max(size[0] / shape[2] * size[1] / shape[3], 1.0)
            yield Sample(
                name=f"{name}, align_corners={align_corners}",
                inputs=(logits,),
                call=call,
                exact=exact,
                channels_last=False,
                reduction=8 * ratio,
                output_reduction=float(shape[1]),
            )
