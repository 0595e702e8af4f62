"""ced_block and its gradients, composed of the depthwise convolution and the MLP on rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.define import steps_of
from fastfuse.ops.layout import as_matrix
from fastfuse.ops.memory import empty
from fastfuse.ops.pointwise import mlp as pointwise
from fastfuse.ops.pointwise.parameters import Mlp, Norm, convolution_bias

__all__ = ["backward", "forward", "kept_shapes"]


def kept_shapes(x: Tensor, parameters: Sequence[Any]) -> list[tuple[int, ...]]:
    """The convolution's result and the hidden tensor before its bias."""
    batch, channels, height, width = x.shape
    hidden = parameters[4].shape[0]
    return [(batch, channels, height, width), (batch, hidden, height, width)]


def _mlp(x: Tensor, parameters: Sequence[Any], keep: Tensor | None, eps: float) -> Mlp:
    weight, bias = parameters[2:4]
    return Mlp.of(x, parameters[4:], keep, Norm.of(weight, bias, eps))


def forward(
    x: Tensor,
    parameters: Sequence[Any],
    keep: Tensor | None,
    option: Sequence[Any],
    keeping: bool,
) -> tuple[Tensor, list[Tensor]]:
    dw_weight, dw_bias = parameters[0], convolution_bias(parameters[1], x)
    ops = steps_of(x.device.type)
    convolved = ops.depthwise_conv2d(x, dw_weight, dw_bias, None, 1, False, True)
    out = convolved  # each pixel is read before it is written: fresh memory is slow
    mlp = _mlp(x, parameters, keep, *option)
    kept = []
    if keeping:
        out = empty(x.shape, x, torch.channels_last)
        kept = [convolved, empty(kept_shapes(x, parameters)[1], x, torch.channels_last)]
    hidden = as_matrix(kept[1]) if keeping else None
    pointwise.forward(as_matrix(out), as_matrix(x), as_matrix(convolved), mlp, hidden)
    return out, kept


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Any],
    keep: Tensor | None,
    option: Sequence[Any],
    kept: Sequence[Tensor],
    wants_x: bool,
    wants_parameters: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    ops = steps_of(x.device.type)
    dw_weight, dw_bias = parameters[0], convolution_bias(parameters[1], x)
    convolved = (
        kept[0] if kept else ops.depthwise_conv2d(x, dw_weight, dw_bias, None, 1, False, True)
    )
    # Each pixel is read before it is written, and what is kept is not ours to write.
    grad_convolved = empty(x.shape, x, torch.channels_last) if kept else convolved
    g = pointwise.backward(
        as_matrix(grad_convolved),
        as_matrix(grad),
        as_matrix(convolved),
        _mlp(x, parameters, keep, *option),
        as_matrix(kept[1]) if kept else None,
        of_parameters=wants_parameters,
    )
    grad_x = None
    if wants_x:
        grad_x = ops.depthwise_conv2d(grad_convolved, dw_weight, None, grad, 1, True, True)
    if g is None:
        return grad_x, [None] * len(parameters)
    dw = ops.depthwise_conv2d_backward_weight(grad_convolved, x, dw_weight.shape[2], 1)
    return grad_x, [*dw, *g]
