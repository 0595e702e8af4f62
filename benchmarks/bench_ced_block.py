"""ced_block, at the stages of CEDNet-T, against the same in plain PyTorch.

``ced_blocks`` tells what is measured, and against what.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ced_blocks
import counts
from ced_blocks import BlockShape, Call
from cell import Cell
from measure import Allowance

__all__ = ["SHAPES", "Cell", "build", "cells", "work"]

OP = "ced_block"
SHAPES = ced_blocks.with_batches(
    {  # at 1/4, 1/8 and 1/16 of an image of 512x512
        "96x128x128": BlockShape(96, 128, 128),
        "192x64x64": BlockShape(192, 64, 64),
        "352x32x32": BlockShape(352, 32, 32),
        "tiny": BlockShape(8, 4, 4),
    }
)
DETAILED = "192x64x64"


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    return ced_blocks.cells(SHAPES, DETAILED, quick, regime, device)


def build(name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu") -> Call:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    return ced_blocks.build(SHAPES[shape], name, layout, dtype, mode, device)


work = partial(counts.work, build)


def test_ced_block(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    ced_blocks.measure_cell(
        OP, SHAPES, cell, build, benchmark=benchmark, device=device, allowance=allowance
    )
