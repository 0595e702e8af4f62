"""Calls of GPU kernels at the shapes of the benchmarks, on tensors that need no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.pointwise import linear
from fastfuse.ops.pointwise import triton as pointwise
from fastfuse.ops.upsample_add import triton as add
from fastfuse.ops.upsample_argmax import triton as argmax
from fastfuse.ops.upsample_equalize_concat import triton as concat

CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"
BOTH_DTYPES = ("bfloat16", "float32")

# Levels by channels and side, target first; batches of 2.
UPER = ((512, 128), (512, 64), (512, 32), (512, 16))
PSP = ((2048, 64), (512, 1), (512, 2), (512, 3), (512, 6))
# Own levels of a fusion of 512 output channels by a kernel of 3: their sides, the target's.
UPER_TAPS = ((64, 32, 16), 128)
PSP_TAPS = ((1, 2, 3, 6), 64)
FUSED_CHANNELS, TAPS_KERNEL = 512, 3
# Of CEDNet-T's second stage: batch, channels, side, and the hidden channels of its MLP.
BLOCK = (16, 192, 64)
HIDDEN = 768
# Classes, height and width of logits and of what they are upsampled to.
ADE = (150, (128, 128), (512, 512))
CAMVID = (19, (90, 120), (360, 480))
BATCH = 2


Call = Callable[[str, torch.dtype], Any]


def _room(op: str, backend: str) -> Any:
    """Its launchers: of the same signatures."""
    return import_module(f"fastfuse.ops.{op}.{backend}")


@dataclass(frozen=True)
class Case:
    """What ``call`` calls for a layout and a dtype; ``cuda`` is its twin in CUDA C++."""

    name: str
    call: Call
    layouts: tuple[str, ...] = (CHANNELS_LAST,)
    dtypes: tuple[str, ...] = BOTH_DTYPES
    cuda: Call | None = None
    cuda_layouts: tuple[str, ...] = (CHANNELS_LAST,)
    counted_on: int = 90  # the architecture whose code is run
    backend: str = "triton"


def image(shape: Sequence[int], layout: str, dtype: torch.dtype) -> Tensor:
    memory_format = getattr(torch, f"{layout}_format" if layout == CONTIGUOUS else layout)
    return torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=memory_format)


def _vector(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _levels(levels: Sequence[tuple[int, int]], layout: str, dtype: torch.dtype) -> list[Tensor]:
    return [image((BATCH, channels, side, side), layout, dtype) for channels, side in levels]


def _concat_forward(levels: Sequence[tuple[int, int]]) -> Call:
    side, count = levels[0][1], len(levels)
    return lambda layout, dtype: concat.forward(
        _levels(levels, layout, dtype), side, side, _vector(count), _vector(count), False,
        layout == CHANNELS_LAST,
    )  # fmt: skip


def _concat_backward(levels: Sequence[tuple[int, int]]) -> Call:
    channels, sides = [c for c, _ in levels], [side for _, side in levels]
    offsets = [sum(channels[:i]) for i in range(len(levels))]
    shape = (BATCH, sum(channels), sides[0], sides[0])
    return lambda layout, dtype: concat.backward(
        image(shape, layout, dtype), offsets, channels, sides, sides, _vector(len(levels)), False,
        layout == CHANNELS_LAST,
    )  # fmt: skip


def _taps(
    sides: Sequence[int], target: int, layout: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], tuple[Any, ...]]:
    out = image((BATCH, FUSED_CHANNELS, target, target), layout, dtype)
    channels = TAPS_KERNEL**2 * FUSED_CHANNELS
    taps = _levels([(channels, side) for side in sides], layout, dtype)
    padding = TAPS_KERNEL // 2
    geometry = (target, target, TAPS_KERNEL, padding, False, layout == CHANNELS_LAST)
    return out, taps, geometry


def _tap_sum_forward(sides: Sequence[int], target: int, backend: str) -> Call:
    """Of all levels onto what the level of the target's size has given."""
    room = _room("tap_sum", backend)

    def call(layout: str, dtype: torch.dtype) -> None:
        out, taps, geometry = _taps(sides, target, layout, dtype)
        room.forward_into(out, taps, None, None, None, True, *geometry)

    return call


def _tap_sum_backward(sides: Sequence[int], target: int, backend: str) -> Call:
    room = _room("tap_sum", backend)

    def call(layout: str, dtype: torch.dtype) -> None:
        out, taps, geometry = _taps(sides, target, layout, dtype)
        for level in taps:
            room.backward_into(level, out, None, *geometry)

    return call


def _depthwise(kernel_size: int, dilation: int, which: str, backend: str) -> Call:
    batch, channels, side = BLOCK
    room = _room("depthwise_conv2d", backend)

    def call(layout: str, dtype: torch.dtype) -> None:
        x = image((batch, channels, side, side), layout, dtype)
        weight = torch.empty(channels, 1, kernel_size, kernel_size, dtype=dtype, device="meta")
        bias = torch.empty(channels, dtype=dtype, device="meta")
        is_last = layout == CHANNELS_LAST
        if which == "forward":
            room.forward(x, weight, bias, None, dilation, False, is_last)
        elif which == "input":
            room.forward(x, weight, None, x, dilation, True, is_last)
        else:
            room.backward_weight(x, x.clone(), kernel_size, dilation)

    return call


def _rows(dtype: torch.dtype, channels: int) -> Tensor:
    batch, _, side = BLOCK
    return torch.empty(batch * side**2, channels, dtype=dtype, device="meta")


def _layer_norm(layout: str, dtype: torch.dtype) -> None:
    x, v = _rows(dtype, BLOCK[1]), _vector(BLOCK[1])
    pointwise.layer_norm_into(torch.empty_like(x), x, v, v, 1e-6, None, False)


def _layer_norm_backward(layout: str, dtype: torch.dtype) -> None:
    x, v = _rows(dtype, BLOCK[1]), _vector(BLOCK[1])
    grad, out = torch.empty_like(x), torch.empty_like(x)
    pointwise.layer_norm_backward_into(
        out, _vector(len(v)), _vector(len(v)), grad, x, v, v, 1e-6, False
    )


def _bias_gelu(layout: str, dtype: torch.dtype) -> None:
    hidden = _rows(dtype, HIDDEN)
    pointwise.bias_gelu_into(hidden, hidden, _vector(HIDDEN))


def _bias_gelu_backward(layout: str, dtype: torch.dtype) -> None:
    hidden, grad = _rows(dtype, HIDDEN), _rows(dtype, HIDDEN)
    pointwise.bias_gelu_backward_into(grad, hidden, _vector(HIDDEN), hidden, _vector(HIDDEN))


def _residual(layout: str, dtype: torch.dtype) -> None:
    batch, channels, side = BLOCK
    x, product = _rows(dtype, channels), _rows(dtype, channels)
    v, out = _vector(channels), torch.empty_like(x)
    pointwise.residual_into(out, x, product, v, v, _vector(batch), side**2, 0)


def _residual_backward(layout: str, dtype: torch.dtype) -> None:
    batch, channels, side = BLOCK
    grad = _rows(dtype, channels)
    out = torch.empty_like(grad)
    pointwise.residual_backward_into(out, _vector(channels), grad, _vector(batch), side**2, 0)


def _linear(which: str) -> Call:
    """Of a block's MLP: to its hidden rows, back from them, and the hidden rows' gradient."""
    batch, channels, side = BLOCK

    def call(layout: str, dtype: torch.dtype) -> None:
        x, hidden = _rows(dtype, channels), _rows(dtype, HIDDEN)
        rising = torch.empty(HIDDEN, channels, dtype=dtype, device="meta")
        falling = torch.empty(channels, HIDDEN, dtype=dtype, device="meta")
        bias, v = _vector(HIDDEN), _vector(channels)
        if which == "gelu":
            linear.linear_gelu_into(hidden, None, x, rising, bias)
        elif which == "residual":
            out = torch.empty_like(x)
            linear.linear_residual_into(out, x, hidden, falling, v, v, _vector(batch), side**2, 0)
        else:
            grad = torch.empty_like(x)
            activated, sums = torch.empty_like(hidden), _vector(HIDDEN)
            linear.linear_gelu_backward_into(
                hidden, activated, sums, grad, falling.t(), x, rising, bias
            )

    return call


def _upsample_add(layout: str, dtype: torch.dtype) -> None:
    skip, x = _levels(UPER[:2], layout, dtype)
    add.forward(x, skip, False, layout == CHANNELS_LAST)


Sizes = tuple[int, tuple[int, int], tuple[int, int]]


def _logits(sizes: Sizes, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """And a target, whose values decide what is read."""
    classes, size, target = sizes
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (BATCH, *target), generator=generator)
    return image((BATCH, classes, *size), layout, dtype), labels


def _argmax(sizes: Sizes, confidence: bool) -> Call:
    function = argmax.forward_confidence if confidence else argmax.forward
    return lambda layout, dtype: function(
        _logits(sizes, layout, dtype)[0], *sizes[2], False
    )  # fmt: skip


def _cross_entropy(sizes: Sizes, backward: bool, backend: str) -> Call:
    room = _room("upsample_cross_entropy", backend)

    def call(layout: str, dtype: torch.dtype) -> None:
        logits, labels = _logits(sizes, layout, dtype)
        if not backward:
            room.forward(logits, labels, None, 255, 0.0, False)
            return
        each = torch.empty(labels.shape, device="meta")
        room.backward(
            torch.empty_like(each), logits, labels, None, each, 255, 0.0, False,
            layout == CHANNELS_LAST,
        )  # fmt: skip

    return call


BOTH_LAYOUTS = (CHANNELS_LAST, CONTIGUOUS)


def _twins(name: str, make: Callable[..., Call], *sizes: Any, **options: Any) -> Case:
    """Of an op's kernels in Triton and in CUDA C++."""
    return Case(name, make(*sizes, "triton"), cuda=make(*sizes, "cuda"), **options)


CASES = (
    Case("upsample_equalize_concat UPer", _concat_forward(UPER), BOTH_LAYOUTS),
    Case("upsample_equalize_concat UPer backward", _concat_backward(UPER)),
    Case("upsample_equalize_concat PSP", _concat_forward(PSP)),
    Case("upsample_equalize_concat PSP backward", _concat_backward(PSP)),
    _twins("tap_sum UPer", _tap_sum_forward, *UPER_TAPS),
    _twins("tap_sum UPer backward", _tap_sum_backward, *UPER_TAPS),
    Case("tap_sum PSP", _tap_sum_forward(*PSP_TAPS, "triton")),
    Case("tap_sum PSP backward", _tap_sum_backward(*PSP_TAPS, "triton"), dtypes=("bfloat16",)),
    _twins("depthwise_conv2d 7x7", _depthwise, 7, 1, "forward", layouts=BOTH_LAYOUTS),
    _twins("depthwise_conv2d 7x7 input's gradient", _depthwise, 7, 1, "input"),
    _twins("depthwise_conv2d 7x7 weight's gradient", _depthwise, 7, 1, "weight"),
    _twins("depthwise_conv2d 7x7 dilated 3", _depthwise, 7, 3, "forward"),
    _twins("depthwise_conv2d 7x7 dilated 3 weight's gradient", _depthwise, 7, 3, "weight"),
    Case("layer_norm", _layer_norm),
    Case("layer_norm backward", _layer_norm_backward),
    Case("bias_gelu", _bias_gelu),
    Case("bias_gelu backward", _bias_gelu_backward),
    Case("residual", _residual),
    Case("residual backward", _residual_backward),
    Case("linear_gelu", _linear("gelu"), dtypes=("bfloat16",), counted_on=80),
    Case("linear_residual", _linear("residual"), dtypes=("bfloat16",), counted_on=80),
    Case("linear_gelu backward", _linear("backward"), dtypes=("bfloat16",), counted_on=80),
    Case("upsample_add", _upsample_add),
    Case("upsample_argmax ADE", _argmax(ADE, False), BOTH_LAYOUTS),
    Case("upsample_argmax ADE confidence", _argmax(ADE, True)),
    Case("upsample_argmax CamVid", _argmax(CAMVID, False)),
    replace(
        _twins("upsample_cross_entropy ADE", _cross_entropy, ADE, False),
        layouts=BOTH_LAYOUTS, cuda_layouts=BOTH_LAYOUTS,
    ),
    _twins("upsample_cross_entropy ADE backward", _cross_entropy, ADE, True),
    _twins("upsample_cross_entropy CamVid", _cross_entropy, CAMVID, False),
    _twins("upsample_cross_entropy CamVid backward", _cross_entropy, CAMVID, True),
)  # fmt: skip
