"""Memory formats: which one a set of images is in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["is_channels_last", "memory_format"]


def is_channels_last(images: Sequence[Tensor]) -> bool:
    """Whether the first image whose strides tell is channels_last.

    Images of one channel or one pixel are both; slices count as what they were cut from.

    >>> is_channels_last([torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)])
    True
    """
    for image in images:
        contiguous = image.is_contiguous()
        channels_last = image.is_contiguous(memory_format=torch.channels_last)
        if contiguous and channels_last:
            continue
        if contiguous or channels_last:
            return channels_last
        if image.shape[1] > 1:
            return image.stride(1) == 1 and image.stride(3) != 1
    return False


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
