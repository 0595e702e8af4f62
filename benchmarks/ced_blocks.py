"""What the benchmarks of ced_block and lr_ced_block share: variants, counts and cells.

Hidden tensors are four times as wide as images, layer scale is of order one and no branch is
dropped; backward has the gradients of x and of every parameter. Rivals, with random inputs and
fresh results, in both memory formats:

- eager, linear: as ConvNeXt's authors write it, the pixels' channels moved to the end for
  ``F.layer_norm`` and ``F.linear``.
- eager, 1x1 conv: the products as 1x1 convolutions, which other libraries may compute.
- compiled, of either: ``torch.compile``, compiled before the clock starts; of the whole function,
  so that nothing of it runs as eager unseen.

Of fastfuse there is also ``recompute=False``, which keeps more for backward and computes less.
FLOPs are those of the definition, for every variant: 4 C hidden of the products and 2 k k C of a
convolution per pixel, and twice as many again backward. What is computed a second time is not
counted.

Quick runs measure one shape forward and all of them forward + backward; compiled forward alone, and
contiguous variants only beside it, for channels_last is the rivals' faster layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cell import (
    BOTH,
    DTYPES,
    FORWARD,
    OURS,
    TINY,
    Build,
    Cell,
    every,
    measurement_of,
    tiny_cell,
)
from counts import kept_bytes
from measure import Allowance, compare
from regimes import current_regime
from torch import Tensor
from variants import CHANNELS_LAST, EXACT, TIMED, Variant, random_tensors

import fastfuse
from fastfuse.ops.ced_block.samples import block_parameters, block_shapes
from fastfuse.tolerances import tolerance

KEEPING = "fastfuse, recompute=False"
EAGER = ("eager, linear", "eager, 1x1 conv")
COMPILED = ("compiled, linear", "compiled, 1x1 conv")
KERNEL_SIZE, EPS = 7, 1e-6


@dataclass(frozen=True)
class BlockShape:
    """A block and its images; ``dilation``: of the second convolution, which LR blocks have."""

    channels: int
    height: int
    width: int
    dilation: int | None = None
    batch: int = 1

    @property
    def hidden(self) -> int:
        return 4 * self.channels

    @property
    def steps(self) -> int:
        return 1 if self.dilation is None else 2

    @property
    def image(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return block_shapes(self.channels, self.hidden, scaled=True, steps=self.steps)


BATCH = {"cpu": 1, "cuda": 16}


def with_batches(shapes: Mapping[str, BlockShape]) -> dict[str, BlockShape]:
    """And many images of each but the tiny one."""
    many = {
        f"{BATCH['cuda']}x{name}": replace(shape, batch=BATCH["cuda"])
        for name, shape in shapes.items()
        if name != TINY
    }
    return {**many, **shapes}


def cells(
    shapes: Mapping[str, BlockShape], detailed: str, quick: bool, regime: str, device: str
) -> list[Cell]:
    """Of one op. Quick runs measure ``detailed`` forward too. A GPU has several images of each
    shape, ``with_batches``."""
    if regime == "huge pages" or (quick and regime != "fresh"):
        return []  # images of fastfuse lie in huge pages anyway
    main = [s for s in shapes if s != TINY and shapes[s].batch == BATCH[device]]
    detailed = next(s for s in main if shapes[s].image[1:] == shapes[detailed].image[1:])
    if quick:
        modes = (BOTH, FORWARD)
        found = [_quick(detailed, dtype, mode, device) for mode in modes for dtype in DTYPES]
        others = [shape for shape in main if shape != detailed]
        found += [_quick(shape, dtype, BOTH, device) for shape in others for dtype in DTYPES]
    else:
        rivals = every(*EAGER, *COMPILED)
        found = [
            Cell(shape, dtype, mode, rivals, every(*_ours(mode)))
            for shape in main
            for dtype in DTYPES
            for mode in (FORWARD, BOTH)
        ]
    if regime == "fresh":
        found += [tiny_cell(mode, EAGER[0]) for mode in (FORWARD, BOTH)]
    return found


def _ours(mode: str) -> tuple[str, ...]:
    return (OURS,) if mode == FORWARD else (OURS, KEEPING)


def _quick(shape: str, dtype: str, mode: str, device: str) -> Cell:
    rivals, ours = EAGER, _ours(mode)
    if mode == FORWARD and (device == "cuda" or dtype == "float32"):
        compiled = every(*COMPILED, layouts=(CHANNELS_LAST,))
        return Cell(shape, dtype, mode, every(*rivals) + compiled, every(*ours))
    layouts = (CHANNELS_LAST,)
    return Cell(shape, dtype, mode, every(*rivals, layouts=layouts), every(*ours, layouts=layouts))


def _normalized(x: Tensor, parameters: Sequence[Tensor], dilation: int = 1) -> Tensor:
    """LN(DW(x)), as (N, H, W, C)."""
    weight, bias, norm_weight, norm_bias = parameters
    padding = dilation * (KERNEL_SIZE // 2)
    y = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])
    return F.layer_norm(y.permute(0, 2, 3, 1), (x.shape[1],), norm_weight, norm_bias, EPS)


def _linear(y: Tensor, *parameters: Tensor) -> Tensor:
    """The MLP of (N, H, W, C), as (N, C, H, W)."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale = parameters
    y = F.linear(F.gelu(F.linear(y, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return (scale * y).permute(0, 3, 1, 2)


def _convolved(y: Tensor, *parameters: Tensor) -> Tensor:
    """The same by 1x1 convolutions."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale = parameters
    y = F.conv2d(y.permute(0, 3, 1, 2), fc1_weight[:, :, None, None], fc1_bias)
    y = F.conv2d(F.gelu(y), fc2_weight[:, :, None, None], fc2_bias)
    return scale[:, None, None] * y


def _eager(block: BlockShape, mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def ced_block(x: Tensor, *parameters: Tensor) -> Tensor:
        return x + mlp(_normalized(x, parameters[:4]), *parameters[4:])

    def lr_ced_block(x: Tensor, *parameters: Tensor) -> Tensor:
        y = x + F.gelu(_normalized(x, parameters[:4])).permute(0, 3, 1, 2)
        step = _normalized(y, parameters[4:8], block.dilation or 1)
        z = y + F.gelu(step).permute(0, 3, 1, 2)
        return x + mlp(z.permute(0, 2, 3, 1), *parameters[8:])

    return ced_block if block.dilation is None else lr_ced_block


def _fastfuse(block: BlockShape, recompute: bool) -> Callable[..., Tensor]:
    if block.dilation is None:
        return partial(fastfuse.ced_block, eps=EPS, recompute=recompute)
    return partial(fastfuse.lr_ced_block, dilation=block.dilation, eps=EPS, recompute=recompute)


def _function(block: BlockShape, name: str) -> Callable[..., Tensor]:
    if name in (OURS, KEEPING):
        return _fastfuse(block, recompute=name == OURS)
    eager = _eager(block, _linear if name.endswith("linear") else _convolved)
    return torch.compile(eager, dynamic=False, fullgraph=True) if name in COMPILED else eager


@dataclass(frozen=True)
class Call:
    """Gives the output, or with a gradient of it (output, *gradients)."""

    function: Callable[..., Tensor]
    x: Tensor = field(repr=False)
    parameters: list[Tensor] = field(repr=False)
    grad_output: Tensor | None = field(repr=False)

    def __call__(self) -> Any:
        leaves = (self.x, *self.parameters)
        if self.grad_output is None:
            with torch.no_grad():
                return self.function(*leaves)
        output = self.function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, self.grad_output)


def build(block: BlockShape, name: str, layout: str, dtype: str, mode: str, device: str) -> Call:
    """A call of a variant: inputs are the same for every one."""
    random = random_tensors(name, layout, dtype, device)
    x, grad_output = random(*block.image), random(*block.image) if mode == BOTH else None
    generator = torch.Generator().manual_seed(1)
    parameters = block_parameters(block.parameters, generator, device, getattr(torch, dtype))
    if name == EXACT:
        parameters = [parameter.double() for parameter in parameters]
    if mode == BOTH:
        for leaf in (x, *parameters):
            leaf.requires_grad_()
    return Call(_function(block, name), x, parameters, grad_output)


def moved_bytes(block: BlockShape, dtype: str, mode: str) -> int:
    """Forward reads x and writes the output; backward reads x and a gradient, and writes x's."""
    image = torch.Size(block.image).numel()
    parameters = sum(torch.Size(shape).numel() for shape in block.parameters.values())
    values = 2 * image + parameters
    if mode == BOTH:
        values += 3 * image + 2 * parameters
    return values * getattr(torch, dtype).itemsize


def conventional_flops(block: BlockShape, mode: str) -> int:
    per_pixel = 2 * 2 * block.channels * block.hidden
    per_pixel += block.steps * 2 * KERNEL_SIZE**2 * block.channels
    pixels = block.batch * block.height * block.width
    return per_pixel * pixels * (1 if mode == FORWARD else 3)


def tolerances(block: BlockShape, cell: Cell) -> dict[str, float]:
    """Of the output and the gradients of x and the parameters.

    In float32 the roundings of the long sums over pixels partly cancel: they grow with the fourth
    root of the pixels. In bfloat16 both ways sum in float32, and round after other steps; but eager
    sums the gradients of a norm in bfloat16.
    """
    dtype = getattr(torch, cell.dtype)
    found = {"output": tolerance(dtype, roundings=4)}
    if cell.mode == FORWARD:
        return found
    cancelling = (block.batch * block.height * block.width) ** 0.5
    if cell.dtype == "float32":
        of_x = found["output"]
        of_parameters = of_norms = tolerance(dtype, roundings=4, reduction=cancelling)
    else:
        of_x = of_parameters = tolerance(dtype, roundings=8)
        of_norms = tolerance(dtype, roundings=8, reduction=cancelling)
    found["gradient of x"] = of_x
    for name in block.parameters:
        allowed = of_norms if name.startswith("norm") else of_parameters
        found[f"gradient of {name}"] = allowed
    return found


def _kept(variant: Variant) -> int:
    call = variant.call
    assert isinstance(call, Call)
    return kept_bytes(call, call.parameters)


def measure_cell(
    op: str,
    shapes: Mapping[str, BlockShape],
    cell: Cell,
    build: Build,
    *,
    benchmark: Any,
    device: str,
    allowance: Allowance,
) -> None:
    """Measures a cell of a suite, whose ``build`` is given."""
    block = shapes[cell.shape]
    flops = conventional_flops(block, cell.mode)
    measured = measurement_of(
        op,
        cell,
        build,
        device,
        about={"image": block.image, "hidden": block.hidden, "dilation": block.dilation},
        tolerances=tolerances(block, cell),
        budget_s=10,
        nbytes=moved_bytes(block, cell.dtype, cell.mode),
        flops=dict.fromkeys((OURS, KEEPING, *EAGER, *COMPILED, *(n + TIMED for n in EAGER)), flops),
        memory=cell.mode == BOTH,
        kept=_kept if cell.mode == BOTH and current_regime() == "fresh" else None,
    )
    assert compare(benchmark, measured, allowance)["variants"]
