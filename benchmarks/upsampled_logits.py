"""What the benchmarks of the ops on upsampled logits share: shapes, cells and a cell's measurement.

Logits are random. Rivals are compositions of ``F.interpolate`` and what follows it, eager and
compiled by ``torch.compile`` before the clock starts, in both memory formats; the best of each
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    CHANNELS_LAST,
    CONTIGUOUS,
    EXACT,
    Allowance,
    Variant,
    compare,
    current_regime,
)
from peak_memory import of_variants
from torch import Tensor

__all__ = ["DTYPES", "LARGEST", "LAYOUTS", "SHAPES", "Cell", "Logits", "measured", "upsampled"]

LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)
DTYPES = ("float32", "bfloat16")
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


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and mode; ``rivals`` are (name, layout)."""

    shape: str
    dtype: str
    mode: str
    rivals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.mode}"


def cells(
    mode: str, rivals: Callable[[str], tuple[str, ...]], quick: bool, regime: str, device: str
) -> list[Cell]:
    """``rivals``: of a dtype, by name. Quick runs compile one, and leave out the batch of four."""

    def cell(shape: str, dtype: str, *, compiled: bool) -> Cell:
        names = [name for name in rivals(dtype) if compiled or not name.startswith("compiled")]
        return Cell(shape, dtype, mode, tuple((n, layout) for n in names for layout in LAYOUTS))

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
    return [*found, Cell("tiny", "float32", mode, (("eager", CONTIGUOUS),))]


def upsampled(logits: Tensor, size: Size) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def measured(
    op: str,
    cell: Cell,
    build: Callable[..., Callable[[], Any]],
    *,
    benchmark: Any,
    module: str,
    device: str,
    allowance: Allowance,
    tolerances: Mapping[str, float],
    nbytes: int,
    compared: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """``compare`` of a cell; memory is that of the largest image in float32."""
    tiny = cell.shape == "tiny"

    def variant(name: str, layout: str, **more: Any) -> Variant:
        call = build(name, layout, cell.shape, cell.dtype, cell.mode, device)
        return Variant(name, call, layout, **more)

    layouts = (CONTIGUOUS,) if tiny else LAYOUTS
    variants = [variant("fastfuse", layout, rival=False) for layout in layouts]
    for name, layout in cell.rivals:
        variants.append(variant(name, layout, optional=name.startswith("compiled")))
    memory = of_variants(f"{module}:build", cell, {"shape": "tiny"}, device)
    measures_memory = cell.shape == LARGEST and cell.dtype == "float32"
    measures_memory = measures_memory and current_regime() == "fresh"
    shape = SHAPES[cell.shape]
    return compare(
        benchmark,
        variants,
        info={
            "op": op,
            "shape": cell.shape,
            "batch": shape.batch,
            "classes": shape.classes,
            "sizes": [shape.size, shape.target],
            "dtype": cell.dtype,
            "mode": cell.mode,
            "series": "overhead" if tiny else "main",
        },
        tolerances=tolerances,
        exact=lambda: build(EXACT, CONTIGUOUS, cell.shape, cell.dtype, cell.mode, device)(),
        compared=compared,
        budget_s=1 if tiny else 6,
        max_rounds=2000 if tiny else 20,
        device=device,
        nbytes=None if tiny else nbytes,
        host=tiny,
        memory=memory if measures_memory else None,
        allowance=allowance,
    )


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
