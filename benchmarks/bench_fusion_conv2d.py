"""fusion_conv2d against upsampling, concatenating and convolving.

Rivals, all at their best: random inputs, fresh results, both memory formats (the weight in that of
the inputs), no interpolation where sizes agree, and neither mean nor std nor bias, which cost
fastfuse nothing and eager a pass.

- eager: upsample -> concat -> ``F.conv2d``.
- compiled: ``torch.compile`` of eager, compiled before the clock starts.

Quick runs measure UPerNet's fusion, its pooling, which a slow processor has time for, and PSPNet's
forward. On CPUs compiled is measured forward in float32
alone, in its faster layout. What bounds the op is the GEMM: there is only fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import counts
import torch
import torch.nn.functional as F
from cell import BOTH, DTYPES, FORWARD, Cell, Ways, every, measurement_of, tiny_cell
from measure import Allowance, compare
from torch import Tensor
from variants import CHANNELS_LAST, random_tensors

import fastfuse
from fastfuse.tolerances import tolerance

OP = "fusion_conv2d"

Shape = tuple[int, int, int]  # (C, H, W) of one level


@dataclass(frozen=True)
class Fusion:
    """Levels, the first of the target's size, to ``out_channels`` by a k x k convolution."""

    levels: tuple[Shape, ...]
    out_channels: int
    kernel_size: int = 3
    batch: int = 1

    @property
    def products(self) -> int:
        """That an output sums."""
        return self.kernel_size**2 * sum(c for c, _, _ in self.levels)


def _pyramid(channels: int, height: int, width: int, levels: int = 4) -> tuple[Shape, ...]:
    """Levels at 1, 1/2, 1/4, ... of a size, rounded up, as strided convolutions make them."""
    return tuple((channels, -(-height >> i), -(-width >> i)) for i in range(levels))


POOLED = tuple((512, n, n) for n in (1, 2, 3, 6))
SHAPES: dict[str, Fusion] = {
    "UPer fusion": Fusion(_pyramid(512, 128, 128), 512),
    "PSP fusion": Fusion(((2048, 64, 64), *POOLED), 512),
    "UPer pooling": Fusion(((768, 16, 16), *POOLED), 512),
    "SegFormer": Fusion(_pyramid(768, 128, 128), 768, kernel_size=1),
    "96x160": Fusion(_pyramid(512, 96, 160), 512),
    "odd sizes": Fusion(_pyramid(256, 90, 121), 256),
    "batch 4": Fusion(_pyramid(256, 64, 64), 256, batch=4),
}
MAIN = tuple(SHAPES)
GROWTH = {
    f"4 x 256 from {side}x{side}": Fusion(_pyramid(256, side, side), 256)
    for side in (64, 96, 128, 192, 256)
}
SHAPES |= GROWTH
SHAPES["tiny"] = Fusion(_pyramid(8, 4, 4, levels=2), 8)
DETAILED = "UPer fusion"  # its memory is measured, and in quick runs its backward


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if regime != "fresh":
        return []
    if quick:
        modes = (FORWARD, BOTH)
        found = [_quick(DETAILED, dtype, mode, device) for dtype in DTYPES for mode in modes]
        found += [_quick("UPer pooling", dtype, mode, device) for dtype in DTYPES for mode in modes]
        found += [_quick("PSP fusion", dtype, FORWARD, device) for dtype in DTYPES]
    else:
        found = [
            Cell(s, d, m, _rivals(s, m)) for s in MAIN for d in DTYPES for m in (FORWARD, BOTH)
        ]
    found += [] if quick else [Cell(shape, "float32", FORWARD) for shape in GROWTH]
    found += [tiny_cell(m) for m in (FORWARD, BOTH)]
    return found


def _rivals(shape: str, mode: str) -> Ways:
    """Compiled backward, which takes longest to compile, for one shape alone."""
    names = ("eager", "compiled") if mode == FORWARD or shape == DETAILED else ("eager",)
    return every(*names)


def _quick(shape: str, dtype: str, mode: str, device: str) -> Cell:
    rivals = every("eager")
    if (shape, mode) == (DETAILED, FORWARD) and (dtype == "float32" or device == "cuda"):
        rivals += (("compiled", CHANNELS_LAST),)
    return Cell(shape, dtype, mode, rivals)


def _fastfuse(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    return fastfuse.fusion_conv2d(features, weight)


def _eager(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    size = features[0].shape[2:]
    upsampled = torch.cat([_upsample(x, size) for x in features], dim=1)
    return F.conv2d(upsampled, weight, padding=weight.shape[2] // 2)


def _upsample(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Any]:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    random, fusion = random_tensors(name, layout, dtype, device), SHAPES[shape]
    k, channels = fusion.kernel_size, sum(c for c, _, _ in fusion.levels)
    features = [random(fusion.batch, *level) for level in fusion.levels]
    weight = random(fusion.out_channels, channels, k, k, scale=fusion.products**-0.5)
    function = _fastfuse if name == "fastfuse" else _eager
    if name == "compiled":
        function = torch.compile(_eager, dynamic=False)

    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(features, weight)

        return forward

    grad_output = random(fusion.batch, fusion.out_channels, *fusion.levels[0][1:])
    leaves = [x.requires_grad_() for x in (*features, weight)]

    def both() -> tuple[Tensor, ...]:
        output = function(features, weight)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return both


work = partial(counts.work, build)


def moved_bytes(shape: str, dtype: str, mode: str) -> int:
    """Levels and weight read once and the output written once; backward the same the other way."""
    fusion = SHAPES[shape]
    height, width = fusion.levels[0][1:]
    values = fusion.products * fusion.out_channels
    values += fusion.batch * sum(c * h * w for c, h, w in fusion.levels)
    values += fusion.batch * fusion.out_channels * height * width
    return values * getattr(torch, dtype).itemsize * (1 if mode == FORWARD else 2)


def _tolerances(cell: Cell, device: str) -> dict[str, float]:
    """Of the output and the gradients of the levels and of the weight.

    In float32 the roundings of long sums partly cancel: they grow with the fourth root of the
    products. In bfloat16 both ways sum in float32, and round levels, taps and results; but on GPUs
    eager's gradient of upsampling is summed in bfloat16, over the pixels that read a level's.
    """
    fusion, dtype = SHAPES[cell.shape], getattr(torch, cell.dtype)
    pixels = fusion.levels[0][1] * fusion.levels[0][2]
    ratios = [max(1.0, pixels / (h * w)) for _, h, w in fusion.levels]
    if cell.dtype == "float32":
        read = fusion.kernel_size**2 * fusion.out_channels
        counts = [fusion.products, *(4 * r * read for r in ratios), fusion.batch * pixels]
        found = [tolerance(dtype, roundings=2, reduction=count**0.5) for count in counts]
    else:
        rounded = [1.0, *(r if device == "cuda" else 1.0 for r in ratios), 1.0]
        found = [tolerance(dtype, roundings=4, reduction=r) for r in rounded]
    levels = [f"gradient of level {i}" for i in range(len(ratios))]
    every = dict(zip(["output", *levels, "gradient of weight"], found, strict=True))
    return {"output": every["output"]} if cell.mode == FORWARD else every


def _flops(cell: Cell, device: str) -> dict[str, int]:
    return {name: work(name, cell, device)[0] for name in ("fastfuse", "eager", "compiled")}


def test_fusion_conv2d(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    measured = measurement_of(
        OP,
        cell,
        build,
        device,
        about={"levels": SHAPES[cell.shape].levels},
        series="growth" if cell.shape in GROWTH else "main",
        tolerances=_tolerances(cell, device),
        budget_s=15,
        nbytes=moved_bytes(cell.shape, cell.dtype, cell.mode),
        flops=_flops(cell, device),
        memory=cell.shape == DETAILED,
    )
    assert compare(benchmark, measured, allowance)["variants"]
