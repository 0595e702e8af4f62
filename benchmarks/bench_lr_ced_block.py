"""lr_ced_block, at the lowest resolution of CEDNet-T, against the same in plain PyTorch.

``ced_blocks`` tells what is measured, and against what.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ced_blocks
import measure
from ced_blocks import DTYPES, LAYOUTS, Block, Call, Cell
from measure import Allowance

__all__ = ["DTYPES", "LAYOUTS", "SHAPES", "Cell", "build", "cells", "work"]

OP = "lr_ced_block"
SHAPES = {  # at 1/32 of an image of 512x512, and of 800x1280
    "512x16x16": Block(512, 16, 16, dilation=3),
    "512x25x40": Block(512, 25, 40, dilation=3),
    "tiny": Block(8, 4, 4, dilation=3),
}
DETAILED = "512x25x40"


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    return ced_blocks.cells(SHAPES, DETAILED, quick, regime, device)


def build(name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu") -> Call:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    return ced_blocks.build(SHAPES[shape], name, layout, dtype, mode, device)


work = partial(measure.work, build)


def test_lr_ced_block(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    info = ced_blocks.measure(
        OP,
        SHAPES,
        cell,
        benchmark=benchmark,
        device=device,
        target=f"{__name__}:build",
        allowance=allowance,
    )
    assert info["variants"]
