"""tap_sum in CUDA C++ (csrc/cuda/tap_sum.h says what it covers); the rest runs in Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.launch_cuda import (
    DTYPES,
    MAX_IMAGES,
    MAX_LEVELS,
    ImageStrides,
    Launch,
    are_aligned,
    are_vectors,
    is_preferred,
    pointers,
)
from fastfuse.ops.launch_triton import planned
from fastfuse.ops.tap_sum import triton

__all__ = ["backward", "backward_into", "forward", "forward_into"]

NAME = "tap_sum"
RATIOS, BACKWARD_RATIOS = (1, 2, 4, 8), (2, 4, 8)
MULTIPLE = 8  # of the output's sides

_Geometry = tuple[Any, ...]  # the op's last arguments


class Level(ctypes.Structure):
    _fields_ = [
        ("strides", ImageStrides),
        *[(name, ctypes.c_int32) for name in ("height", "width", "dtype", "unused")],
    ]

    @classmethod
    def of(cls, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Level:
        return cls(ImageStrides.of(stride), *shape[2:], DTYPES[dtype], 0)


class Sizes(ctypes.Structure):
    _fields_ = [
        ("out", ImageStrides),
        *[(name, ctypes.c_int32) for name in ("dtype", "batch", "channels", "height", "width")],
        *[(name, ctypes.c_int32) for name in ("accumulate", "num_levels", "unused")],
        ("levels", Level * MAX_LEVELS),
    ]


class BackwardSizes(ctypes.Structure):
    _fields_ = [
        ("grad_output", ImageStrides),
        *[(name, ctypes.c_int32) for name in ("dtype", "batch", "channels", "height", "width")],
        ("unused", ctypes.c_int32),
        ("grad_taps", Level),
    ]


def _covers_output(
    dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], geometry: _Geometry
) -> bool:
    height, width, kernel_size, padding, align_corners, channels_last = geometry
    return (
        channels_last
        and (kernel_size, padding, align_corners) == (3, 1, False)
        and dtype in DTYPES
        and shape[0] <= MAX_IMAGES
        and height % MULTIPLE == width % MULTIPLE == 0
        and are_vectors(shape[1], stride, dtype)
    )


def _covers_level(
    shape: Sequence[int], stride: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype],
    geometry: _Geometry, ratios: Sequence[int],
) -> bool:  # fmt: skip
    """``dtypes``: the level's, and the output's, whose vectors it has."""
    (height, width), (in_height, in_width) = geometry[:2], shape[2:]
    return (
        any((ratio * in_height, ratio * in_width) == (height, width) for ratio in ratios)
        and dtypes[0] in (dtypes[1], torch.float32)
        and are_vectors(shape[1], stride, dtypes[1])
    )


@planned
def _forward_launch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...],
    levels: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...], accumulate: bool,
    geometry: _Geometry,
) -> Launch | None:  # fmt: skip
    """``levels``: shape, strides and dtype of each."""
    if len(levels) > MAX_LEVELS or not _covers_output(dtype, shape, stride, geometry):
        return None
    for level_shape, level_stride, level_dtype in levels:
        dtypes = level_dtype, dtype
        if not _covers_level(level_shape, level_stride, dtypes, geometry, RATIOS):
            return None
    batch, channels = shape[:2]
    sizes = Sizes(
        ImageStrides.of(stride), DTYPES[dtype], batch, channels, *geometry[:2], accumulate,
        len(levels), 0, (Level * MAX_LEVELS)(*[Level.of(*level) for level in levels]),
    )  # fmt: skip
    return Launch("fastfuse_tap_sum", sizes, device)


def forward_into(
    out: Tensor, taps: Sequence[Tensor], scales: Tensor | None, offsets: Tensor | None,
    bias: Tensor | None, accumulate: bool, *geometry: Any,
) -> None:  # fmt: skip
    launch = None
    if is_preferred(NAME) and out.numel() > 0 and are_aligned(out, *taps):
        launch = _forward_launch(
            out.device, out.dtype, out.shape, out.stride(),
            tuple([(level.shape, level.stride(), level.dtype) for level in taps]), accumulate,
            geometry,
        )  # fmt: skip
    if launch is None:
        triton.forward_into(out, taps, scales, offsets, bias, accumulate, *geometry)
    else:
        vectors = [None if v is None else v.contiguous() for v in (scales, offsets, bias)]
        launch(out, pointers(taps), *vectors)


def forward(taps: Tensor, offsets: Tensor | None, *geometry: Any) -> Tensor:
    return triton.forward(taps, offsets, *geometry, into=forward_into)


@planned
def _backward_launch(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...],
    stride: tuple[int, ...], out_shape: tuple[int, ...], out_stride: tuple[int, ...],
    geometry: _Geometry,
) -> Launch | None:  # fmt: skip
    """Of the gradient of taps, and of the output's."""
    dtype = dtypes[1]
    if dtypes[0] != dtype or not (
        _covers_output(dtype, out_shape, out_stride, geometry)
        and _covers_level(shape, stride, dtypes, geometry, BACKWARD_RATIOS)
    ):
        return None
    batch, channels = out_shape[:2]
    sizes = BackwardSizes(
        ImageStrides.of(out_stride), DTYPES[dtype], batch, channels, *geometry[:2], 0,
        Level.of(shape, stride, dtype),
    )  # fmt: skip
    return Launch("fastfuse_tap_sum_backward", sizes, device)


def backward_into(
    grad_taps: Tensor, grad_output: Tensor, scale: Tensor | None, *geometry: Any
) -> None:
    launch = None
    if is_preferred(NAME) and grad_taps.numel() > 0 and are_aligned(grad_taps, grad_output):
        launch = _backward_launch(
            grad_taps.device, (grad_taps.dtype, grad_output.dtype), grad_taps.shape,
            grad_taps.stride(), grad_output.shape, grad_output.stride(), geometry,
        )  # fmt: skip
    if launch is None:
        triton.backward_into(grad_taps, grad_output, scale, *geometry)
    else:
        launch(grad_taps, grad_output, scale)


def backward(grad_output: Tensor, in_height: int, in_width: int, *geometry: Any) -> Tensor:
    return triton.backward(grad_output, in_height, in_width, *geometry, into=backward_into)
