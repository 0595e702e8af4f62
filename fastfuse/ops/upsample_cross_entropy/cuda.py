"""upsample_cross_entropy in CUDA C++ (csrc/cuda/upsample_cross_entropy.h says what it covers); the
rest runs in Triton."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastfuse.ops.launch_cuda import DTYPES, Launch, channels_last_strides, is_preferred
from fastfuse.ops.launch_triton import memory_format, planned
from fastfuse.ops.strip_triton import are_classes_innermost
from fastfuse.ops.upsample_cross_entropy import triton

__all__ = ["backward", "forward"]

NAME = "upsample_cross_entropy"
RATIOS, MAX_CLASSES = (2, 4, 8), 1024
MAX_STRIDE = 2**27  # of rows and columns: of a tile's, 15 times that fits 32 bits


class LogitsStrides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("image", "channel", "row", "column")]


class Sizes(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("dtype", "batch", "classes")],
        *[(name, ctypes.c_int32) for name in ("in_height", "in_width", "ratio")],
        ("classes_innermost", ctypes.c_int32),
        ("label_smoothing", ctypes.c_float),
        ("ignore_index", ctypes.c_int64),
        *[(name, LogitsStrides) for name in ("logits", "grad_logits")],
        *[(name, ctypes.c_int64) for name in ("grad_image", "grad_row", "grad_column")],
    ]


@planned
def _launch(
    function: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...],
    stride: tuple[int, ...], size: tuple[int, int], grad_stride: tuple[int, ...],
    ignore_index: int, label_smoothing: float, align_corners: bool, channels_last: bool,
) -> Launch | None:  # fmt: skip
    """``channels_last``: of the logits forward, of their gradient, which is dense, backward."""
    batch, classes, in_height, in_width = shape
    pixels = in_height * in_width
    grad_logits_stride = (classes * pixels, pixels, in_width, 1)
    if channels_last:
        grad_logits_stride = channels_last_strides(shape)
    known = [r for r in RATIOS if (r * in_height, r * in_width) == tuple(size)]
    if align_corners or not known or classes > MAX_CLASSES or dtype not in DTYPES:
        return None
    if max(*stride[2:], *grad_logits_stride[2:], *grad_stride[1:]) >= MAX_STRIDE:
        return None
    sizes = Sizes(
        DTYPES[dtype], batch, classes, in_height, in_width, known[0],
        channels_last, label_smoothing, ignore_index,
        LogitsStrides(*stride), LogitsStrides(*grad_logits_stride), *grad_stride,
    )  # fmt: skip
    return Launch(f"fastfuse_{function}", sizes, device)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, align_corners: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = None
    if is_preferred(NAME, logits.device) and target.numel() > 0:
        launch = _launch(
            "upsample_cross_entropy", logits.device, logits.dtype, logits.shape, logits.stride(),
            target.shape[1:], target.stride(), ignore_index, label_smoothing, align_corners,
            are_classes_innermost(logits),
        )  # fmt: skip
    if launch is None:
        return triton.forward(logits, target, weight, ignore_index, label_smoothing, align_corners)
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    logsumexp = torch.empty_like(loss)
    weight = None if weight is None else weight.contiguous()
    weight_sum = triton.sum_of(weight, label_smoothing)
    launch(loss, logsumexp, logits, target.contiguous(), weight, weight_sum)
    return loss, logsumexp


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, logsumexp: Tensor,
    ignore_index: int, label_smoothing: float, align_corners: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    launch = None
    if is_preferred(NAME, logits.device) and logits.numel() > 0:
        launch = _launch(
            "upsample_cross_entropy_backward", logits.device, logits.dtype, logits.shape,
            channels_last_strides(logits.shape), target.shape[1:], grad.stride(), ignore_index,
            label_smoothing, align_corners, channels_last,
        )  # fmt: skip
    if launch is None:
        return triton.backward(
            grad, logits, target, weight, logsumexp, ignore_index, label_smoothing, align_corners,
            channels_last,
        )  # fmt: skip
    grad_logits = torch.empty(
        logits.shape, dtype=logits.dtype, device=logits.device,
        memory_format=memory_format(channels_last),
    )  # fmt: skip
    logits = logits.contiguous(memory_format=torch.channels_last)  # lanes are classes
    weight = None if weight is None else weight.contiguous()
    weight_sum = triton.sum_of(weight, label_smoothing)
    launch(
        grad_logits, grad, logits, target.contiguous(), weight, weight_sum, logsumexp.contiguous()
    )
    return grad_logits
