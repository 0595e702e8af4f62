"""Inputs that exercise upsample_argmax, shared by ``verify`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.define import Sample
from fastfuse.ops.layout import memory_format

__all__ = ["samples"]

# name: (N, C, h, w), target size
_SMALL = {
    "up": ((2, 5, 3, 4), (7, 9)),
    "down": ((1, 3, 6, 5), (2, 3)),
}
_LARGE = {
    "ratio 4": ((2, 150, 12, 16), (48, 64)),
    "odd": ((1, 19, 13, 7), (31, 40)),
    "one class": ((2, 1, 4, 4), (9, 9)),
    "one size": ((1, 21, 9, 11), (9, 11)),
    "one pixel": ((3, 33, 1, 1), (5, 6)),
    "down": ((1, 65, 30, 40), (11, 13)),
}


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples, judged by the exact value of the class chosen, beside the largest, and by its
    confidence."""
    from fastfuse.ops.upsample_argmax import upsample_argmax

    generator = torch.Generator().manual_seed(0)
    for name, (shape, size) in (_SMALL if small else _LARGE).items():
        for align_corners in (False, True):
            logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            logits = logits.to(device, dtype).contiguous(memory_format=memory_format(channels_last))
            options: Any = {"size": size, "align_corners": align_corners}

            values = interpolate_exactly(
                logits.double(), size, align_corners=align_corners, coordinates=dtype
            )

            def chosen(x: Tensor, options: Any = options, values: Tensor = values) -> Tensor:
                labels = upsample_argmax(x, **options)
                assert isinstance(labels, Tensor)
                return values.gather(1, labels[:, None]).to(x.dtype)

            def confidence(x: Tensor, options: Any = options) -> Tensor:
                _, found = upsample_argmax(x, **options, return_confidence=True)
                return found[:, None].to(x.dtype)

            shared: Any = {"inputs": (logits,), "channels_last": False, "differentiable": False}
            name = f"{name}, align_corners={align_corners}"
            yield Sample(
                name=name,
                call=chosen,
                exact=lambda x, values=values: values.amax(1, keepdim=True),
                **shared,
            )
            yield Sample(
                name=f"{name}, confidence",
                call=confidence,
                exact=lambda x, values=values: values.softmax(1).amax(1, keepdim=True),
                output_reduction=float(shape[1]),
                **shared,
            )
