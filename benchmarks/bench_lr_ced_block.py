"""lr_ced_block, at the lowest resolution of CEDNet-T, against the same in plain PyTorch.

``ced_blocks`` tells what is measured, and against what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ced_blocks
from ced_blocks import CHANNELS_LAST, CONTIGUOUS, DTYPES, LAYOUTS, Block, Call, Cell

__all__ = ["CHANNELS_LAST", "CONTIGUOUS", "DTYPES", "LAYOUTS", "SHAPES", "Cell", "build", "cells"]

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


def test_lr_ced_block(
    benchmark: Any, cell: Cell, device: str, request: Any, progress: Callable[[str], None]
) -> None:
    info = ced_blocks.measure(
        OP,
        SHAPES,
        DETAILED,
        cell,
        benchmark=benchmark,
        device=device,
        quick=request.config.getoption("quick"),
        target=f"{__name__}:build",
        progress=progress,
    )
    assert info["variants"]
