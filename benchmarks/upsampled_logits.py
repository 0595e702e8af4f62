"""What the benchmarks of the ops on upsampled logits share: shapes, cells and a cell's measurement.

Logits are random. Rivals are compositions of ``F.interpolate`` and what follows it, eager and
compiled by ``torch.compile`` before the clock starts, in both memory formats; the best of each
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cell import DTYPES, OURS, Build, Cell, every, measurement_of, tiny_cell
from measure import Allowance, compare
from torch import Tensor
from variants import CHANNELS_LAST, CONTIGUOUS

__all__ = ["LARGEST", "SHAPES", "Logits", "cells", "itemsize", "measure_cell", "upsampled"]

LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)
OURS_IN_BOTH = every(OURS, layouts=LAYOUTS)
Size = tuple[int, int]


@dataclass(frozen=True)
class Logits:
    """``batch`` images of ``classes`` logits, and the size that they are upsampled to."""

    batch: int
    classes: int
    size: Size
    target: Size

    @property
    def values(self) -> int:
        return self.batch * self.classes * self.size[0] * self.size[1]

    @property
    def pixels(self) -> int:
        return self.batch * self.target[0] * self.target[1]


SHAPES: dict[str, Logits] = {
    "150, 128x128 to 512x512": Logits(1, 150, (128, 128), (512, 512)),
    "19, 64x128 to 512x1024": Logits(1, 19, (64, 128), (512, 1024)),
    "19, 90x120 to 360x480": Logits(1, 19, (90, 120), (360, 480)),
    "4 x 150, 128x128 to 512x512": Logits(4, 150, (128, 128), (512, 512)),
    "tiny": Logits(1, 8, (4, 4), (8, 8)),
}
MAIN = tuple(SHAPES)[:-1]
LARGEST = MAIN[0]  # of one image


def cells(
    mode: str, rivals: Callable[[str], tuple[str, ...]], quick: bool, regime: str, device: str
) -> list[Cell]:
    """``rivals``: of a dtype, by name. Quick runs compile one, and leave out the batch of four."""

    def cell(shape: str, dtype: str, *, compiled: bool) -> Cell:
        names = [name for name in rivals(dtype) if compiled or not name.startswith("compiled")]
        return Cell(shape, dtype, mode, every(*names, layouts=LAYOUTS), OURS_IN_BOTH)

    if quick:
        found = [
            cell(shape, dtype, compiled=(shape, dtype) == (LARGEST, "float32"))
            for shape in MAIN[:2]
            for dtype in DTYPES
        ]
        return found if regime == "fresh" else []
    if regime != "fresh":  # which is a matter of what eager PyTorch allocates
        return [cell(LARGEST, dtype, compiled=False) for dtype in DTYPES]
    found = [cell(shape, dtype, compiled=True) for shape in MAIN for dtype in DTYPES]
    return [*found, tiny_cell(mode)]


def upsampled(logits: Tensor, size: Size) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def measure_cell(
    op: str,
    cell: Cell,
    build: Build,
    *,
    benchmark: Any,
    device: str,
    allowance: Allowance,
    **more: Any,
) -> None:
    """Measures a cell of a suite, whose ``build`` is given.

    Memory is that of the largest image in float32.

    Args:
        more: as ``Measurement`` takes it.
    """
    shape = SHAPES[cell.shape]
    measured = measurement_of(
        op,
        cell,
        build,
        device,
        about={
            "batch": shape.batch,
            "classes": shape.classes,
            "sizes": [shape.size, shape.target],
        },
        budget_s=6,
        memory=cell.shape == LARGEST and cell.dtype == "float32",
        **more,
    )
    assert compare(benchmark, measured, allowance)["variants"]


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
