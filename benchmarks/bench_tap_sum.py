"""tap_sum and its adjoint against the composition that defines them.

The taps are those of 512 output channels of UPerNet's fusion, every level at its own resolution.
Rivals, with random inputs and fresh results:

- eager: upsample every tap, shift it and add it up; in bfloat16 this is done in float32.
- compiled: ``torch.compile`` of eager, compiled before the clock starts.

Backward is the adjoint alone, of a gradient of the output. Quick runs measure the ratio 2 alone, on
CPUs against eager in its faster layout, and compiled forward in float32 in fresh memory only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import Variant, compare, current_regime
from peak_memory import peak_extra_memory
from torch import Tensor

import fastfuse
from fastfuse.ops.layout import memory_format
from fastfuse.ops.tap_sum.reference import reference
from fastfuse.tolerances import tolerance

OP = "tap_sum"
FORWARD, BACKWARD = "forward", "backward"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS)
DTYPES = ("float32", "bfloat16")


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


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and mode; ``rivals`` are (name, layout)."""

    shape: str
    dtype: str
    mode: str
    rivals: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.mode}"


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if regime == "huge pages":  # results of fastfuse lie in them anyway
        return []
    shapes = MAIN[:1] if quick else MAIN
    found = []
    for shape in shapes:
        for dtype in DTYPES:
            for mode in (FORWARD, BACKWARD):
                rivals = [(name, layout) for name in ("eager", "compiled") for layout in LAYOUTS]
                if quick and device == "cpu":
                    rivals = _quick_rivals(dtype, mode, regime)
                found.append(Cell(shape, dtype, mode, tuple(rivals)))
    return found


def _quick_rivals(dtype: str, mode: str, regime: str) -> list[tuple[str, str]]:
    rivals = [("eager", CHANNELS_LAST if mode == FORWARD else CONTIGUOUS)]
    if (dtype, mode, regime) == ("float32", FORWARD, "fresh"):
        rivals.append(("compiled", CHANNELS_LAST))
    return rivals


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Tensor]:
    """A call of a variant: inputs are the same for every one."""
    generator = torch.Generator().manual_seed(0)
    format_ = memory_format(layout == CHANNELS_LAST)

    def random(size: Sequence[int]) -> Tensor:
        x = torch.randn(size, generator=generator).to(device, getattr(torch, dtype))
        return x.contiguous(memory_format=format_)

    what = SHAPES[shape]
    k, size = what.kernel_size, what.output_shape[2:]
    if name == "fastfuse" and mode == BACKWARD:
        gradient = random(what.output_shape)
        geometry = (*what.taps_shape[2:], *size, k, k // 2, False, layout == CHANNELS_LAST)
        return lambda: torch.ops.fastfuse.tap_sum_backward(gradient, *geometry)

    def composed(taps: Tensor) -> Tensor:
        return reference(taps, None, size, k, k // 2)

    function: Callable[[Tensor], Tensor] = composed
    if name == "compiled":
        function = torch.compile(composed, dynamic=False)
    if mode == FORWARD:
        taps = random(what.taps_shape)

        def forward() -> Tensor:
            with torch.no_grad():
                if name == "fastfuse":
                    return fastfuse.tap_sum(taps, size, kernel_size=k)
                return function(taps)

        return forward

    gradient = random(what.output_shape)
    taps = torch.zeros(what.taps_shape, dtype=gradient.dtype, device=device)
    taps = taps.contiguous(memory_format=format_).requires_grad_()
    graph: list[Tensor] = []

    def backward() -> Tensor:
        if not graph:  # by the first call, which is not timed
            graph.append(function(taps))
        return torch.autograd.grad(graph[0], taps, gradient, retain_graph=True)[0]

    return backward


def moved_bytes(shape: str, dtype: str) -> int:
    """The taps and the output once each, in either direction."""
    what = SHAPES[shape]
    values = torch.Size(what.taps_shape).numel() + torch.Size(what.output_shape).numel()
    return values * getattr(torch, dtype).itemsize


def _tolerance(cell: Cell) -> float:
    """In float32 a gradient sums as many values as read a tap; in bfloat16 both ways sum so too."""
    what = SHAPES[cell.shape]
    values = 4.0 * (what.target / what.side) ** 2
    sums = cell.mode == BACKWARD and cell.dtype == "float32"
    reduction = values**0.5 if sums else 1.0
    return tolerance(getattr(torch, cell.dtype), roundings=2, reduction=reduction)


def _variants(cell: Cell, device: str) -> list[Variant]:
    def variant(name: str, layout: str, **more: Any) -> Variant:
        call = build(name, layout, cell.shape, cell.dtype, cell.mode, device)
        return Variant(name, call, layout, **more)

    variants = [variant("fastfuse", layout, rival=False) for layout in LAYOUTS]
    for name, layout in cell.rivals:
        variants.append(variant(name, layout, optional=name == "compiled"))
    return variants


def test_tap_sum(
    benchmark: Any, cell: Cell, device: str, request: Any, progress: Callable[[str], None]
) -> None:
    def memory(variants: Sequence[Variant]) -> list[int | None]:
        where = {"shape": cell.shape, "dtype": cell.dtype, "mode": cell.mode, "device": device}
        known = [v for v in variants if v.name != "compiled"]
        cases = [{"name": v.name, "layout": v.layout, **where} for v in known]
        target, tiny = f"{__name__}:build", {"shape": "tiny"}
        peaks = peak_extra_memory(target, cases, warm_up=tiny, device=device)
        by_title = {v.title: peak for v, peak in zip(known, peaks, strict=True)}
        return [by_title.get(v.title) for v in variants]

    measures_memory = cell.dtype == "float32" and current_regime() == "fresh"
    info = compare(
        benchmark,
        _variants(cell, device),
        info={
            "op": OP,
            "shape": cell.shape,
            "levels": [SHAPES[cell.shape].taps_shape[1:]],
            "dtype": cell.dtype,
            "mode": cell.mode,
            "series": "main",
        },
        tolerances=[_tolerance(cell)],
        budget_s=3 if request.config.getoption("quick") else 8,
        min_rounds=3,
        max_rounds=20,
        device=device,
        nbytes=moved_bytes(cell.shape, cell.dtype),
        memory=memory if measures_memory else None,
        progress=progress,
    )
    assert info["variants"]
