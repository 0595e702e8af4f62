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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    CHANNELS_LAST,
    CONTIGUOUS,
    EXACT,
    Allowance,
    Variant,
    compare,
    current_regime,
    kept_bytes,
    random_tensors,
)
from peak_memory import of_variants
from torch import Tensor

import fastfuse
from fastfuse.ops.ced_block.samples import block_parameters, block_shapes
from fastfuse.tolerances import tolerance

FORWARD, BOTH = "forward", "forward + backward"
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS)
DTYPES = ("float32", "bfloat16")
OURS, KEEPING = "fastfuse", "fastfuse, recompute=False"
EAGER = ("eager, linear", "eager, 1x1 conv")
COMPILED = ("compiled, linear", "compiled, 1x1 conv")
KERNEL_SIZE, EPS = 7, 1e-6
TINY = "tiny"

Ways = tuple[tuple[str, str], ...]  # (name, layout)


@dataclass(frozen=True)
class Block:
    """A block on one image; ``dilation``: of the second convolution, which LR blocks have."""

    channels: int
    height: int
    width: int
    dilation: int | None = None

    @property
    def hidden(self) -> int:
        return 4 * self.channels

    @property
    def steps(self) -> int:
        return 1 if self.dilation is None else 2

    @property
    def image(self) -> tuple[int, int, int, int]:
        return 1, self.channels, self.height, self.width

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return block_shapes(self.channels, self.hidden, scaled=True, steps=self.steps)


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and mode; ``ours`` are those of fastfuse."""

    shape: str
    dtype: str
    mode: str
    rivals: Ways = ()
    ours: Ways = ((OURS, CHANNELS_LAST),)

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.mode}"


def cells(
    shapes: Mapping[str, Block], detailed: str, quick: bool, regime: str, device: str
) -> list[Cell]:
    """Of one op. Quick runs measure ``detailed`` forward too."""
    if regime == "huge pages" or (quick and regime != "fresh"):
        return []  # images of fastfuse lie in huge pages anyway
    main = [shape for shape in shapes if shape != TINY]
    if quick:
        modes = (BOTH, FORWARD)
        found = [_quick(detailed, dtype, mode, device) for mode in modes for dtype in DTYPES]
        others = [shape for shape in main if shape != detailed]
        found += [_quick(shape, dtype, BOTH, device) for shape in others for dtype in DTYPES]
    else:
        rivals = _every(*EAGER, *COMPILED)
        found = [
            Cell(shape, dtype, mode, rivals, _every(*_ours(mode)))
            for shape in main
            for dtype in DTYPES
            for mode in (FORWARD, BOTH)
        ]
    if regime == "fresh":
        tiny, ours = ((EAGER[0], CONTIGUOUS),), ((OURS, CONTIGUOUS),)
        found += [Cell(TINY, "float32", mode, tiny, ours) for mode in (FORWARD, BOTH)]
    return found


def _every(*names: str, layouts: Sequence[str] = LAYOUTS) -> Ways:
    return tuple((name, layout) for name in names for layout in layouts)


def _ours(mode: str) -> tuple[str, ...]:
    return (OURS,) if mode == FORWARD else (OURS, KEEPING)


def _quick(shape: str, dtype: str, mode: str, device: str) -> Cell:
    rivals, ours = EAGER, _ours(mode)
    if mode == FORWARD and (device == "cuda" or dtype == "float32"):
        compiled = _every(*COMPILED, layouts=(CHANNELS_LAST,))
        return Cell(shape, dtype, mode, _every(*rivals) + compiled, _every(*ours))
    layouts = (CHANNELS_LAST,)
    return Cell(
        shape, dtype, mode, _every(*rivals, layouts=layouts), _every(*ours, layouts=layouts)
    )


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


def _eager(block: Block, mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def ced_block(x: Tensor, *parameters: Tensor) -> Tensor:
        return x + mlp(_normalized(x, parameters[:4]), *parameters[4:])

    def lr_ced_block(x: Tensor, *parameters: Tensor) -> Tensor:
        y = x + F.gelu(_normalized(x, parameters[:4])).permute(0, 3, 1, 2)
        step = _normalized(y, parameters[4:8], block.dilation or 1)
        z = y + F.gelu(step).permute(0, 3, 1, 2)
        return x + mlp(z.permute(0, 2, 3, 1), *parameters[8:])

    return ced_block if block.dilation is None else lr_ced_block


def _fastfuse(block: Block, recompute: bool) -> Callable[..., Tensor]:
    if block.dilation is None:
        return partial(fastfuse.ced_block, eps=EPS, recompute=recompute)
    return partial(fastfuse.lr_ced_block, dilation=block.dilation, eps=EPS, recompute=recompute)


def _function(block: Block, name: str) -> Callable[..., Tensor]:
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


def build(block: Block, name: str, layout: str, dtype: str, mode: str, device: str) -> Call:
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


def moved_bytes(block: Block, dtype: str, mode: str) -> int:
    """Forward reads x and writes the output; backward reads x and a gradient, and writes x's."""
    image = torch.Size(block.image).numel()
    parameters = sum(torch.Size(shape).numel() for shape in block.parameters.values())
    values = 2 * image + parameters
    if mode == BOTH:
        values += 3 * image + 2 * parameters
    return values * getattr(torch, dtype).itemsize


def conventional_flops(block: Block, mode: str) -> int:
    per_pixel = 2 * 2 * block.channels * block.hidden
    per_pixel += block.steps * 2 * KERNEL_SIZE**2 * block.channels
    return per_pixel * block.height * block.width * (1 if mode == FORWARD else 3)


def tolerances(block: Block, cell: Cell) -> dict[str, float]:
    """Of the output and the gradients of x and the parameters.

    In float32 the roundings of the long sums over pixels partly cancel: they grow with the fourth
    root of the pixels. In bfloat16 both ways sum in float32, and round after other steps; but eager
    sums the gradients of a norm in bfloat16.
    """
    dtype = getattr(torch, cell.dtype)
    found = {"output": tolerance(dtype, roundings=4)}
    if cell.mode == FORWARD:
        return found
    cancelling = (block.height * block.width) ** 0.5
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


def _variants(block: Block, cell: Cell, device: str) -> list[Variant]:
    def variant(name: str, layout: str, **more: Any) -> Variant:
        call = build(block, name, layout, cell.dtype, cell.mode, device)
        return Variant(name, call, layout, **more)

    variants = [variant(name, layout, rival=False) for name, layout in cell.ours]
    for name, layout in cell.rivals:
        variants.append(variant(name, layout, optional=name in COMPILED))
    return variants


def _kept(variant: Variant) -> int:
    call = variant.call
    assert isinstance(call, Call)
    return kept_bytes(call, call.parameters)


def measure(
    op: str,
    shapes: Mapping[str, Block],
    cell: Cell,
    *,
    benchmark: Any,
    device: str,
    target: str,
    allowance: Allowance,
) -> dict[str, Any]:
    """Measures a cell. ``target``: the suite's function that builds a call from a shape's name."""
    block, tiny = shapes[cell.shape], cell.shape == TINY

    measures_memory = cell.mode == BOTH and current_regime() == "fresh" and not tiny
    memory = of_variants(target, cell, {"shape": TINY}, device)
    work = conventional_flops(block, cell.mode)
    return compare(
        benchmark,
        _variants(block, cell, device),
        info={
            "op": op,
            "shape": cell.shape,
            "image": block.image,
            "hidden": block.hidden,
            "dilation": block.dilation,
            "dtype": cell.dtype,
            "mode": cell.mode,
            "series": "overhead" if tiny else "main",
        },
        tolerances=tolerances(block, cell),
        exact=lambda: build(block, EXACT, CONTIGUOUS, cell.dtype, cell.mode, device)(),
        budget_s=1 if tiny else 10,
        max_rounds=2000 if tiny else 20,
        device=device,
        nbytes=None if tiny else moved_bytes(block, cell.dtype, cell.mode),
        flops=None if tiny else dict.fromkeys((OURS, KEEPING, *EAGER, *COMPILED), work),
        host=tiny,
        memory=memory if measures_memory else None,
        kept=_kept if measures_memory else None,
        allowance=allowance,
    )
