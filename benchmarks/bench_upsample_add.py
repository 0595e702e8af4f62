"""upsample_add against PyTorch's interpolation and addition.

The top-down path of FPN and UPerNet and CEDNet's decoders: a coarse map is upsampled to the size of
a finer one and added to it. Rivals, with random inputs and fresh results, in both memory formats:

- eager: ``skip + F.interpolate(x, skip's size)``.
- compiled: ``torch.compile`` of eager, compiled before the clock starts.

Quick runs measure the largest shape alone, and compiled forward only, in float32 in its faster
layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import counts
import torch
import torch.nn.functional as F
from cell import BOTH, DTYPES, FORWARD, Cell, every, measurement_of, tiny_cell
from measure import Allowance, compare
from torch import Tensor
from variants import CHANNELS_LAST, random_tensors

import fastfuse
from fastfuse.tolerances import tolerance

OP = "upsample_add"

Size = tuple[int, int]

# channels, x's size, skip's size; the batch is 1
SHAPES: dict[str, tuple[int, Size, Size]] = {
    "512, 64x64 to 128x128": (512, (64, 64), (128, 128)),
    "256, 64x64 to 128x128": (256, (64, 64), (128, 128)),
    "96, 45x61 to 89x121": (96, (45, 61), (89, 121)),
}
MAIN = tuple(SHAPES)
LARGEST = MAIN[0]
GROWTH = {
    f"128, {side // 2}x{side // 2} to {side}x{side}": (128, (side // 2,) * 2, (side,) * 2)
    for side in (16, 32, 64, 128, 256)
}
SHAPES |= GROWTH
SHAPES["tiny"] = (8, (2, 2), (4, 4))


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if quick and regime != "fresh":
        return []
    modes = (FORWARD, BOTH)
    if quick:
        found = [_quick(d, m) for d in DTYPES for m in modes]
    else:
        rivals = every("eager", "compiled")
        found = [Cell(s, d, m, rivals) for s in MAIN for d in DTYPES for m in modes]
    if regime == "fresh":
        found += [] if quick else [Cell(shape, "float32", m) for shape in GROWTH for m in modes]
        found += [tiny_cell(m) for m in modes]
    return found


def _quick(dtype: str, mode: str) -> Cell:
    rivals = every("eager")
    if (dtype, mode) == ("float32", FORWARD):
        rivals += (("compiled", CHANNELS_LAST),)
    return Cell(LARGEST, dtype, mode, rivals)


def _eager(x: Tensor, skip: Tensor) -> Tensor:
    return skip + F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Any]:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    random = random_tensors(name, layout, dtype, device)
    channels, source, target = SHAPES[shape]
    function = fastfuse.upsample_add if name == "fastfuse" else _eager
    if name == "compiled":
        function = torch.compile(_eager, dynamic=False, fullgraph=True)
    x, skip = (random(1, channels, *size) for size in (source, target))

    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x, skip)

        return forward

    grad_output = random(1, channels, *target)
    leaves = [x.requires_grad_(), skip.requires_grad_()]

    def both() -> tuple[Tensor, ...]:
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return both


work = partial(counts.work, build)


def moved_bytes(shape: str, dtype: str, mode: str) -> int:
    """Forward reads x and skip and writes the output; backward reads its gradient, writes x's."""
    channels, (h, w), (height, width) = SHAPES[shape]
    values = channels * (h * w + 2 * height * width)
    if mode == BOTH:
        values += channels * (h * w + height * width)
    return values * getattr(torch, dtype).itemsize


def _tolerances(cell: Cell) -> dict[str, float]:
    """Rounding after every step on their side; a gradient sums as many values as read a pixel."""
    _, (h, w), (height, width) = SHAPES[cell.shape]
    dtype = getattr(torch, cell.dtype)
    readers = 4 * height * width / h / w
    found = {"output": tolerance(dtype, roundings=4)}
    if cell.mode == BOTH:
        found["gradient of x"] = tolerance(dtype, roundings=4, reduction=readers)
        found["gradient of skip"] = tolerance(dtype)
    return found


def test_upsample_add(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    channels, *sizes = SHAPES[cell.shape]
    measured = measurement_of(
        OP,
        cell,
        build,
        device,
        about={"channels": channels, "sizes": sizes},
        series="growth" if cell.shape in GROWTH else "main",
        tolerances=_tolerances(cell),
        budget_s=6,
        nbytes=moved_bytes(cell.shape, cell.dtype, cell.mode),
        memory=cell.shape == LARGEST and cell.dtype == "float32",
    )
    assert compare(benchmark, measured, allowance)["variants"]
