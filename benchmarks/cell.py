"""What suites measure: cells of one shape, dtype and mode, by fastfuse and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from measure import Measurement
from peak_memory import of_variants
from regimes import current_regime
from variants import CHANNELS_LAST, CONTIGUOUS, EXACT, Variant

__all__ = [
    "BOTH",
    "DTYPES",
    "FORWARD",
    "LAYOUTS",
    "OURS",
    "TINY",
    "TINY_ROUNDS",
    "Build",
    "Cell",
    "Ways",
    "every",
    "measurement_of",
    "tiny_cell",
    "variants_of",
]

FORWARD, BOTH = "forward", "forward + backward"
DTYPES = ("float32", "bfloat16")
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS)
OURS = "fastfuse"
TINY = "tiny"  # the shape whose time is that of checks, choices and autograd
TINY_ROUNDS = 2000

Ways = tuple[tuple[str, str], ...]  # (name, layout)
Build = Callable[..., Callable[[], Any]]  # (name, layout, shape, dtype, mode, device) -> a call


def every(*names: str, layouts: Sequence[str] = LAYOUTS) -> Ways:
    return tuple((name, layout) for name in names for layout in layouts)


OURS_IN_BOTH = every(OURS)


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and mode, and who computes it; names that begin with "compiled" compile."""

    shape: str
    dtype: str
    mode: str
    rivals: Ways = ()
    ours: Ways = OURS_IN_BOTH

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.mode}"


def tiny_cell(mode: str, rival: str = "eager") -> Cell:
    return Cell(TINY, "float32", mode, ((rival, CONTIGUOUS),), ((OURS, CONTIGUOUS),))


def variants_of(cell: Cell, build: Build, device: str) -> list[Variant]:
    """Ours first; where there are no rivals, eager PyTorch checks them."""

    def variant(name: str, layout: str, **more: Any) -> Variant:
        call = build(name, layout, cell.shape, cell.dtype, cell.mode, device)
        return Variant(name, call, layout, **more)

    variants = [variant(name, layout, rival=False) for name, layout in cell.ours]
    for name, layout in cell.rivals:
        variants.append(variant(name, layout, optional=name.startswith("compiled")))
    if not cell.rivals:
        variants.append(variant("eager", CHANNELS_LAST, timed=False))
    return variants


def measurement_of(
    op: str,
    cell: Cell,
    build: Build,
    device: str,
    *,
    about: Mapping[str, Any] | None = None,
    series: str = "main",
    memory: bool = False,
    tiny_s: float = 1,
    **more: Any,
) -> Measurement:
    """Of a suite's cell: all variants, float64 their judge; of a tiny one the dispatch overhead.

    Args:
        build: the suite's function of that name.
        about: what the record says of the shape.
        memory: whether peak memory is measured, in fresh memory alone.
        tiny_s: the budget of a tiny cell.
        more: as :class:`Measurement` takes it.
    """
    if cell.shape == TINY:
        series, memory = "overhead", False
    names = {"dtype": cell.dtype, "mode": cell.mode, "series": series}
    measures_memory = memory and current_regime() == "fresh"
    measured = Measurement(
        variants_of(cell, build, device),
        info={"op": op, "shape": cell.shape, **(about or {}), **names},
        device=device,
        exact=lambda: build(EXACT, CONTIGUOUS, cell.shape, cell.dtype, cell.mode, device)(),
        memory=of_variants(build, cell, {"shape": TINY}, device) if measures_memory else None,
        **more,
    )
    if cell.shape == TINY:
        tiny = {"budget_s": tiny_s, "max_rounds": TINY_ROUNDS, "host": True}
        measured = replace(measured, **tiny, nbytes=None, flops=None, kept=None)
    return measured
