"""mlp_block and its gradients: ced_block's without the convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.layout import as_matrix
from fastfuse.ops.memory import empty
from fastfuse.ops.pointwise import mlp as pointwise
from fastfuse.ops.pointwise.mlp import Mlp, Norm, to_accumulation

__all__ = ["backward", "forward", "kept_shapes"]


def kept_shapes(x: Tensor, parameters: Sequence[Any]) -> list[tuple[int, ...]]:
    """The hidden tensor before its bias."""
    batch, _, height, width = x.shape
    return [(batch, parameters[2].shape[0], height, width)]


def _mlp(x: Tensor, parameters: Sequence[Any], keep: Tensor | None, eps: float) -> Mlp:
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale = parameters
    return Mlp(
        fc1_weight,
        to_accumulation(fc1_bias),
        fc2_weight,
        to_accumulation(fc2_bias),
        to_accumulation(scale),
        to_accumulation(keep),
        Norm(to_accumulation(norm_weight), to_accumulation(norm_bias), eps),
        x.shape[2] * x.shape[3],
    )


def forward(
    x: Tensor,
    parameters: Sequence[Any],
    keep: Tensor | None,
    option: Sequence[Any],
    keeping: bool,
) -> tuple[Tensor, list[Tensor]]:
    out = empty(x.shape, x, torch.channels_last)
    kept = [empty(s, x, torch.channels_last) for s in kept_shapes(x, parameters)] if keeping else []
    rows, hidden = as_matrix(x), as_matrix(kept[0]) if kept else None
    pointwise.forward(as_matrix(out), rows, rows, _mlp(x, parameters, keep, *option), hidden)
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
    grad_x = empty(x.shape, x, torch.channels_last)
    g = pointwise.backward(
        as_matrix(grad_x),
        as_matrix(grad),
        as_matrix(x),
        _mlp(x, parameters, keep, *option),
        as_matrix(kept[0]) if kept else None,
        of_parameters=wants_parameters,
    )
    of_x = grad_x.add_(grad) if wants_x else None
    if g is None:
        return of_x, [None] * len(parameters)
    return of_x, [
        g.norm_weight,
        g.norm_bias,
        g.fc1_weight,
        g.fc1_bias,
        g.fc2_weight,
        g.fc2_bias,
        g.scale,
    ]
