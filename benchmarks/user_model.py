"""A model of one's own before and after ``fastfuse.convert``: latency, memory, agreement.

    python benchmarks/user_model.py package.module:factory --input 1x3x512x512
        [--dtype NAME] [--layout NAME] [--no-training] [--out FILE.json] [--device cpu|cuda]

Both in both layouts, weights included, interleaved; what counts is the better one of each. A
training step is forward and backward to all parameters, of fixed random gradients of the outputs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from agreement import relative_error
from machine import environment
from measure import Allowance, Measurement, compare
from peak_memory import peak_extra_memory
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from variants import CHANNELS_LAST, CONTIGUOUS, Variant

from fastfuse._commands import build_model, guarded, image_shape, say
from fastfuse._terminal import spell_out
from fastfuse.conversion import convert, revert
from fastfuse.ops.layout import memory_format
from fastfuse.tolerances import tolerance
from fastfuse.verify import MismatchError

__all__ = ["ModelCall", "agreement", "build", "main", "tensors_of"]

OURS, EAGER = "fastfuse", "eager"
FORWARD, TRAINING = "forward pass", "training step"
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)
BUDGET_S, MOST_ROUNDS = 20.0, 10
LOG_WIDTH = 110  # of the table where there is no terminal


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output: tensors, sequences, mappings, dataclasses."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    if not isinstance(output, (list, tuple)):
        return []
    return [tensor for item in output for tensor in tensors_of(item)]


@dataclass(frozen=True)
class ModelCall:
    """Gives a model's outputs; in training mode after backward to its parameters."""

    model: nn.Module
    image: Tensor
    cotangents: list[Tensor] = field(default_factory=list, repr=False)  # of the first call

    def __call__(self) -> list[Tensor]:
        if not self.model.training:
            with torch.no_grad():
                return tensors_of(self.model(self.image))
        for parameter in self.model.parameters():
            parameter.grad = None
        outputs = tensors_of(self.model(self.image))
        trained = [output for output in outputs if output.requires_grad]
        if not self.cotangents:
            generator = torch.Generator().manual_seed(0)
            for x in trained:
                random = torch.randn(x.shape, generator=generator) / math.sqrt(x.numel())
                self.cotangents.append(torch.empty_like(x).copy_(random).detach())
        torch.autograd.backward(trained, self.cotangents)
        return [output.detach() for output in outputs]


def call_of(
    model: nn.Module, name: str, layout: str, shape: Sequence[int], dtype: str, mode: str,
    device: str,
) -> ModelCall:  # fmt: skip
    """Of a copy of the model, converted if it is ours."""
    format_ = memory_format(layout == CHANNELS_LAST)
    model = copy.deepcopy(model)
    (convert if name == OURS else revert)(model)
    model = model.to(device, getattr(torch, dtype)).to(memory_format=format_)
    image = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    image = image.to(device, getattr(torch, dtype)).contiguous(memory_format=format_)
    return ModelCall(model.train(mode == TRAINING), image)


def build(factory: str, **arguments: Any) -> ModelCall:
    """In a process that has no model yet."""
    return call_of(build_model(factory), **arguments)


def small() -> nn.Module:
    """What loads libraries before memory is measured."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


def agreement(call: Callable[..., ModelCall], layout: str, mode: str) -> dict[str, float]:
    """How far the converted model is off the original, of the same random numbers.

    Of outputs the largest difference over the largest magnitude. Of gradients the norm of all
    differences over the norm of all: one that meets a ReLU near 0 is on or off by a rounding.
    """
    ours, eager = (call(name=name, layout=layout, mode=mode) for name in (OURS, EAGER))
    outputs = []
    for one in (ours, eager):
        torch.manual_seed(0)  # stochastic depth and dropout
        outputs.append(one())
    found = {"outputs": max(relative_error(a, b) for a, b in zip(*outputs, strict=True))}
    if mode == TRAINING:
        difference = norm = 0.0
        pairs = zip(ours.model.parameters(), eager.model.parameters(), strict=True)
        for a, b in ((a.grad, b.grad) for a, b in pairs):
            if (a is None) != (b is None):
                difference = math.inf
            elif a is not None and b is not None:
                difference += (a.double() - b.double()).square().sum().item()
                norm += b.double().square().sum().item()
        found["gradients"] = math.sqrt(difference / max(norm, 1e-60))
    return found


def tolerances(dtype: str) -> dict[str, float]:
    type_ = getattr(torch, dtype)
    of_outputs = tolerance(type_, roundings=100 if dtype == "float32" else 32)
    return {"outputs": of_outputs, "gradients": tolerance(type_, roundings=1024)}


class Rounds:
    """As much of pytest-benchmark's fixture as ``compare`` asks for."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Any, *, setup: Any, rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            setup()
            target()


def measure(call: Callable[..., ModelCall], mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """The record of a mode.

    Raises:
        MismatchError: the models do not agree.
    """
    layouts = (args.layout,) if args.layout else LAYOUTS
    apart = agreement(call, layouts[0], mode)
    limits = tolerances(args.dtype)
    for what, error in apart.items():
        # Where outputs differ that much, float64 decides below.
        if not error <= limits[what] and (what, mode) != ("outputs", FORWARD):
            raise MismatchError(
                f"{mode}: the converted model's {what} are {error:.1e} > {limits[what]:.1e} off "
                "the original's"
            )
    variants = [
        Variant(name, call(name=name, layout=layout, mode=mode), layout, rival=name == EAGER)
        for name in (OURS, EAGER)
        for layout in layouts
    ]

    def exact() -> list[Tensor]:
        return call(name=EAGER, layout=CONTIGUOUS, mode=mode, dtype="float64")()

    outputs = range(len(variants[0].call())) if mode == FORWARD else ()  # dropout follows layouts
    measured = Measurement(
        variants,
        info={"mode": mode},
        tolerances={f"output {i}": limits["outputs"] for i in outputs},
        budget_s=BUDGET_S,
        max_rounds=MOST_ROUNDS,
        device=args.device,
        exact=exact,
    )
    found = compare(Rounds(), measured, Allowance())
    best = {name: _best(found, name) for name in (EAGER, OURS)}
    ratio = best[EAGER]["median_ms"] / best[OURS]["median_ms"]
    found |= {"agreement": apart, "speedup": ratio}
    where = {"shape": args.input, "dtype": args.dtype, "mode": mode, "device": args.device}
    cases = [
        {"factory": args.model, "name": name, "layout": v["layout"], **where}
        for name, v in best.items()
    ]
    warm_up = {"factory": f"{Path(__file__).stem}:small", "shape": (1, 3, 32, 32)}
    target = f"{Path(__file__).stem}:{build.__name__}"
    peaks = peak_extra_memory(target, cases, warm_up=warm_up, device=args.device)
    for v, peak in zip(best.values(), peaks, strict=True):
        v["peak_bytes"] = peak
    return found


def _best(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    return min((v for v in found["variants"] if v["name"] == name), key=lambda v: v["median_ms"])


def table(modes: Sequence[Mapping[str, Any]], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(("", "model", "ms", "spread (IQR)", "peak extra MiB")):
        shown.add_column(column, justify="left" if i < 2 else "right")
    names = {OURS: "converted", EAGER: "original"}
    for found in modes:
        for v in sorted(found["variants"], key=lambda v: (v["rival"], v["median_ms"])):
            peak = "" if v["peak_bytes"] is None else f"{v['peak_bytes'] / 2**20:.0f}"
            times = (f"{v['median_ms']:.4g}", f"{v['iqr_ms']:.3g}")
            shown.add_row(found["mode"], f"{names[v['name']]}, {v['layout']}", *times, peak)
        for left, reason in found["left_out"].items():
            shown.add_row(found["mode"], left.replace(EAGER, names[EAGER]), reason)
        shown.add_section()
    return shown


def sentence(found: Mapping[str, Any]) -> str:
    """What a mode comes to."""
    ours, eager = _best(found, OURS), _best(found, EAGER)
    text = f"{found['mode']}: {found['speedup']:.2f}x as fast"
    noise = (ours["iqr_ms"] + eager["iqr_ms"]) / 2
    if abs(ours["median_ms"] - eager["median_ms"]) <= noise:
        text += " (no difference beyond the spread)"
    elif found["speedup"] < 1:
        text += " (the converted model is slower)"
    if ours["peak_bytes"] is not None and eager["peak_bytes"]:
        text += f", in {ours['peak_bytes'] / eager['peak_bytes']:.2f}x the memory"
    apart = " and ".join(f"{what} {error:.1e}" for what, error in found["agreement"].items())
    return f"{text}; apart by: {apart}"


def run(args: argparse.Namespace) -> int:
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out must be in a folder that exists; got {str(args.out)!r}")
    torch.manual_seed(0)
    model = build_model(args.model)
    shape = "x".join(map(str, args.input))

    def call(dtype: str = args.dtype, **more: Any) -> ModelCall:
        return call_of(model, shape=args.input, dtype=dtype, device=args.device, **more)

    def fails(mode: str) -> str | None:
        """Of the original model; the first line of why."""
        try:
            one = call(name=EAGER, layout=args.layout or CONTIGUOUS, mode=mode)
            if not one():
                return "it returns no floating-point tensor"
            trains = mode == FORWARD or any(p.grad is not None for p in one.model.parameters())
            return None if trains else "no parameter gets a gradient"
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    if reason := fails(FORWARD):
        raise ValueError(f"{args.model} fails on {shape}, {args.dtype}: {reason}")
    report = convert(copy.deepcopy(model), dry_run=True)
    modes, notes = [FORWARD], []
    if not report.converted:
        notes.append("nothing is converted: both models run the same code")
    if not args.no_training:
        if reason := fails(TRAINING):
            notes.append(f"training step: left out, for the original fails on {shape}: {reason}")
        else:
            modes.append(TRAINING)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(str(report), markup=False, highlight=False)
    measured = []
    try:
        for mode in modes:
            say(f"measures the {mode}")
            measured.append(measure(call, mode, args))
    except MismatchError as error:
        say(f"bench: the converted model does not agree with the original: {error}")
        return 1
    console.print(table(measured, f"{args.model}, {shape}, {args.dtype}, {args.device}"))
    for line in (*notes, *map(sentence, measured)):
        console.print(line, markup=False, highlight=False)
    if args.out is not None:
        record = {
            "model": args.model, "input": list(args.input), "dtype": args.dtype,
            "converted": report.converted, "left": report.left, "notes": notes,
            "environment": environment(args.device), "modes": measured,
        }  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    spell_out()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="package.module:factory, or a model there")
    parser.add_argument("--input", type=image_shape, required=True, metavar="NxCxHxW")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, help="only this one")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    return guarded("bench", run)(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
