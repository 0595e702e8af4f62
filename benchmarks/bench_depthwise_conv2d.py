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

from collections.abc import Callable
from dataclasses import dataclass
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

OP = "depthwise_conv2d"


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
DETAILED = "192x64x64, 7x7"  # its memory is measured, and in quick runs its compiled rival
QUICK = (DETAILED, "512x25x40, 7x7 dilated 3")
KERNELS = {
    **{f"192x64x64, {k}x{k}": Depthwise(192, 64, 64, kernel_size=k) for k in (3, 5, 9)},
    "512x64x64, 3x3 dilated 12": Depthwise(512, 64, 64, kernel_size=3, dilation=12),
}
GROWTH = {f"256x{side}x{side}, 7x7": Depthwise(256, side, side) for side in (16, 32, 64, 128, 256)}
SHAPES |= KERNELS | GROWTH
SHAPES["tiny"] = Depthwise(8, 4, 4)


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if regime == "huge pages" or (quick and regime != "fresh"):
        return []  # results of fastfuse lie in huge pages anyway
    modes = (FORWARD, BOTH)
    if quick:
        found = [_quick(s, d, m, device) for s in QUICK for d in DTYPES for m in modes]
    else:
        rivals = every("eager", "compiled")
        shapes = (*MAIN, *KERNELS) if regime == "fresh" else MAIN
        found = [Cell(s, d, m, rivals) for s in shapes for d in DTYPES for m in modes]
    if regime == "fresh":
        found += [] if quick else [Cell(shape, "float32", FORWARD) for shape in GROWTH]
        found += [tiny_cell(m) for m in modes]
    return found


def _quick(shape: str, dtype: str, mode: str, device: str) -> Cell:
    rivals = every("eager")
    if mode == FORWARD and (device == "cuda" or (shape, dtype) == (DETAILED, "float32")):
        rivals += (("compiled", CHANNELS_LAST),)
    return Cell(shape, dtype, mode, rivals)


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Any]:
    """A call of a variant: inputs are the same for every one, results (output, *gradients)."""
    random, what = random_tensors(name, layout, dtype, device), SHAPES[shape]
    channels, d = what.channels, what.dilation
    padding = d * (what.kernel_size // 2)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastfuse.depthwise_conv2d(x, weight, bias, dilation=d)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding, dilation=d, groups=channels)

    function = ours if name == "fastfuse" else eager
    if name == "compiled":
        function = torch.compile(eager, dynamic=False, fullgraph=True)
    x = random(*what.image)
    parameters = random(*what.weight, scale=1 / what.kernel_size), random(channels)

    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x, *parameters)

        return forward

    grad_output = random(*what.image)
    leaves = [tensor.requires_grad_() for tensor in (x, *parameters)]

    def both() -> tuple[Tensor, ...]:
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return both


work = partial(counts.work, build)


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


def _tolerances(cell: Cell) -> dict[str, float]:
    """Of the output and the gradients of x, weight and bias.

    Roundings of the long sums over pixels partly cancel: they grow with the fourth root of the
    products. bfloat16 is summed in float32 and rounded once, by either way.
    """
    what, dtype = SHAPES[cell.shape], getattr(torch, cell.dtype)
    found = {"output": tolerance(dtype, roundings=2)}
    if cell.mode == BOTH:
        pixels = what.batch * what.height * what.width
        reduction = pixels**0.5 if cell.dtype == "float32" else 1.0
        summed = tolerance(dtype, roundings=2, reduction=reduction)
        found |= {"gradient of x": found["output"]}
        found |= {"gradient of weight": summed, "gradient of bias": summed}
    return found


def test_depthwise_conv2d(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    shape = SHAPES[cell.shape]
    flops = conventional_flops(cell.shape, cell.mode)
    measured = measurement_of(
        OP,
        cell,
        build,
        device,
        about={
            "image": shape.image,
            "kernel_size": shape.kernel_size,
            "dilation": shape.dilation,
        },
        series="growth" if cell.shape in GROWTH else "main",
        tolerances=_tolerances(cell),
        budget_s=6,
        nbytes=moved_bytes(cell.shape, cell.dtype, cell.mode),
        flops=dict.fromkeys(("fastfuse", "eager", "compiled"), flops),
        memory=cell.shape == DETAILED,
    )
    assert compare(benchmark, measured, allowance)["variants"]
