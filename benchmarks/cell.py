"""What suites measure: cells of one shape, dtype and mode, by fastfuse and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import Measurement
from peak_memory import of_variants
from regimes import current_regime
from runtimes import RUNTIMES
from variants import BY_TRITON, CHANNELS_LAST, CONTIGUOUS, EXACT, TIMED, Variant

from fastfuse import _cuda, backend
from fastfuse.ops.policy import policy_of

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
    "compiles",
    "every",
    "measurement_of",
    "tiny_cell",
    "variants_of",
]

FORWARD, BOTH = "forward", "forward + backward"
DTYPES = ("float32", "bfloat16")
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS)
OURS = "fastfuse"
# Suites whose rivals convolve.
CONVOLVING = ("ced_block", "depthwise_conv2d", "fusion_conv2d", "lr_ced_block")
TINY = "tiny"  # the shape whose time is that of checks, choices and autograd
TINY_ROUNDS = 2000

Ways = tuple[tuple[str, str], ...]  # (name, layout)
Build = Callable[..., Callable[[], Any]]  # (name, layout, shape, dtype, mode, device) -> a call


def every(*names: str, layouts: Sequence[str] = LAYOUTS) -> Ways:
    return tuple((name, layout) for name in names for layout in layouts)


OURS_IN_BOTH = every(OURS)


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and mode, and who computes it; see :func:`compiles`."""

    shape: str
    dtype: str
    mode: str
    rivals: Ways = ()
    ours: Ways = OURS_IN_BOTH

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.mode}"


def compiles(name: str) -> bool:
    """Whether a variant of that name compiles before its first call: it needs what a machine may
    lack, and time."""
    return name.startswith("compiled") or name in RUNTIMES


def tiny_cell(mode: str, rival: str = "eager") -> Cell:
    return Cell(TINY, "float32", mode, ((rival, CONTIGUOUS),), ((OURS, CONTIGUOUS),))


def _by_timed_algorithms(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with those convolutions of cuDNN that were fastest when it timed them."""

    def run() -> Any:
        with torch.backends.cudnn.flags(benchmark=True):
            return call()

    return run


def _by_triton(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with backend("triton"):
            return call()

    return run


def _has_cuda(op: str) -> bool:
    """Whether CUDA C++ is measured beside Triton: the op has some, or others in it may."""
    single = hasattr(torch.ops.fastfuse, op) and op not in CONVOLVING
    return not single or op in policy_of("cuda").cuda_ops


def variants_of(
    cell: Cell, build: Build, device: str, *, convolves: bool = False, has_cuda: bool = True
) -> list[Variant]:
    """Ours first; where there are no rivals, eager PyTorch checks them.

    On GPUs those that convolve and are not compiled are there a second time, by the algorithms that
    cuDNN chooses by timing them; and ours without CUDA C++, where there is some.
    """

    def variant(name: str, layout: str, **more: Any) -> Variant:
        call = build(name, layout, cell.shape, cell.dtype, cell.mode, device)
        return Variant(name, call, layout, **more)

    variants = [variant(name, layout, rival=False) for name, layout in cell.ours]
    if has_cuda and device == "cuda" and _cuda.library is not None and cell.shape != TINY:
        variants += [replace(v, name=v.name + BY_TRITON, call=_by_triton(v.call)) for v in variants]
    for name, layout in cell.rivals:
        optional = compiles(name)
        variants.append(variant(name, layout, optional=optional))
        if convolves and not optional and device == "cuda" and cell.shape != TINY:
            call = _by_timed_algorithms(variants[-1].call)
            variants.append(replace(variants[-1], name=name + TIMED, call=call))
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
        variants_of(cell, build, device, convolves=op in CONVOLVING, has_cuda=_has_cuda(op)),
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
