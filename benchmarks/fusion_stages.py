"""Where fusion_conv2d's forward spends its time: shares of its stages, from PyTorch's profiler.

    python benchmarks/fusion_stages.py [--out FILE.png] [--rounds N]

Products are those of the levels at their own resolution, an ``mm`` each; the convolution is that at
the target's resolution, by whatever it runs; the rest is mostly copies of weights and Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from bench_fusion_conv2d import build
from cell import DTYPES, FORWARD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from variants import CHANNELS_LAST

from fastfuse._terminal import spell_out
from fastfuse.ops.fusion_conv2d.target_resolution import LibraryConvolution, WinogradConvolution

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHAPES = ("UPer fusion", "PSP fusion")
ROUNDS, WARM_UPS = 7, 2
AT_TARGET = "convolution at the target's resolution"
STAGES = {  # and their colors
    "products at the levels' own": "#1f5fa8",
    AT_TARGET: "#e69138",
    "tap sum": "#3f8f4f",
    "rest": "#bbbbbb",
}
PRODUCTS, _, TAP_SUM, REST = STAGES


@contextmanager
def _marked() -> Iterator[None]:
    """Gives the convolution at the target's resolution a range of its own in profiles."""
    strategies = (LibraryConvolution, WinogradConvolution)
    usual = [strategy.forward for strategy in strategies]

    def marked(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(AT_TARGET):
                return forward(*args, **kwargs)

        return run

    for strategy in strategies:
        strategy.forward = marked(strategy.forward)
    try:
        yield
    finally:
        for strategy, forward in zip(strategies, usual, strict=True):
            strategy.forward = forward


def _stage(event: Any) -> str:
    """The stage of a profiled event, from its name and those of the events around it."""
    names = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    if AT_TARGET in names:
        return AT_TARGET
    if any(name.startswith("fastfuse::tap_sum") for name in names):
        return TAP_SUM
    return PRODUCTS if any(name in ("aten::mm", "aten::addmm") for name in names) else REST


def stages(shape: str, dtype: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of a call by stage, in the round whose total is the median."""
    call = build("fastfuse", CHANNELS_LAST, shape, dtype, FORWARD)
    found = []
    with _marked():
        for _ in range(WARM_UPS):
            call()
        for _ in range(rounds):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                call()
            spent = dict.fromkeys(STAGES, 0.0)
            for event in profiled.events():
                spent[_stage(event)] += event.self_cpu_time_total / 1e3
            found.append(spent)
    return sorted(found, key=lambda spent: sum(spent.values()))[len(found) // 2]


def table(rows: dict[tuple[str, str], dict[str, float]]) -> Table:
    result = Table(title="fusion_conv2d, forward: ms of a call and shares of its stages")
    result.add_column("shape")
    for name in ("ms", *STAGES):
        result.add_column(name, justify="right")
    for (shape, dtype), spent in rows.items():
        total = sum(spent.values())
        shares = [f"{100 * milliseconds / total:.1f} %" for milliseconds in spent.values()]
        result.add_row(f"{shape}, {dtype}", f"{total:.0f}", *shares)
    return result


def plot(rows: dict[tuple[str, str], dict[str, float]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.7), layout="constrained")
    labels = []
    for y, ((shape, dtype), spent) in enumerate(rows.items()):
        total, left = sum(spent.values()), 0.0
        labels.append(f"{shape}, {dtype}\n{total:.0f} ms")
        for stage, color in STAGES.items():
            share = 100 * spent[stage] / total
            axis.barh(y, share, left=left, color=color, height=0.7, label=stage if y == 0 else None)
            if share >= 4:
                where = (left + share / 2, y)
                color = "black" if stage == REST else "white"
                axis.annotate(f"{share:.0f}", where, ha="center", va="center", color=color)
            left += share
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of a forward call, in %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"fusion_conv2d, forward, {torch.get_num_threads()} threads: its stages")
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    spell_out()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("fusion_conv2d_stages.png"), metavar="FILE.png"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    rows = {
        (shape, dtype): stages(shape, dtype, arguments.rounds)
        for shape in SHAPES
        for dtype in DTYPES
    }
    plot(rows, arguments.out)
    console = Console()
    console.print(table(rows))
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
