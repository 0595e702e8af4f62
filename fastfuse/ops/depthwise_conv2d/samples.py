"""Inputs that exercise depthwise_conv2d, shared by ``verify`` and the tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastfuse.ops.define import Sample
from fastfuse.ops.depthwise_conv2d.reference import reference
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["samples"]

# name: (N, C, H, W), k, dilation, with bias
_SMALL = {
    "7x7": ((2, 3, 4, 5), 7, 1, True),
    "3x3 dilated": ((1, 2, 5, 4), 3, 2, False),
}
_LARGE = {
    "7x7": ((2, 40, 20, 24), 7, 1, True),
    "7x7 dilated": ((1, 33, 25, 23), 7, 3, True),
    "5x5": ((1, 16, 17, 18), 5, 1, True),
    "5x5 dilated": ((2, 7, 13, 12), 5, 2, False),
    "3x3": ((1, 24, 19, 37), 3, 1, True),
    "3x3 dilated": ((1, 20, 40, 21), 3, 12, False),
    "9x9": ((1, 18, 14, 15), 9, 2, True),
    "1x1": ((2, 17, 5, 6), 1, 1, True),
    "smaller than the reach": ((1, 19, 3, 2), 7, 3, True),
    "one pixel": ((2, 5, 1, 1), 7, 1, True),
    "one channel": ((1, 1, 11, 13), 7, 1, True),
    "wide": ((1, 8, 6, 150), 7, 1, True),
}


def samples(
    *, device: torch.device | str, dtype: torch.dtype, channels_last: bool, small: bool = False
) -> Iterator[Sample]:
    """Random samples; ``small`` ones have few enough values for gradcheck."""
    from fastfuse.ops.depthwise_conv2d import depthwise_conv2d

    generator = torch.Generator().manual_seed(0)
    for name, (shape, k, dilation, with_bias) in (_SMALL if small else _LARGE).items():
        shapes = [shape, (shape[1], 1, k, k), (shape[1],)][: 3 if with_bias else 2]
        x, *parameters = (
            torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype)
            for s in shapes
        )
        x = x.contiguous(memory_format=memory_format(channels_last))
        pixels = float(shape[0] * shape[2] * shape[3])
        yield Sample(
            name=name,
            inputs=(x, *parameters),
            call=lambda x, w, b=None, d=dilation: depthwise_conv2d(x, w, b, dilation=d),
            exact=lambda x, w, b=None, d=dilation: reference(x, w, b, d),
            channels_last=is_channels_last([x]),
            reduction=(1.0, pixels, pixels)[: len(shapes)],
        )
