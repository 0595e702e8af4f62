"""Where ced_block and lr_ced_block spend their time: shares of the steps, from PyTorch's profiler.

    python benchmarks/block_stages.py [--out FILE.png] [--rounds N]

Forward, and backward with and without recomputing what forward computed. The products are the
library's, or where the policy says so the MLP is one kernel, of which no steps are told; GELU comes
with the bias before it, and in the steps of lr_ced_block's convolutions GELU and the image added
belong to the layer norm. Of the depthwise convolution backward has the gradient of the image and,
if it recomputes, forward's too. Sums are PyTorch's, over chunks and weights. The rest is mostly
Python.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_ced_block
import bench_lr_ced_block
import matplotlib
import torch
from ced_blocks import KEEPING
from cell import BOTH, DTYPES, OURS
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from variants import CHANNELS_LAST

from fastfuse._terminal import spell_out

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CELLS: tuple[tuple[ModuleType, str], ...] = (
    (bench_ced_block, "96x128x128"),
    (bench_ced_block, "192x64x64"),
    (bench_ced_block, "352x32x32"),
    (bench_lr_ced_block, "512x25x40"),
)
ROUNDS, WARM_UPS = 7, 2
TABLE_WIDTH = 200  # where there is no terminal
FORWARD, RECOMPUTING, BACKWARD = "forward", "backward, recompute", "backward"
STAGES = {  # and their colors
    "products": "#1f5fa8",
    "MLP as one kernel": "#123a66",
    "depthwise convolution": "#e69138",
    "its weight's gradient": "#b45f06",
    "layer norm": "#3f8f4f",
    "GELU": "#8e63a8",
    "residual": "#c2504f",
    "sums": "#7fb3b3",
    "rest": "#bbbbbb",
}
PRODUCTS, WHOLE, CONVOLUTION, GRADIENT, NORM, GELU, RESIDUAL, SUMS, REST = STAGES
EVENTS = {
    "aten::mm": PRODUCTS,
    "mkldnn::_linear_pointwise": PRODUCTS,
    "aten::addmm": PRODUCTS,
    "fastfuse::mlp_into": WHOLE,
    "fastfuse::mlp_backward_into": WHOLE,
    "fastfuse::depthwise_conv2d": CONVOLUTION,
    "fastfuse::depthwise_conv2d_backward_weight": GRADIENT,
    "fastfuse::layer_norm_into": NORM,
    "fastfuse::layer_norm_backward_into": NORM,
    "fastfuse::bias_gelu_into": GELU,
    "fastfuse::bias_gelu_backward_into": GELU,
    "fastfuse::residual_into": RESIDUAL,
    "fastfuse::residual_backward_into": RESIDUAL,
    **{f"aten::{name}": SUMS for name in ("add", "add_", "mul", "mul_", "sum", "copy_", "fill_")},
}

Spent = dict[str, float]  # milliseconds by stage


def _names(event: Any) -> list[str]:
    """Of a profiled event and those around it."""
    names = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return names


def _split(profiled: profile) -> tuple[Spent, Spent]:
    """Forward's and backward's."""
    forward, backward = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for event in profiled.events():
        names = _names(event)
        spent = backward if names[-1].startswith("autograd::engine") else forward
        stage = next((EVENTS[name] for name in names if name in EVENTS), REST)
        spent[stage] += event.self_cpu_time_total / 1e3
    return forward, backward


def _median(found: list[Spent]) -> Spent:
    return sorted(found, key=lambda spent: sum(spent.values()))[len(found) // 2]


def stages(suite: ModuleType, shape: str, dtype: str, rounds: int = ROUNDS) -> dict[str, Spent]:
    """Of each pass, in the round whose total is its median."""
    calls = [suite.build(name, CHANNELS_LAST, shape, dtype, BOTH) for name in (OURS, KEEPING)]
    found: dict[str, list[Spent]] = {FORWARD: [], RECOMPUTING: [], BACKWARD: []}
    for call in calls:
        for _ in range(WARM_UPS):
            call()
    for _ in range(rounds):
        for call, backward_name in zip(calls, (RECOMPUTING, BACKWARD), strict=True):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                call()
            forward, backward = _split(profiled)
            found[backward_name].append(backward)
            if backward_name == RECOMPUTING:  # the other forward has more to write
                found[FORWARD].append(forward)
    return {name: _median(spent) for name, spent in found.items()}


def table(rows: dict[tuple[str, str], Spent]) -> Table:
    result = Table(title="Blocks: ms of a pass, and of its stages", title_justify="left")
    result.add_column("block", no_wrap=True)
    result.add_column("pass", no_wrap=True)
    for name in ("ms", *STAGES):
        result.add_column(name, justify="right")
    last = None
    for (block, name), spent in rows.items():
        total = sum(spent.values())
        values = [f"{ms:.2f} ({100 * ms / total:.0f} %)" if ms else "" for ms in spent.values()]
        if last is not None and block != last:
            result.add_section()
        result.add_row("" if block == last else block, name, f"{total:.2f}", *values)
        last = block
    return result


def plot(rows: dict[tuple[str, str], Spent], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(11, 0.42 * len(rows) + 1.9), layout="constrained")
    labels = []
    for y, ((block, name), spent) in enumerate(rows.items()):
        total, left = sum(spent.values()), 0.0
        labels.append(f"{block}\n{name}: {total:.1f} ms")
        for stage, color in STAGES.items():
            share = 100 * spent[stage] / total
            axis.barh(
                y, share, left=left, color=color, height=0.78, label=stage if y == 0 else None
            )
            if share >= 3:
                where = (left + share / 2, y)
                color = "black" if stage == REST else "white"
                axis.annotate(
                    f"{share:.0f}", where, ha="center", va="center", color=color, fontsize=8
                )
            left += share
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of a pass, in %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Blocks, {torch.get_num_threads()} threads: the stages of a pass")
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    spell_out()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("block_stages.png"), metavar="FILE.png")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    rows = {}
    for suite, shape in CELLS:
        for dtype in DTYPES:
            passes = stages(suite, shape, dtype, arguments.rounds)
            for name, spent in passes.items():
                rows[f"{suite.OP} {shape}, {dtype}", name] = spent
    plot(rows, arguments.out)
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    console.print(table(rows))
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
