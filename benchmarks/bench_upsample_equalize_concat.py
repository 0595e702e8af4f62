"""upsample_equalize_concat against what a decoder would otherwise run.

Rivals, all at their best: random inputs, fresh results, both memory formats, constants as Python
floats, no interpolation where sizes agree.

- naive: upsample -> BatchNorm -> concat, one ``nn.BatchNorm2d`` (training, float32) per level: what
  a scale equalizer replaces. It normalizes by the statistics of the batch, so that its values
  differ from ours and only its shapes are checked.
- eager: upsample -> (x - mean) / std -> concat.
- eager, equalized first: (x - mean) / std -> upsample -> concat, the same by linearity and cheaper.
- compiled: ``torch.compile`` of eager, compiled before the clock starts.

Quick runs measure UPerNet's shapes alone, and leave out what takes longest: compiled only in its
faster layout (channels_last in float32, contiguous in bfloat16) and forward, equalized first only
forward, and naive channels_last forward + backward only with fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import counts
import torch
import torch.nn.functional as F
from cell import BOTH, DTYPES, FORWARD, Cell, Ways, every, measurement_of, tiny_cell
from measure import Allowance, compare
from torch import Tensor, nn
from variants import CHANNELS_LAST, CONTIGUOUS, EXACT, random_tensors

import fastfuse
from fastfuse.tolerances import tolerance

OP = "upsample_equalize_concat"
NAIVE_DIFFERS = "statistics of the batch instead of constants"

Shape = tuple[int, int, int]  # (C, H, W) of one level; the batch is 1

SHAPES: dict[str, tuple[Shape, ...]] = {
    "UPerNet": tuple((512, 128 >> i, 128 >> i) for i in range(4)),
    "PSP": ((2048, 64, 64), *((512, n, n) for n in (1, 2, 3, 6))),
    "CamVid": ((512, 90, 120), (512, 45, 60), (512, 23, 30), (512, 12, 15)),
    "tiny": ((8, 4, 4), (8, 2, 2)),
}
GROWTH = {
    f"{levels} levels from {side}x{side}": tuple((256, side >> i, side >> i) for i in range(levels))
    for side in (64, 128, 256)
    for levels in (2, 3, 4, 5)
}
SHAPES |= GROWTH


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    found = []
    for shape in ("UPerNet",) if quick else ("UPerNet", "PSP", "CamVid"):
        for dtype in DTYPES:
            for mode in (FORWARD, BOTH):
                rivals = _quick_rivals(dtype, mode, regime) if quick else every("naive", *_SAME)
                found.append(Cell(shape, dtype, mode, rivals))
    if not quick and regime == "fresh":
        found += [Cell(shape, "float32", mode) for shape in GROWTH for mode in (FORWARD, BOTH)]
    if regime != "huge pages":  # a tiny call has nothing to do with pages
        found += [tiny_cell(m) for m in (FORWARD, BOTH)]
    return found


_SAME = ("eager", "eager, equalized first", "compiled")


def _quick_rivals(dtype: str, mode: str, regime: str) -> Ways:
    if mode == FORWARD:
        faster = CHANNELS_LAST if dtype == "float32" else CONTIGUOUS
        return (*every("naive", "eager", "eager, equalized first"), ("compiled", faster))
    naive = every("naive") if regime == "fresh" else (("naive", CONTIGUOUS),)
    return (*naive, *every("eager"))


def _constants(levels: int) -> tuple[list[float], list[float]]:
    return [0.1 * (i + 1) for i in range(levels)], [0.5 + 0.2 * i for i in range(levels)]


def _upsample(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _fastfuse(channels: Sequence[int], device: str) -> Callable[..., Tensor]:
    # Tensors, as the module's buffers are.
    mean, std = (torch.tensor(values, device=device) for values in _constants(len(channels)))
    return lambda *f: fastfuse.upsample_equalize_concat(f, mean=mean, std=std)


def _eager(channels: Sequence[int], device: str) -> Callable[..., Tensor]:
    means, stds = _constants(len(channels))

    def eager(*features: Tensor) -> Tensor:
        size = features[0].shape[2:]
        levels = zip(features, means, stds, strict=True)
        return torch.cat([(_upsample(x, size) - m) / s for x, m, s in levels], dim=1)

    return eager


def _equalized_first(channels: Sequence[int], device: str) -> Callable[..., Tensor]:
    means, stds = _constants(len(channels))

    def equalized_first(*features: Tensor) -> Tensor:
        size = features[0].shape[2:]
        levels = zip(features, means, stds, strict=True)
        return torch.cat([_upsample((x - m) / s, size) for x, m, s in levels], dim=1)

    return equalized_first


def _compiled(channels: Sequence[int], device: str) -> Callable[..., Tensor]:
    return torch.compile(_eager(channels, device), dynamic=False)


class _Naive(nn.Module):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)

    def forward(self, *features: Tensor) -> Tensor:
        size = features[0].shape[2:]
        levels = zip(self.norms, features, strict=True)
        return torch.cat([norm(_upsample(x, size)) for norm, x in levels], dim=1)


def _naive(channels: Sequence[int], device: str) -> Callable[..., Tensor]:
    return _Naive(channels).to(device)


_BUILDERS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "fastfuse": _fastfuse,
    "naive": _naive,
    "eager": _eager,
    "eager, equalized first": _equalized_first,
    "compiled": _compiled,
    EXACT: _eager,
}


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Any]:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    random, levels = random_tensors(name, layout, dtype, device), SHAPES[shape]
    features = [random(1, *level) for level in levels]
    channels = [c for c, _, _ in levels]
    function = _BUILDERS[name](channels, device)

    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*features)

        return forward

    grad_output = random(1, sum(channels), *levels[0][1:])
    leaves = [f.requires_grad_() for f in features]
    if isinstance(function, nn.Module):
        leaves += list(function.parameters())

    def both() -> tuple[Tensor, ...]:
        output = function(*features)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return both


def work(name: str, cell: Cell, device: str) -> tuple[int, int]:
    """FLOPs and bytes of a variant; naive's as eager's, for counters cannot follow its modules."""
    return counts.work(build, "eager" if name == "naive" else name, cell, device)


def moved_bytes(shape: str, dtype: str, mode: str) -> int:
    """Every level read once and the output written once; backward the same the other way."""
    levels = SHAPES[shape]
    height, width = levels[0][1:]
    values = sum(c * h * w for c, h, w in levels) + sum(c for c, _, _ in levels) * height * width
    return values * getattr(torch, dtype).itemsize * (1 if mode == FORWARD else 2)


def _tolerances(cell: Cell) -> dict[str, float]:
    """Rounding after every step on their side; a gradient sums as many values as read a pixel."""
    levels = SHAPES[cell.shape]
    dtype = getattr(torch, cell.dtype)
    found = {"output": tolerance(dtype, roundings=4)}
    if cell.mode == BOTH:
        pixels = levels[0][1] * levels[0][2]
        for i, (_, h, w) in enumerate(levels):
            readers = 4 * pixels / h / w
            found[f"gradient of level {i}"] = tolerance(dtype, roundings=4, reduction=readers)
    return found


def test_upsample_equalize_concat(
    benchmark: Any, cell: Cell, device: str, allowance: Allowance
) -> None:
    measured = measurement_of(
        OP,
        cell,
        build,
        device,
        about={"levels": SHAPES[cell.shape]},
        series="growth" if cell.shape in GROWTH else "main",
        tolerances=_tolerances(cell),
        budget_s=8,
        tiny_s=2,
        nbytes=moved_bytes(cell.shape, cell.dtype, cell.mode),
        memory=cell.dtype == "float32" and bool(cell.rivals),
    )
    variants = [
        replace(v, differs=NAIVE_DIFFERS) if v.name == "naive" else v for v in measured.variants
    ]
    assert compare(benchmark, replace(measured, variants=variants), allowance)["variants"]
