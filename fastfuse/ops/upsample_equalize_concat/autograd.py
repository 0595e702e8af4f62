"""Schema, shapes, derivatives and FLOPs of upsample_equalize_concat.

The op is linear in its features. Its gradient is an op of its own, the adjoint, whose gradient is
the forward op without a mean: derivatives of every order come from these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.define import COMPILED, Derivative, Op
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["backward", "flops", "forward"]


def _forward_fake(
    features: Sequence[Tensor],
    height: int,
    width: int,
    mean: Tensor | None,
    std: Tensor | None,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    first = features[0]
    channels = sum(f.shape[1] for f in features)
    return torch.empty(
        (first.shape[0], channels, height, width),
        dtype=first.dtype,
        device=first.device,
        memory_format=memory_format(channels_last),
    )


def _backward_fake(
    grad_output: Tensor,
    offsets: Sequence[int],
    channels: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    std: Tensor | None,
    align_corners: bool,
    channels_last: bool,
) -> list[Tensor]:
    return [
        torch.empty(
            (grad_output.shape[0], c, h, w),
            dtype=grad_output.dtype,
            device=grad_output.device,
            memory_format=memory_format(channels_last),
        )
        for c, h, w in zip(channels, heights, widths, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, _, _, _, std, align_corners, _ = inputs
    ctx.shapes = [f.shape for f in features]
    ctx.align_corners = align_corners
    ctx.save_for_backward(std)


def _gradients(ctx: Any, grad_output: Tensor) -> Sequence[Any]:
    (std,) = ctx.saved_tensors
    needed = [i for i, need in enumerate(ctx.needs[0]) if need]
    gradients: list[Tensor | None] = [None] * len(ctx.shapes)
    channels = [shape[1] for shape in ctx.shapes]
    if std is not None and len(needed) < len(ctx.shapes):
        std = torch.stack([std[i] for i in needed])
    computed = backward[ctx.backend](
        grad_output,
        [sum(channels[:i]) for i in needed],
        [channels[i] for i in needed],
        [ctx.shapes[i][2] for i in needed],
        [ctx.shapes[i][3] for i in needed],
        std,
        ctx.align_corners,
        is_channels_last([grad_output]),
    )
    for i, gradient in zip(needed, computed, strict=True):
        gradients[i] = gradient
    return gradients, *[None] * 6


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad_output, offsets, channels, heights, widths, std, align_corners, _ = inputs
    ctx.shape = grad_output.shape
    ctx.offsets, ctx.channels, ctx.heights, ctx.widths = offsets, channels, heights, widths
    ctx.align_corners = align_corners
    ctx.save_for_backward(std)


def _gradients_of_backward(ctx: Any, *grads: Any) -> Sequence[Any]:
    (std,) = ctx.saved_tensors
    batch, total, height, width = ctx.shape
    given = next(g for g in grads if g is not None)
    features = [
        given.new_zeros((batch, c, h, w)) if g is None else g
        for g, c, h, w in zip(grads, ctx.channels, ctx.heights, ctx.widths, strict=True)
    ]
    channels_last = is_channels_last(features)
    levels = forward[ctx.backend](
        features, height, width, None, std, ctx.align_corners, channels_last
    )
    if sum(ctx.channels) != total:  # gradients were asked of some levels only: zeros between them
        pieces, end = [], 0
        slices = levels.split(list(ctx.channels), dim=1)
        for offset, piece in zip(ctx.offsets, slices, strict=True):
            pieces += [given.new_zeros((batch, offset - end, height, width)), piece]
            end = offset + piece.shape[1]
        pieces.append(given.new_zeros((batch, total - end, height, width)))
        levels = torch.cat(pieces, dim=1)
    return levels, *[None] * 7


def flops(channels: int, source: Sequence[int], target: Sequence[int], equalized: bool) -> int:
    """Separable interpolation, a multiply-add (2 FLOPs) per weight; 2 FLOPs to equalize a value."""
    (h, w), (height, width) = source, target
    along_x = 0 if w == width else 4 * h * width
    along_y = 0 if h == height else 4 * height * width
    return channels * (along_x + along_y + (2 * h * w if equalized else 0))


def _forward_flops(
    feature_shapes: Sequence[torch.Size],
    height: int,
    width: int,
    mean: Any,
    std: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    equalized = mean is not None or std is not None
    return sum(n * flops(c, (h, w), (height, width), equalized) for n, c, h, w in feature_shapes)


def _backward_flops(
    grad_shape: torch.Size,
    offsets: Sequence[int],
    channels: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    std: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    batch, _, height, width = grad_shape
    return sum(
        batch * flops(c, (h, w), (height, width), std is not None)
        for c, h, w in zip(channels, heights, widths, strict=True)
    )


forward = Op(
    "upsample_equalize_concat(Tensor[] features, SymInt height, SymInt width, Tensor? mean, "
    "Tensor? std, bool align_corners, bool channels_last) -> Tensor",
    kernels={"cpu": COMPILED, "triton": "fastfuse.ops.upsample_equalize_concat.triton:forward"},
    fake=_forward_fake,
    derivative=Derivative(_save, _gradients),
    flops=_forward_flops,
)
backward = Op(
    "upsample_equalize_concat_backward(Tensor grad_output, SymInt[] offsets, SymInt[] channels, "
    "SymInt[] heights, SymInt[] widths, Tensor? std, bool align_corners, bool channels_last) "
    "-> Tensor[]",
    kernels={"cpu": COMPILED, "triton": "fastfuse.ops.upsample_equalize_concat.triton:backward"},
    fake=_backward_fake,
    derivative=Derivative(_save_backward, _gradients_of_backward),
    flops=_backward_flops,
)
