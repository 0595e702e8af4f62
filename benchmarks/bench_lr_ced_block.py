"""lr_ced_block, at the lowest resolution of CEDNet-T, against the same in plain PyTorch.

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

OP = "lr_ced_block"
SHAPES = ced_blocks.with_batches(
    {  # at 1/32 of an image of 512x512, and of 800x1280
        "512x16x16": BlockShape(512, 16, 16, dilation=3),
        "512x25x40": BlockShape(512, 25, 40, dilation=3),
        "tiny": BlockShape(8, 4, 4, dilation=3),
    }
)
DETAILED = "512x25x40"


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    return ced_blocks.cells(SHAPES, DETAILED, quick, regime, device)


def build(name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu") -> Call:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    return ced_blocks.build(SHAPES[shape], name, layout, dtype, mode, device)


work = partial(counts.work, build)


def test_lr_ced_block(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    ced_blocks.measure_cell(
        OP, SHAPES, cell, build, benchmark=benchmark, device=device, allowance=allowance
    )
