"""upsample_cross_entropy against PyTorch's interpolation and cross_entropy, forward and backward.

The loss of a segmentation network. A tenth of the pixels is ignored. Rivals, in both layouts:

- eager: ``F.cross_entropy(F.interpolate(logits, size), target)`` in the logits' dtype.
- eager, float32 loss, of bfloat16 logits: upsampled in bfloat16 and widened before the loss, as
  autocast does.
- compiled, and compiled, float32 loss: ``torch.compile`` of these.

Quick runs measure the two largest targets of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import counts
import torch
import torch.nn.functional as F
import upsampled_logits
from cell import BOTH, FORWARD, Cell
from measure import Allowance
from torch import Tensor
from upsampled_logits import SHAPES, itemsize, upsampled
from variants import random_tensors

import fastfuse
from fastfuse.tolerances import tolerance

__all__ = ["SHAPES", "Cell", "build", "cells", "work"]

OP = "upsample_cross_entropy"
IGNORED, IGNORED_SHARE = 255, 0.1
LABEL_BYTES = 8
IN_FLOAT32 = ", float32 loss"


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    def rivals(dtype: str) -> tuple[str, ...]:
        names = ("eager", "compiled")
        return names if dtype == "float32" else (*names, *(name + IN_FLOAT32 for name in names))

    return upsampled_logits.cells(BOTH, rivals, quick, regime, device)


def _eager(logits: Tensor, target: Tensor) -> Tensor:
    up = upsampled(logits, (target.shape[1], target.shape[2]))
    return F.cross_entropy(up, target, ignore_index=IGNORED)


def _eager_in_float32(logits: Tensor, target: Tensor) -> Tensor:
    up = upsampled(logits, (target.shape[1], target.shape[2]))
    return F.cross_entropy(up.float(), target, ignore_index=IGNORED)


def labels(shape: str, device: str) -> Tensor:
    """Random classes, some of them ignored."""
    cell, generator = SHAPES[shape], torch.Generator().manual_seed(1)
    size = cell.batch, *cell.target
    target = torch.randint(cell.classes, size, generator=generator)
    ignored = torch.rand(size, generator=generator) < IGNORED_SHARE
    return target.masked_fill(ignored, IGNORED).to(device)


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of a variant: logits are the same for every one, results (loss, their gradient)."""
    cell, target = SHAPES[shape], labels(shape, device)
    random = random_tensors(name, layout, dtype, device)
    logits = random(cell.batch, cell.classes, *cell.size).requires_grad_()
    function: Any = _eager_in_float32 if name.endswith(IN_FLOAT32) else _eager
    if name == "fastfuse":
        function = partial(fastfuse.upsample_cross_entropy, ignore_index=IGNORED)
    if name.startswith("compiled"):
        function = torch.compile(function, dynamic=False, fullgraph=True)

    def widened(loss: Tensor) -> Tensor:
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (widened(function(logits, target)),)

    def both() -> tuple[Tensor, Tensor]:
        loss = function(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        return widened(loss.detach()), gradient

    return forward if mode == FORWARD else both


work = partial(counts.work, build)


def moved_bytes(shape: str, dtype: str) -> int:
    """Forward and backward read logits and labels; the gradient is written."""
    cell = SHAPES[shape]
    return 3 * cell.values * itemsize(dtype) + 2 * cell.pixels * LABEL_BYTES


def _tolerances(cell: Cell) -> dict[str, float]:
    """Rounding after every step on their side; a gradient sums as many values as read a pixel."""
    shape, dtype = SHAPES[cell.shape], getattr(torch, cell.dtype)
    readers = 4 * shape.pixels * shape.classes / shape.values
    found = {"loss": tolerance(dtype, roundings=4)}
    if cell.mode == BOTH:
        found["gradient"] = tolerance(dtype, roundings=4, reduction=readers)
    return found


def test_upsample_cross_entropy(
    benchmark: Any, cell: Cell, device: str, allowance: Allowance
) -> None:
    upsampled_logits.measure_cell(
        OP,
        cell,
        build,
        benchmark=benchmark,
        device=device,
        allowance=allowance,
        tolerances=_tolerances(cell),
        nbytes=moved_bytes(cell.shape, cell.dtype),
    )
