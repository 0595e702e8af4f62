"""The scale of every fusion's branches, as they are and as calibration makes them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from fastfuse.calibration import MomentsObserver, combined_statistics, write_statistics
from fastfuse.calibration.branch_report import BranchReport, BranchScale
from fastfuse.calibration.equalizers import (
    find_equalizers,
    find_fusions,
    identity_equalizers,
    kept_statistics,
    unwrap,
)
from fastfuse.calibration.observed_pass import FusionInput, run_observed
from fastfuse.nn import ScaleEqualizer
from fastfuse.nn.level_fusion import LevelFusion
from fastfuse.ops.depthwise_conv2d import depthwise_conv2d
from fastfuse.ops.fusion_conv2d import fusion_conv2d
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

__all__ = ["check_numbers_path", "report", "save_report", "table"]


# Gradients are those of so many images, and of random upstream gradients for at least so many
# channels: fewer are noisy.
_IMAGES = 4
_DRAWN_CHANNELS = 128
_FORMAT = "fastfuse report"


def report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    encoder: str | nn.Module | None = "backbone",
    max_batches: int | None = None,
    progress: bool = True,
) -> list[BranchReport]:
    """How unequal the branches of every fusion are, and what calibration makes of them.

    Two passes over the batches, modes as in :func:`fastfuse.calibrate`: one with every equalizer at
    the identity, one with every fusion equalized by what the first found (fusions without an
    equalizer borrow one). Gradients are those of the first four images. The model is left as it
    was.

    Args:
        model: with fusions (``MultiLevelFusion``, ``SeparableFusion``), equalized or not.
        batches, encoder, max_batches, progress: as in :func:`fastfuse.calibrate`; ``batches`` must
            allow to be iterated twice.

    Raises:
        ValueError: a model without fusions, an iterator as ``batches``, and what ``calibrate``
            raises. TypeError, as there.

    >>> import torch, fastfuse
    >>> from fastfuse.calibration.report import report
    >>> fusion = fastfuse.nn.MultiLevelFusion([3, 3], 4)
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fusion = fusion
    ...     def forward(self, images):
    ...         return self.fusion([images, torch.nn.functional.avg_pool2d(images, 4)])
    >>> branches = report(Model(), [torch.randn(4, 3, 16, 16)], encoder=None)
    >>> branches[1].label, branches[1].before.variance < 0.1, round(branches[1].after.variance, 4)
    ('level 1 (3 ch, x4)', True, 1.0)
    """
    model = unwrap(model)
    owners = find_fusions(model)
    if not owners:
        raise ValueError(
            "report: the model has no fusions (fastfuse.nn.MultiLevelFusion or SeparableFusion)"
        )
    if iter(batches) is batches:
        raise ValueError(
            f"report: batches must be iterable twice, such as a list or a DataLoader; "
            f"got {type(batches).__name__}"
        )
    options: dict[str, Any] = {"encoder": encoder, "max_batches": max_batches}
    options["progress"] = progress

    def scales() -> _ScalesObserver:
        found = _ScalesObserver(owners)
        found.images = run_observed("report", model, batches, found.observe, **options)
        return found

    present = find_equalizers(model)
    own = {n: f.equalizer for n, f in owners.items() if f.equalizer is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_statistics(present.values(), always=True))
        with identity_equalizers(present.values()):
            before = scales()
        levels = {name: len(fusion.in_channels) for name, fusion in owners.items()}
        moments = before.moments.result() if before.images else {}
        statistics = combined_statistics("report", [moments], levels)
        stack.enter_context(_borrowed([f for n, f in owners.items() if n not in own]))
        write_statistics({n: f.equalizer for n, f in owners.items() if f.equalizer}, statistics)
        after = scales()
    branches = []
    for name, fusion in owners.items():
        first, last = before.of(name), after.of(name)
        target = before.targets[name]
        for level, channels in enumerate(fusion.in_channels):
            size = before.sizes[name][level]
            mu, sigma = statistics[name].mean[level], statistics[name].std[level]
            raw = last[level]
            equalized = BranchScale((raw.mean - mu) / sigma, raw.variance / sigma**2, raw.gradient)
            branches.append(
                BranchReport(name, level, channels, size, target, first[level], equalized)
            )
    return branches


class _ScalesObserver:
    """What one pass finds out about every fusion."""

    def __init__(self, owners: dict[str, LevelFusion]) -> None:
        self.images = 0
        self.moments = MomentsObserver(owners)
        self.sizes: dict[str, list[tuple[int, int]]] = {}
        self.targets: dict[str, tuple[int, int]] = {}
        self._gradients: dict[str, list[float]] = {}

    def observe(self, given: FusionInput) -> None:
        self.moments.observe(given)
        if isinstance(given.module, LevelFusion) and given.size and given.name not in self.sizes:
            self.sizes[given.name] = [(f.shape[2], f.shape[3]) for f in given.features]
            self.targets[given.name] = given.size
            self._gradients[given.name] = _gradients(given.module, given)

    def of(self, name: str) -> list[BranchScale]:
        moments = self.moments.result()[name]
        return [
            BranchScale(m.mean, m.variance, gradient)
            for m, gradient in zip(moments, self._gradients[name], strict=True)
        ]


@torch.enable_grad()
def _gradients(fusion: LevelFusion, given: FusionInput) -> list[float]:
    """RMS of every branch's part of the weight's gradient, for a random upstream gradient."""
    weight = fusion.level_weight.detach().requires_grad_()
    features = [feature[:_IMAGES].detach() for feature in given.features]
    mean = fusion.equalizer.mean if fusion.equalizer else None
    std = fusion.equalizer.std if fusion.equalizer else None
    constants: dict[str, Any] = {"mean": mean, "std": std, "align_corners": given.align_corners}
    if fusion.level_axis == 0:  # one kernel per channel
        levels = upsample_equalize_concat(features, size=given.size, **constants)
        output = depthwise_conv2d(levels, weight)
    else:
        output = fusion_conv2d(features, weight, size=given.size, **constants)
    generator = torch.Generator().manual_seed(0x5CA1E)
    channels = output.shape[1]
    squares = torch.zeros(len(features), dtype=torch.float64, device="cpu")
    draws = -(-_DRAWN_CHANNELS // channels)
    for _ in range(draws):
        upstream = torch.randn(output.shape, generator=generator, device="cpu").to(output)
        upstream *= (channels / output.numel()) ** 0.5
        (gradient,) = torch.autograd.grad(output, weight, upstream, retain_graph=True)
        parts = gradient.double().split(fusion.in_channels, fusion.level_axis)
        squares += torch.stack([part.square().mean() for part in parts]).cpu()
    return (squares / draws).sqrt().tolist()


@contextlib.contextmanager
def _borrowed(owners: list[LevelFusion]) -> Iterator[None]:
    """Equalizers for fusions that have none, for as long as the body runs."""
    as_attribute = [fusion for fusion in owners if "equalizer" in vars(fusion)]
    try:
        for fusion in owners:
            equalizer = ScaleEqualizer(len(fusion.in_channels))
            fusion.equalizer = equalizer.to(fusion.level_weight.device)
        yield
    finally:
        for fusion in owners:
            if fusion in as_attribute:  # None was no child then
                del fusion.equalizer
            fusion.equalizer = None


def table(branches: list[BranchReport]) -> Table:
    """For the terminal."""
    result = Table(title="Scale of the branches: before → after calibration", box=box.SIMPLE_HEAD)
    result.add_column("branch", no_wrap=True)
    for column in ("mean", "variance", "gradient scale"):
        result.add_column(column, justify="right", no_wrap=True)
    shown = None
    for branch in branches:
        if shown != branch.fusion:
            if shown is not None:
                result.add_section()
            result.add_row(f"[bold]{escape(branch.fusion or 'model')}[/]")
            shown = branch.fusion
        values = [
            f"{getattr(branch.before, f):.3g} → {_rounded(getattr(branch.after, f))}"
            for f in ("mean", "variance", "gradient")
        ]
        result.add_row(f"  {branch.label}", *values)
    return result


def _rounded(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def check_numbers_path(path: Path) -> Path:
    """Of the JSON file beside a plot; ValueError if something else is there."""
    numbers = path.with_suffix(".json")
    if numbers.exists():
        try:
            known = json.loads(numbers.read_text(encoding="utf-8"))["format"] == _FORMAT
        except (ValueError, LookupError, TypeError, OSError):
            known = False
        if not known:
            raise ValueError(
                f"report: the numbers would go to {numbers}, where another file is; "
                f"choose another name for the plot"
            )
    return numbers


def save_report(branches: list[BranchReport], path: str | PathLike[str]) -> list[Path]:
    """Writes a plot to ``path`` (.png, .svg or .pdf) and the numbers to a JSON file beside it.

    Raises:
        ValueError: another suffix, or a JSON file of that name that is no report.
        ImportError: matplotlib is not installed.
    """
    from fastfuse.calibration.plot import plot

    path = Path(path)
    numbers = check_numbers_path(path)
    plot(branches, path)
    entries = [{**asdict(b), "label": b.label} for b in branches]
    document = {"format": _FORMAT, "version": 1, "branches": entries}
    numbers.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [path, numbers]
