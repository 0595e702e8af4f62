"""upsample_argmax against PyTorch's interpolation and argmax.

The labels of a segmentation network. Rivals, in both memory formats and the logits' own dtype:

- eager: ``F.interpolate(logits, size).argmax(1)``.
- compiled: ``torch.compile`` of eager.

Labels of near ties differ by roundings: what is compared is the exact upsampled value of the class
that a label names, computed in float64. Quick runs measure the two largest targets of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import counts
import torch
import upsampled_logits
from cell import FORWARD, Cell
from measure import Allowance
from torch import Tensor
from upsampled_logits import SHAPES, Size, itemsize, upsampled
from variants import CONTIGUOUS, EXACT, random_tensors

import fastfuse
from fastfuse.tolerances import tolerance

__all__ = ["SHAPES", "Cell", "build", "cells", "work"]

OP = "upsample_argmax"
LABEL_BYTES = 8


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    return upsampled_logits.cells(
        FORWARD, lambda dtype: ("eager", "compiled"), quick, regime, device
    )


def _eager(logits: Tensor, size: Size) -> Tensor:
    return upsampled(logits, size).argmax(1)


def _logits(name: str, layout: str, shape: str, dtype: str, device: str) -> Tensor:
    cell = SHAPES[shape]
    return random_tensors(name, layout, dtype, device)(cell.batch, cell.classes, *cell.size)


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Tensor]:
    """A call of a variant: logits are the same for every one, results their labels."""
    logits, size = _logits(name, layout, shape, dtype, device), SHAPES[shape].target
    function: Any = fastfuse.upsample_argmax if name == "fastfuse" else _eager
    if name == "compiled":
        function = torch.compile(_eager, dynamic=False, fullgraph=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(logits, size)

    return forward


work = partial(counts.work, build)


def moved_bytes(shape: str, dtype: str) -> int:
    """The logits are read and the labels written."""
    cell = SHAPES[shape]
    return cell.values * itemsize(dtype) + cell.pixels * LABEL_BYTES


def chosen(cell: Cell, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """The exact values of the classes that labels name, by image, for all of them do not fit."""
    logits = _logits(EXACT, CONTIGUOUS, cell.shape, cell.dtype, device)
    size = SHAPES[cell.shape].target

    def of(labels: Tensor) -> Tensor:
        found = [
            upsampled(image[None], size).gather(1, label[None, None])[0, 0]
            for image, label in zip(logits, labels, strict=True)
        ]
        return torch.stack(found)

    return of


def _tolerances(cell: Cell) -> dict[str, float]:
    """Rounded once after interpolation on their side, twice the error for two values compared."""
    return {"values of the classes": tolerance(getattr(torch, cell.dtype), roundings=4)}


def test_upsample_argmax(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    upsampled_logits.measure_cell(
        OP,
        cell,
        build,
        benchmark=benchmark,
        device=device,
        allowance=allowance,
        tolerances=_tolerances(cell),
        nbytes=moved_bytes(cell.shape, cell.dtype),
        compared=chosen(cell, device),
    )
