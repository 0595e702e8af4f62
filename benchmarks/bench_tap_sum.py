"""tap_sum and its adjoint against the composition that defines them.

The taps are those of 512 output channels of UPerNet's fusion, every level at its own resolution.
Rivals, with random inputs and fresh results:

- eager: upsample every tap, shift it and add it up; in bfloat16 this is done in float32.
- compiled: ``torch.compile`` of eager, compiled before the clock starts.

Backward is the adjoint alone, of a gradient of the output. Quick runs measure the ratio 2 alone,
and on CPUs compiled forward in float32 in fresh memory only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import counts
import torch
from cell import DTYPES, FORWARD, Cell, Ways, every, measurement_of
from measure import Allowance, compare
from torch import Tensor
from variants import CHANNELS_LAST, random_tensors

import fastfuse
from fastfuse.ops.tap_sum.reference import reference
from fastfuse.tolerances import tolerance

OP = "tap_sum"
BACKWARD = "backward"


@dataclass(frozen=True)
class Taps:
    """k * k taps of ``channels`` at side x side, upsampled to target x target and summed."""

    channels: int
    side: int
    target: int
    kernel_size: int = 3

    @property
    def taps_shape(self) -> tuple[int, int, int, int]:
        return 1, self.kernel_size**2 * self.channels, self.side, self.side

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return 1, self.channels, self.target, self.target


SHAPES = {
    "64 to 128, 3x3": Taps(512, 64, 128),
    "32 to 128, 3x3": Taps(512, 32, 128),
    "16 to 128, 3x3": Taps(512, 16, 128),
    "64 to 128, 1x1": Taps(512, 64, 128, kernel_size=1),
}
MAIN = tuple(SHAPES)
SHAPES["tiny"] = Taps(8, 2, 4)  # warms up


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if regime == "huge pages":  # results of fastfuse lie in them anyway
        return []
    shapes = MAIN[:1] if quick else MAIN
    found = []
    for shape in shapes:
        for dtype in DTYPES:
            for mode in (FORWARD, BACKWARD):
                rivals = every("eager", "compiled")
                if quick and device == "cpu":
                    rivals = _quick_rivals(dtype, mode, regime)
                found.append(Cell(shape, dtype, mode, rivals))
    return found


def _quick_rivals(dtype: str, mode: str, regime: str) -> Ways:
    if (dtype, mode, regime) == ("float32", FORWARD, "fresh"):
        return (*every("eager"), ("compiled", CHANNELS_LAST))
    return every("eager")


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Tensor]:
    """A call of a variant: inputs are the same for every one."""
    random, what = random_tensors(name, layout, dtype, device), SHAPES[shape]
    k, size = what.kernel_size, what.output_shape[2:]
    if name == "fastfuse" and mode == BACKWARD:
        gradient = random(*what.output_shape)
        geometry = (*what.taps_shape[2:], *size, k, k // 2, False, layout == CHANNELS_LAST)
        return lambda: torch.ops.fastfuse.tap_sum_backward(gradient, *geometry)

    def composed(taps: Tensor) -> Tensor:
        return reference(taps, None, size, k, k // 2)

    function: Callable[[Tensor], Tensor] = composed
    if name == "compiled":
        function = torch.compile(composed, dynamic=False)
    if mode == FORWARD:
        taps = random(*what.taps_shape)

        def forward() -> Tensor:
            with torch.no_grad():
                if name == "fastfuse":
                    return fastfuse.tap_sum(taps, size, kernel_size=k)
                return function(taps)

        return forward

    gradient = random(*what.output_shape)
    taps = random(*what.taps_shape).zero_().requires_grad_()
    graph: list[Tensor] = []

    def backward() -> Tensor:
        if not graph:  # by the first call, which is not timed
            graph.append(function(taps))
        return torch.autograd.grad(graph[0], taps, gradient, retain_graph=True)[0]

    return backward


work = partial(counts.work, build)


def moved_bytes(shape: str, dtype: str) -> int:
    """The taps and the output once each, in either direction."""
    what = SHAPES[shape]
    values = torch.Size(what.taps_shape).numel() + torch.Size(what.output_shape).numel()
    return values * getattr(torch, dtype).itemsize


def _tolerances(cell: Cell) -> dict[str, float]:
    """In float32 a gradient sums as many values as read a tap; in bfloat16 both ways sum so too."""
    what = SHAPES[cell.shape]
    values = 4.0 * (what.target / what.side) ** 2
    sums = cell.mode == BACKWARD and cell.dtype == "float32"
    reduction = values**0.5 if sums else 1.0
    name = "output" if cell.mode == FORWARD else "gradient of taps"
    return {name: tolerance(getattr(torch, cell.dtype), roundings=2, reduction=reduction)}


def test_tap_sum(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    measured = measurement_of(
        OP,
        cell,
        build,
        device,
        about={"levels": [SHAPES[cell.shape].taps_shape[1:]]},
        tolerances=_tolerances(cell),
        budget_s=8,
        nbytes=moved_bytes(cell.shape, cell.dtype),
        memory=cell.dtype == "float32",
    )
    assert compare(benchmark, measured, allowance)["variants"]
