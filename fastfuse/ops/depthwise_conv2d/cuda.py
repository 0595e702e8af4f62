"""depthwise_conv2d in CUDA C++ (csrc/cuda/depthwise_conv2d.h says what it covers); the rest runs in
Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse import _cuda
from fastfuse.ops.depthwise_conv2d import triton
from fastfuse.ops.launch_cuda import (
    ALIGNMENT,
    DTYPES,
    ImageStrides,
    Launch,
    are_aligned,
    are_vectors,
    channels_last_strides,
    dense,
    is_preferred,
)
from fastfuse.ops.launch_triton import planned

__all__ = ["backward_weight", "forward"]

NAME = "depthwise_conv2d"
KERNEL_SIZES = (3, 5, 7)
MAX_ROWS = 2**30  # of a batch
MAX_PIXELS_STRIDE = 2**26  # of neighbours in a kernel: a thread's next fits 32 bits


class Sizes(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("dtype", "bias_dtype")],
        *[(name, ctypes.c_int32) for name in ("batch", "channels", "height", "width")],
        *[(name, ctypes.c_int32) for name in ("kernel_size", "dilation", "flip")],
        *[(name, ImageStrides) for name in ("x", "out", "addend")],
    ]


def _sizes(
    dtypes: tuple[torch.dtype, torch.dtype], shape: Sequence[int],
    strides: tuple[Sequence[int], ...], kernel_size: int, dilation: int, flip: bool,
) -> Sizes | None:  # fmt: skip
    """Where they are covered. ``dtypes``: of images and bias; ``strides``: of x, of the output or
    its gradient, of the addend."""
    dtype, bias_dtype = dtypes
    dilation = min(dilation, max(shape[2:]))  # what is beyond is outside
    if (
        dtype not in DTYPES
        or bias_dtype not in (dtype, torch.float32)
        or kernel_size not in KERNEL_SIZES
        or shape[0] * shape[2] >= MAX_ROWS
        or dilation * max(stride[3] for stride in strides) >= MAX_PIXELS_STRIDE
        or not all(are_vectors(shape[1], stride, ALIGNMENT // dtype.itemsize) for stride in strides)
    ):
        return None
    return Sizes(
        DTYPES[dtype], DTYPES[bias_dtype], *shape, kernel_size, dilation, flip,
        *[ImageStrides.of(stride) for stride in strides],
    )  # fmt: skip


@planned
def _forward_launch(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...],
    stride: tuple[int, ...], addend_stride: tuple[int, ...] | None, kernel_size: int,
    dilation: int, flip: bool,
) -> Launch | None:  # fmt: skip
    out_stride = channels_last_strides(shape)
    strides = stride, out_stride, addend_stride or out_stride
    sizes = _sizes(dtypes, shape, strides, kernel_size, dilation, flip)
    return None if sizes is None else Launch("fastfuse_depthwise_conv2d", sizes, device)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None,
    dilation: int, flip: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    if channels_last and is_preferred(NAME, x.device) and x.numel() > 0 and are_aligned(x, addend):
        bias_dtype = x.dtype if bias is None else bias.dtype
        added = None if addend is None else addend.stride()
        launch = _forward_launch(
            x.device, (x.dtype, bias_dtype), x.shape, x.stride(), added, weight.shape[2], dilation,
            flip,
        )  # fmt: skip
        if launch is not None:
            out = torch.empty(
                x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
            )
            launch(out, x, dense(weight), dense(bias), addend)
            return out
    return triton.forward(x, weight, bias, addend, dilation, flip, channels_last)


@planned
def _backward_weight_launch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...], kernel_size: int, dilation: int,
) -> tuple[int, Launch] | None:  # fmt: skip
    """How many partial sums there are, and the launch."""
    sizes = _sizes((dtype, dtype), shape, strides, kernel_size, dilation, False)
    if sizes is None:
        return None
    assert _cuda.library is not None
    chunks = _cuda.library.fastfuse_depthwise_conv2d_chunks(ctypes.byref(sizes))
    return chunks, Launch("fastfuse_depthwise_conv2d_backward_weight", sizes, device)


def backward_weight(
    grad_output: Tensor, x: Tensor, kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    plan = None
    if is_preferred(NAME, x.device) and x.numel() > 0 and are_aligned(grad_output, x):
        strides = x.stride(), grad_output.stride(), x.stride()
        plan = _backward_weight_launch(x.device, x.dtype, x.shape, strides, kernel_size, dilation)
    if plan is None:
        return triton.backward_weight(grad_output, x, kernel_size, dilation)
    chunks, launch = plan
    channels = x.shape[1]
    shape = chunks, kernel_size**2 + 1, channels
    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    grad_weight, grad_bias = triton.empty_gradients(x, kernel_size)
    launch(partials, grad_weight, grad_bias, grad_output, x)
    return grad_weight, grad_bias
