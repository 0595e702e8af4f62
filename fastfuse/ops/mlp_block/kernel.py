"""mlp_block and its gradients: ced_block's without the convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.layout import as_matrix
from fastfuse.ops.memory import empty
from fastfuse.ops.pointwise import mlp as pointwise
from fastfuse.ops.pointwise.parameters import Mlp, Norm

__all__ = ["backward", "forward", "kept_shapes"]


def kept_shapes(x: Tensor, parameters: Sequence[Any]) -> list[tuple[int, ...]]:
    """The hidden tensor before its bias."""
    batch, _, height, width = x.shape
    return [(batch, parameters[2].shape[0], height, width)]


def _mlp(x: Tensor, parameters: Sequence[Any], keep: Tensor | None, eps: float) -> Mlp:
    weight, bias = parameters[:2]
    return Mlp.of(x, parameters[2:], keep, Norm.of(weight, bias, eps))


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
    return of_x, list(g)
