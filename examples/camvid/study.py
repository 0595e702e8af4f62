"""With and without equalizers, over several seeds: is the difference more than chance?"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from examples.camvid.checkpoint import State
from examples.camvid.config import Config
from examples.camvid.data import DataSet
from examples.camvid.pictures import curves, gradient_curves
from examples.camvid.processes import Processes
from examples.camvid.training import train

__all__ = ["Comparison", "compare", "study", "t_quantile"]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two variants over the same seeds, in points of mIoU.

    Attributes:
        without, with_equalizers: mIoU in percent, seed by seed.
        difference: mean of the paired differences.
        interval: its 95 % confidence interval by Student's distribution.
    """

    without: tuple[float, ...]
    with_equalizers: tuple[float, ...]
    difference: float
    interval: tuple[float, float]

    def entry(self) -> dict[str, Any]:
        """In JSON, which has no infinity."""
        interval = self.interval if math.isfinite(self.interval[0]) else None
        return asdict(self) | {"interval": interval}


def compare(without: Sequence[float], with_equalizers: Sequence[float]) -> Comparison:
    """Pairs the runs of a seed; of one seed the interval is infinite.

    >>> found = compare([50.0, 52.0, 51.0], [51.0, 52.5, 52.5])
    >>> round(found.difference, 3), [round(end, 3) for end in found.interval]
    (1.0, [-0.242, 2.242])
    """
    differences = [b - a for a, b in zip(without, with_equalizers, strict=True)]
    mean, half = statistics.fmean(differences), math.inf
    if (n := len(differences)) > 1:
        error = statistics.stdev(differences) / math.sqrt(n)
        half = t_quantile((1 + _CONFIDENCE) / 2, n - 1) * error
    return Comparison(tuple(without), tuple(with_equalizers), mean, (mean - half, mean + half))


def t_quantile(probability: float, degrees: int) -> float:
    """Student's distribution, by bisection of its closed form.

    Source: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.3 and 26.7.4.

    >>> round(t_quantile(0.975, 2), 3), round(t_quantile(0.975, 9), 3)
    (4.303, 2.262)
    """
    low, high = 0.0, 1e6
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        below = (1 + _t_within(middle, degrees)) / 2 < probability
        low, high = (middle, high) if below else (low, middle)
    return high


def _t_within(t: float, degrees: int) -> float:
    """The probability of |T| < t."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine2 = math.cos(angle) ** 2
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine2 * (k - 1) / k
        total += term
    if degrees == 1:
        return 2 * angle / math.pi
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def study(
    config: Config,
    data: DataSet,
    out: Path,
    *,
    heads: Sequence[str],
    seeds: Sequence[int],
    processes: Processes,
    workers: int = 0,
    console: Console,
) -> dict[str, Comparison]:
    """Trains every head with and without equalizers for every seed, and compares.

    A run that is done, or was interrupted, is not begun again. ``config.scale_equalizer`` says
    which equalizers, "module" unless it is "fold". Writes ``study.md``, ``study.json`` and two
    pictures for each head, of the curves and of the gradients' scale.

    Raises:
        ValueError: no seeds; what :func:`examples.camvid.training.train` raises.

    Returns:
        By head, of the test images where there are any, else of the validation images.
    """
    if not seeds:
        raise ValueError("camvid: --seeds must be at least 1; got 0")
    equalizers = "fold" if config.scale_equalizer == "fold" else "module"
    found = {}
    for head in heads:
        states: dict[str, list[State]] = {"none": [], equalizers: []}
        for seed in seeds:  # in turns, so that an unfinished study has pairs
            for variant, of_variant in states.items():
                run = replace(config, head=head, seed=seed, scale_equalizer=variant)
                name = f"{head}-{variant}-seed{seed}"
                console.rule(name)
                _, state = train(
                    run, data, out / name, processes=processes, workers=workers, console=console
                )
                of_variant.append(state)
        found[head] = compare(*([_score(s) for s in states[v]] for v in states))
        if processes.first:
            curves({f"{head}, {name}": of for name, of in states.items()}, out / f"{head}.png")
            gradient_curves(
                {v: [s.gradients for s in of] for v, of in states.items()},
                out / f"{head}-gradients.png",
            )
            (out / "study.md").write_text(_markdown(found), encoding="utf-8")
            numbers = {name: comparison.entry() for name, comparison in found.items()}
            (out / "study.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    console.print(_table(found))
    return found


def _score(state: State) -> float:
    return 100 * (state.history[-1] if state.test is None else state.test)["miou"]


_COLUMNS = ("head", "without, mIoU %", "with, mIoU %", "paired difference", "95 % interval")


def _rows(found: dict[str, Comparison]) -> list[tuple[str, ...]]:
    return [
        (
            head,
            _spread(c.without),
            _spread(c.with_equalizers),
            f"{c.difference:+.2f}",
            f"{c.interval[0]:+.2f} to {c.interval[1]:+.2f}",
        )
        for head, c in found.items()
    ]


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _markdown(found: dict[str, Comparison]) -> str:
    lines = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1)), *_rows(found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _table(found: dict[str, Comparison]) -> Table:
    seeds = len(next(iter(found.values())).without)
    table = Table(title=f"Scale equalizers, {seeds} seeds", box=box.SIMPLE_HEAD)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "head" else "right")
    for row in _rows(found):
        table.add_row(*row)
    return table
