"""Rows of a matrix moved in one pass, each to one place at most: maps cut into windows, and back.

The adjoint moves them back, where that of PyTorch's indexing adds them up one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastfuse.ops.define import Derivative, Op

__all__ = ["gather_rows"]


def _kernel(
    rows: Tensor, source: Tensor, holes: Tensor, target: Tensor, target_holes: Tensor
) -> Tensor:
    return rows.index_select(0, source).index_fill_(0, holes, 0)


def _fake(rows: Tensor, source: Tensor, *_: Tensor) -> Tensor:
    return rows.new_empty((source.shape[0], rows.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx: Any, grad: Tensor) -> Sequence[Any]:
    source, holes, target, target_holes = ctx.saved_tensors
    moved = gather_rows[ctx.backend](grad, target, target_holes, source, holes)
    return moved, None, None, None, None


# Row i of the result is rows[source[i]], or zero where i is among the holes; of the adjoint row i
# is grad[target[i]], or zero where i is among target_holes.
gather_rows = Op(
    "gather_rows(Tensor rows, Tensor source, Tensor holes, Tensor target, Tensor target_holes) "
    "-> Tensor",
    kernels={"cpu": _kernel},
    fake=_fake,
    derivative=Derivative(_save, _gradients),
)
