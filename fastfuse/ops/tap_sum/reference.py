"""The definition of tap_sum, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.bilinear import interpolate
from fastfuse.ops.layout import defined_memory_format, is_channels_last

__all__ = ["reference", "sum_of_shifted"]


def sum_of_shifted(
    taps: Tensor,
    offsets: Tensor | None,
    kernel_size: int,
    padding: int,
    upsample: Callable[[Tensor], Tensor],
) -> Tensor:
    """``out(p) = sum_k [p + k inside] (UP(taps[k]) + offsets[k])(p + k)``, k counted from -padding.

    Zero padding is the bracket: what a tap reads outside the upsampled map is 0.
    """
    k, channels = kernel_size, taps.shape[1] // kernel_size**2
    total: Tensor | None = None
    for tap in range(k * k):
        ky, kx = divmod(tap, k)
        channel = slice(tap * channels, (tap + 1) * channels)
        value = upsample(taps[:, channel])
        if offsets is not None:
            value = value + offsets[channel, None, None]
        padded = F.pad(value, (padding,) * 4)
        height, width = padded.shape[2] - (k - 1), padded.shape[3] - (k - 1)
        shifted = padded[:, :, ky : ky + height, kx : kx + width]
        total = shifted if total is None else total + shifted
    assert total is not None
    return total


def reference(
    taps: Tensor,
    offsets: Tensor | None,
    size: tuple[int, int],
    kernel_size: int,
    padding: int,
    align_corners: bool = False,
) -> Tensor:
    """The sum in the taps' dtype, accumulated in float32 for narrower ones."""
    accumulation = accumulation_dtype(taps.dtype)
    output = sum_of_shifted(
        taps.to(accumulation),
        None if offsets is None else offsets.to(accumulation),
        kernel_size,
        padding,
        lambda x: interpolate(x, size, align_corners=align_corners),
    )
    return defined_memory_format(output.to(taps.dtype), is_channels_last([taps]))
