"""Memory formats: which one a set of images is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastfuse import _extension
from fastfuse.backends import cpu_refusal, is_transformed, requested_backend
from fastfuse.ops.define import COMPILED, Derivative, Op

__all__ = [
    "as_image",
    "as_matrix",
    "defined_memory_format",
    "is_channels_last",
    "memory_format",
    "prefer_memory_format",
    "to_memory_format",
]


def is_channels_last(images: Sequence[Tensor]) -> bool:
    """Whether the first image whose strides tell is channels_last.

    Images of one channel or one pixel are both; slices count as what they were cut from.

    >>> is_channels_last([torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)])
    True
    """
    for image in images:
        _, channels, height, width = image.shape
        if channels == 1 or height * width == 1:
            continue
        to_next_pixel = image.stride(3) if width > 1 else image.stride(2)
        return 0 < image.stride(1) < to_next_pixel
    return False


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def to_memory_format(image: Tensor, channels_last: bool) -> Tensor:
    """The image in a memory format: itself where it is, else a copy; within kernels only.

    PyTorch's own conversion of dense CPU images takes several times as long.
    """
    wanted, other = memory_format(channels_last), memory_format(not channels_last)
    if image.is_contiguous(memory_format=wanted):
        return image
    dense = image.is_contiguous(memory_format=other)
    if dense and image.device.type == "cpu" and _extension.module is not None:
        return cast(Tensor, _copy["cpu"](image, channels_last))
    return image.contiguous(memory_format=wanted)


def defined_memory_format(image: Tensor, channels_last: bool) -> Tensor:
    """:func:`to_memory_format` for definitions, by PyTorch; in transforms, where images may be
    batches of images, the image as it is."""
    if is_transformed():
        return image
    return image.contiguous(memory_format=memory_format(channels_last))


def prefer_memory_format(image: Tensor, channels_last: bool) -> Tensor:
    """:func:`to_memory_format` for modules, with derivatives; by PyTorch where no kernel runs."""
    if requested_backend() != "reference" and cpu_refusal(image) is None:
        return to_memory_format(image, channels_last)
    return defined_memory_format(image, channels_last)


def _fake(image: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(image, memory_format=memory_format(channels_last))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.channels_last = inputs


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
    try:
        return prefer_memory_format(grad_output, not ctx.channels_last), None
    except RuntimeError as error:  # batched gradients have no memory format
        if "vmap" not in str(error):
            raise
        return grad_output, None


_copy = Op(
    "copy_layout(Tensor image, bool channels_last) -> Tensor",
    kernels={"cpu": COMPILED},
    fake=_fake,
    derivative=Derivative(_save, _gradients),
)


def as_matrix(image: Tensor) -> Tensor:
    """A dense channels_last image as the matrix (N * H * W, C), a row for each pixel."""
    batch, channels, height, width = image.shape
    return image.permute(0, 2, 3, 1).view(batch * height * width, channels)


def as_image(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Such a matrix as the channels_last image of a shape (N, C, H, W)."""
    batch, channels, height, width = shape
    return matrix.view(batch, height, width, channels).permute(0, 3, 1, 2)
