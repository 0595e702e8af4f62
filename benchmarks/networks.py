"""What the benchmarks of heads and models share: calls, tolerances, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from cell import FORWARD, OURS, Build, Cell, Ways, every, measurement_of
from counts import count_work
from measure import Allowance, compare
from runtimes import RUNTIMES, Runtime
from torch import Tensor, nn
from variants import CHANNELS_LAST, CONTIGUOUS, Variant

from fastfuse.ops.layout import memory_format
from fastfuse.tolerances import tolerance

TRAINING = "training step"
PLAIN, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class NetworkCall:
    """Gives the output, or after a training step (output, *gradients of the inputs)."""

    function: Callable[[Any], Tensor]
    inputs: list[Tensor] = field(repr=False)
    parameters: list[Tensor] = field(repr=False)
    training: bool
    sequence: bool  # whether the function takes a sequence of tensors, or one

    def __call__(self) -> Any:
        if not self.training:
            with torch.no_grad():
                return self._forward(self.inputs)
        for parameter in self.parameters:
            parameter.grad = None
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        output = self._forward(inputs)
        output.backward(output.detach())
        return output.detach(), *(x.grad for x in inputs if x.grad is not None)

    def _forward(self, inputs: list[Tensor]) -> Tensor:
        return self.function(inputs if self.sequence else inputs[0])


def network_call(
    model: nn.Module,
    name: str,
    shapes: Sequence[tuple[int, ...]],
    layout: str,
    dtype: str,
    mode: str,
    device: str,
    *,
    sequence: bool,
) -> NetworkCall:
    """A call of a model whose weights are overwritten, by name, with those of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters(), key=lambda named: named[0]):
        if parameter.dim() == 4:
            scale = (2 / parameter[0].numel()) ** 0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    format_ = memory_format(layout == CHANNELS_LAST)
    model = model.to(device, getattr(torch, dtype))
    if name != OURS:  # ours takes weights as they come
        model = model.to(memory_format=format_)
    model.train(mode == TRAINING)
    inputs = [
        torch.randn(shape, generator=generator)
        .to(device, getattr(torch, dtype))
        .contiguous(memory_format=format_)
        for shape in shapes
    ]
    function: Any = model
    if name == COMPILED:
        function = torch.compile(model, dynamic=False, fullgraph=True)
    elif name in RUNTIMES:
        function = Runtime(name, model, sequence)
    return NetworkCall(function, inputs, list(model.parameters()), mode == TRAINING, sequence)


def rivals(*names: str, compiled: bool) -> Ways:
    """In both layouts; compiled ones, which take longest to compile, in channels_last."""
    return (*every(*names), (COMPILED, CHANNELS_LAST)) if compiled else every(*names)


def runtimes_of(mode: str) -> Ways:
    """Of forward passes; they convert contiguous images to what they like."""
    return every(*RUNTIMES, layouts=(CONTIGUOUS,)) if mode == FORWARD else ()


def tolerances(cell: Cell) -> dict[str, float]:
    """Of the output alone.

    Gradients of a chain of batch norms and ReLUs cannot be compared after rounding: where a ReLU's
    input is near 0, a rounding turns its gradient on or off. Eager's own float32 gradients of
    UPerHead are 2e-2 off float64's in a few values, in either layout, and fastfuse's likewise. The
    tests compare all gradients in float64.
    """
    dtype = getattr(torch, cell.dtype)
    roundings = 32 if cell.mode == FORWARD or cell.dtype != "float32" else 1024
    return {"output": tolerance(dtype, roundings=roundings)}


def work(build: Build, name: str, cell: Cell, device: str) -> tuple[int, int]:
    """FLOPs and bytes of a variant; every plain one's are the same."""
    return _work(build, OURS if name == OURS else PLAIN, cell.shape, cell.mode, cell.dtype, device)


@cache
def _work(
    build: Build, name: str, shape: str, mode: str, dtype: str, device: str
) -> tuple[int, int]:
    call = build(name, CONTIGUOUS, shape, dtype, mode, device)
    return count_work(lambda: call)


def measure_cell(
    op: str,
    cell: Cell,
    build: Build,
    *,
    benchmark: Any,
    device: str,
    allowance: Allowance,
    memory: Callable[[Sequence[Variant]], list[int | None]] | None = None,
) -> None:
    """Measures a cell of a suite, whose ``build`` is given."""
    measured = measurement_of(
        op, cell, build, device, tolerances=tolerances(cell), budget_s=20, max_rounds=10
    )
    allowance.say("counts FLOPs")
    calls = {
        v.name: v.call for v in measured.variants if v.layout == CHANNELS_LAST and not v.optional
    }
    flops = {name: count_work(lambda call=call: call)[0] for name, call in calls.items()}
    plain = next(work for name, work in flops.items() if name != OURS)
    flops |= dict.fromkeys((COMPILED, *RUNTIMES), plain)
    measured = replace(measured, exact=None, flops=flops, memory=memory)
    assert compare(benchmark, measured, allowance)["variants"]
