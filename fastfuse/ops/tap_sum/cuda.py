"""tap_sum in CUDA C++ (csrc/cuda/tap_sum.h says what it covers); the rest runs in Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.launch_cuda import (
    DTYPES,
    MAX_BLOCKS,
    MAX_LEVELS,
    ImageStrides,
    Launch,
    are_aligned,
    are_vectors,
    dense,
    is_preferred,
    pointers,
)
from fastfuse.ops.launch_triton import cdiv, planned
from fastfuse.ops.tap_sum import triton

__all__ = ["backward", "backward_into", "forward", "forward_into"]

NAME = "tap_sum"
RATIOS, BACKWARD_RATIOS = (1, 2, 4, 8), (2, 4, 8)
MULTIPLE = 8  # of the output's sides, forward
VECTOR = 4  # channels of one access
BLOCK_ROWS, BACKWARD_BLOCK_ROWS, MAX_COLUMNS = 32, 4, 524280
MAX_BYTES = 2**32  # of an image

_Geometry = tuple[Any, ...]  # the op's last arguments
_Image = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
_INTEGERS = ("dtype", "batch", "channels", "height", "width")


class Level(ctypes.Structure):
    _fields_ = [("strides", ImageStrides), ("ratio", ctypes.c_int32), ("dtype", ctypes.c_int32)]

    @classmethod
    def of(cls, stride: Sequence[int], ratio: int, dtype: torch.dtype) -> Level:
        return cls(ImageStrides.of(stride), ratio, DTYPES[dtype])


class Sizes(ctypes.Structure):
    _fields_ = [
        ("out", ImageStrides),
        *[(name, ctypes.c_int32) for name in (*_INTEGERS, "accumulate", "num_levels", "unused")],
        ("levels", Level * MAX_LEVELS),
    ]


class BackwardSizes(ctypes.Structure):
    _fields_ = [
        ("grad_output", ImageStrides),
        *[(name, ctypes.c_int32) for name in (*_INTEGERS, "unused")],
        ("grad_taps", Level),
    ]


def _is_covered(image: _Image) -> bool:
    shape, stride, dtype = image
    return (
        dtype in DTYPES
        and are_vectors(shape[1], stride, VECTOR)
        and (stride[2] * shape[2] + stride[3] * shape[3]) * dtype.itemsize < MAX_BYTES
    )


def _levels(
    out: _Image, levels: Sequence[_Image], geometry: _Geometry, ratios: Sequence[int], rows: int
) -> list[Level] | None:
    """Where they are covered, by blocks of so many rows of the finest level or of the output."""
    height, width, kernel_size, padding, align_corners, channels_last = geometry
    if (
        not channels_last
        or (kernel_size, padding, align_corners) != (3, 1, False)
        or len(levels) > MAX_LEVELS
        or width > MAX_COLUMNS
        or out[0][0] * cdiv(height, rows) > MAX_BLOCKS
        or not _is_covered(out)
    ):
        return None
    found = []
    for image in levels:
        (*_, in_height, in_width), stride, dtype = image
        known = [r for r in ratios if (r * in_height, r * in_width) == (height, width)]
        if not known or dtype not in (out[2], torch.float32) or not _is_covered(image):
            return None
        found.append(Level.of(stride, known[0], dtype))
    return found


@planned
def _forward_launch(
    device: torch.device, out: _Image, images: tuple[_Image, ...], accumulate: bool,
    geometry: _Geometry,
) -> Launch | None:  # fmt: skip
    height, width = geometry[:2]
    levels = _levels(out, images, geometry, RATIOS, BLOCK_ROWS)
    if levels is None or height % MULTIPLE or width % MULTIPLE:
        return None
    (batch, channels, *_), stride, dtype = out
    sizes = Sizes(
        ImageStrides.of(stride), DTYPES[dtype], batch, channels, height, width, accumulate,
        len(levels), 0, (Level * MAX_LEVELS)(*levels),
    )  # fmt: skip
    return Launch("fastfuse_tap_sum", sizes, device)


def _image(tensor: Tensor) -> _Image:
    return tensor.shape, tensor.stride(), tensor.dtype


def forward_into(
    out: Tensor, taps: Sequence[Tensor], scales: Tensor | None, offsets: Tensor | None,
    bias: Tensor | None, accumulate: bool, *geometry: Any,
) -> None:  # fmt: skip
    launch = None
    if is_preferred(NAME, out.device) and out.numel() > 0 and are_aligned(out, *taps):
        images = tuple([_image(level) for level in taps])
        launch = _forward_launch(out.device, _image(out), images, accumulate, geometry)
    if launch is None:
        triton.forward_into(out, taps, scales, offsets, bias, accumulate, *geometry)
    else:
        launch(out, pointers(taps), dense(scales), dense(offsets), dense(bias))


def forward(taps: Tensor, offsets: Tensor | None, *geometry: Any) -> Tensor:
    return triton.forward(taps, offsets, *geometry, into=forward_into)


@planned
def _backward_launch(
    device: torch.device, grad_taps: _Image, grad_output: _Image, geometry: _Geometry
) -> Launch | None:
    (batch, channels, *_), stride, dtype = grad_output
    rows = BACKWARD_BLOCK_ROWS * BACKWARD_RATIOS[0]
    levels = _levels(grad_output, [grad_taps], geometry, BACKWARD_RATIOS, rows)
    if levels is None or grad_taps[2] != dtype:
        return None
    sizes = BackwardSizes(
        ImageStrides.of(stride), DTYPES[dtype], batch, channels, *geometry[:2], 0, levels[0]
    )
    return Launch("fastfuse_tap_sum_backward", sizes, device)


def backward_into(
    grad_taps: Tensor, grad_output: Tensor, scale: Tensor | None, *geometry: Any
) -> None:
    launch = None
    if (
        is_preferred(NAME, grad_taps.device)
        and grad_taps.numel() > 0
        and are_aligned(grad_taps, grad_output)
    ):
        launch = _backward_launch(
            grad_taps.device, _image(grad_taps), _image(grad_output), geometry
        )
    if launch is None:
        triton.backward_into(grad_taps, grad_output, scale, *geometry)
    else:
        launch(grad_taps, grad_output, scale)


def backward(grad_output: Tensor, in_height: int, in_width: int, *geometry: Any) -> Tensor:
    return triton.backward(grad_output, in_height, in_width, *geometry, into=backward_into)
