"""channels_last images, and weights as taps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.ops.memory import empty

__all__ = ["centered", "empty_image", "tap_weights"]


def centered(image: Tensor, center: Tensor | None) -> Tensor:
    """A channels_last image less a constant of shape (1,), rounded once."""
    if center is None:
        return image
    _, channels, *size = image.shape
    return torch.ops.fastfuse.upsample_equalize_concat(
        [image], *size, center, None, False,
        channels > 1,  # one channel is contiguous too, which PyTorch's sums of products prefer
    )  # fmt: skip


def empty_image(like: Tensor, *shape: int) -> Tensor:
    return empty(shape, like, torch.channels_last)


def tap_weights(weight: Tensor, outputs: slice, inputs: slice) -> Tensor:
    """The weights of a chunk of outputs as one product, (k * k * outputs, inputs), tap-major."""
    chunk = weight[outputs, inputs].permute(2, 3, 0, 1)
    return chunk.reshape(-1, chunk.shape[3])
