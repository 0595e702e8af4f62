"""depthwise_conv2d against PyTorch's grouped convolution.

With bias; backward has the gradients of x, weight and bias. Rivals, with random inputs and fresh
results, in both memory formats:

- eager: ``F.conv2d`` of as many groups as channels.
- compiled: ``torch.compile`` of eager, compiled before the clock starts.

FLOPs are 2 k k for each value of the result, and as many again for each of the two gradients that
convolve. Quick runs measure two shapes, one of them dilated, and compiled forward alone, on CPUs in
float32 and one shape alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Variant, compare, current_regime
from peak_memory import peak_extra_memory
from torch import Tensor

import fastfuse
from fastfuse.ops.layout import memory_format
from fastfuse.tolerances import tolerance

OP = "depthwise_conv2d"
FORWARD, BOTH = "forward", "forward + backward"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS)
DTYPES = ("float32", "bfloat16")
# PyTorch 2.13's (oneDNN 3.12's) on CPUs with bfloat16 instructions, of dilated kernels on wide
# channels_last images: other numbers from call to call, as large as 1e33.
UNRELIABLE = {2: "gradient of weight"}


@dataclass(frozen=True)
class Depthwise:
    """An image and the k x k kernels of its channels."""

    channels: int
    height: int
    width: int
    kernel_size: int = 7
    dilation: int = 1
    batch: int = 1

    @property
    def image(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.channels, 1, self.kernel_size, self.kernel_size


SHAPES: dict[str, Depthwise] = {
    "512x16x16, 7x7 dilated 3": Depthwise(512, 16, 16, dilation=3),
    "512x25x40, 7x7 dilated 3": Depthwise(512, 25, 40, dilation=3),
    "2x352x32x32, 7x7": Depthwise(352, 32, 32, batch=2),
    "192x64x64, 7x7": Depthwise(192, 64, 64),
    "96x128x128, 7x7": Depthwise(96, 128, 128),
}
MAIN = tuple(SHAPES)
QUICK = ("512x25x40, 7x7 dilated 3", "192x64x64, 7x7")
DETAILED = "192x64x64, 7x7"  # in quick runs its compiled rival, in full ones its memory
KERNELS = {
    **{f"192x64x64, {k}x{k}": Depthwise(192, 64, 64, kernel_size=k) for k in (3, 5, 9)},
    "512x64x64, 3x3 dilated 12": Depthwise(512, 64, 64, kernel_size=3, dilation=12),
}
GROWTH = {f"256x{side}x{side}, 7x7": Depthwise(256, side, side) for side in (16, 32, 64, 128, 256)}
SHAPES |= KERNELS | GROWTH
SHAPES["tiny"] = Depthwise(8, 4, 4)


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and mode; ``rivals`` are (name, layout)."""

    shape: str
    dtype: str
    mode: str
    rivals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.mode}"


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if regime == "huge pages" or (quick and regime != "fresh"):
        return []  # results of fastfuse lie in huge pages anyway
    modes = (FORWARD, BOTH)
    if quick:
        found = [_quick(s, d, m, device) for s in QUICK for d in DTYPES for m in modes]
    else:
        rivals = tuple((name, layout) for name in ("eager", "compiled") for layout in LAYOUTS)
        shapes = (*MAIN, *KERNELS) if regime == "fresh" else MAIN
        found = [Cell(s, d, m, rivals) for s in shapes for d in DTYPES for m in modes]
    if regime == "fresh":
        found += [] if quick else [Cell(shape, "float32", FORWARD) for shape in GROWTH]
        found += [Cell("tiny", "float32", m, (("eager", CONTIGUOUS),)) for m in modes]
    return found


def _quick(shape: str, dtype: str, mode: str, device: str) -> Cell:
    rivals = tuple(("eager", layout) for layout in LAYOUTS)
    if mode == FORWARD and (device == "cuda" or (shape, dtype) == (DETAILED, "float32")):
        rivals += (("compiled", CHANNELS_LAST),)
    return Cell(shape, dtype, mode, rivals)


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Any]:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    generator = torch.Generator().manual_seed(0)
    format_ = memory_format(layout == CHANNELS_LAST)
    what = SHAPES[shape]
    channels, d = what.channels, what.dilation
    padding = d * (what.kernel_size // 2)

    def random(size: Sequence[int], scale: float = 1.0) -> Tensor:
        x = torch.randn(size, generator=generator) * scale
        return x.to(device, getattr(torch, dtype))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastfuse.depthwise_conv2d(x, weight, bias, dilation=d)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding, dilation=d, groups=channels)

    function = ours if name == "fastfuse" else eager
    if name == "compiled":
        function = torch.compile(eager, dynamic=False, fullgraph=True)
    x = random(what.image).contiguous(memory_format=format_)
    parameters = random(what.weight, scale=1 / what.kernel_size), random((channels,))

    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x, *parameters)

        return forward

    grad_output = random(what.image).contiguous(memory_format=format_)
    leaves = [tensor.requires_grad_() for tensor in (x, *parameters)]

    def both() -> tuple[Tensor, ...]:
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return both


def moved_bytes(shape: str, dtype: str, mode: str) -> int:
    """Forward reads x and writes the output; backward reads x and a gradient, and writes x's."""
    what = SHAPES[shape]
    image, kernels = torch.Size(what.image).numel(), torch.Size(what.weight).numel() + what.channels
    values = 2 * image + kernels
    if mode == BOTH:
        values += 3 * image + 2 * kernels
    return values * getattr(torch, dtype).itemsize


def conventional_flops(shape: str, mode: str) -> int:
    what = SHAPES[shape]
    of_pass = 2 * what.kernel_size**2 * torch.Size(what.image).numel()
    return of_pass * (1 if mode == FORWARD else 3)


def _tolerances(cell: Cell, device: str) -> list[float]:
    """Of the output and the gradients of x, weight and bias.

    Roundings of the long sums over pixels partly cancel: they grow with the fourth root of the
    products. bfloat16 is summed in float32 and rounded once, by either way.
    """
    what, dtype = SHAPES[cell.shape], getattr(torch, cell.dtype)
    found = [tolerance(dtype, roundings=2)] * (1 if cell.mode == FORWARD else 2)
    if cell.mode == BOTH:
        pixels = what.batch * what.height * what.width
        reduction = pixels**0.5 if cell.dtype == "float32" else 1.0
        found += [tolerance(dtype, roundings=2, reduction=reduction)] * 2
    return found


def _variants(cell: Cell, device: str) -> list[Variant]:
    def variant(name: str, layout: str, **more: Any) -> Variant:
        call = build(name, layout, cell.shape, cell.dtype, cell.mode, device)
        return Variant(name, call, layout, **more)

    layouts = (CONTIGUOUS,) if cell.shape == "tiny" else LAYOUTS
    variants = [variant("fastfuse", layout, rival=False) for layout in layouts]
    unreliable = UNRELIABLE if (cell.dtype, device) == ("bfloat16", "cpu") else {}
    for name, layout in cell.rivals:
        optional = name == "compiled"
        variants.append(variant(name, layout, optional=optional, unreliable=unreliable))
    if not cell.rivals:
        variants.append(variant("eager", CHANNELS_LAST, timed=False))
    return variants


def test_depthwise_conv2d(
    benchmark: Any, cell: Cell, device: str, request: Any, progress: Callable[[str], None]
) -> None:
    quick, tiny = request.config.getoption("quick"), cell.shape == "tiny"
    variants = _variants(cell, device)

    def memory(variants: Sequence[Variant]) -> list[int | None]:
        where = {"shape": cell.shape, "dtype": cell.dtype, "mode": cell.mode, "device": device}
        known = [v for v in variants if v.name != "compiled"]
        cases = [{"name": v.name, "layout": v.layout, **where} for v in known]
        target, tiny = f"{__name__}:build", {"shape": "tiny"}
        peaks = peak_extra_memory(target, cases, warm_up=tiny, device=device)
        by_title = {v.title: peak for v, peak in zip(known, peaks, strict=True)}
        return [by_title.get(v.title) for v in variants]

    what = SHAPES[cell.shape]
    work = conventional_flops(cell.shape, cell.mode)
    measures_memory = cell.shape == DETAILED and current_regime() == "fresh" and not quick
    info = compare(
        benchmark,
        variants,
        info={
            "op": OP,
            "shape": cell.shape,
            "image": what.image,
            "kernel_size": what.kernel_size,
            "dilation": what.dilation,
            "dtype": cell.dtype,
            "mode": cell.mode,
            "series": "growth" if cell.shape in GROWTH else "overhead" if tiny else "main",
        },
        tolerances=_tolerances(cell, device),
        budget_s=1 if tiny else 2 if quick else 6,
        max_rounds=2000 if tiny else 20,
        device=device,
        nbytes=None if tiny else moved_bytes(cell.shape, cell.dtype, cell.mode),
        flops=None if tiny else {variant.name: work for variant in variants},
        host=tiny,
        memory=memory if measures_memory else None,
        progress=progress,
    )
    assert info["variants"]
