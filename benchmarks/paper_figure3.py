"""Figure 3 of *Scale Equalization for Multi-Level Feature Fusion*: variance after upsampling.

    python benchmarks/paper_figure3.py [--out FILE.png] [--full]

Features X ~ N(1/sqrt(2 pi), s^2) are upsampled by r = 2, 4 and 8; variances are biased and over the
whole tensor. The lines are the expectation for independent values; see ``expected_ratio``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastfuse
from fastfuse._terminal import spell_out

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATIOS = (2, 4, 8)
COLORS = {2: "#1b6ca8", 4: "#d1742f", 8: "#3f8f4f"}
S2 = [round(0.1 * i, 1) for i in range(1, 10)]
MEAN = 1 / math.sqrt(2 * math.pi)  # Eq. 6: the mean after Conv-BN-ReLU
REDUCED = (2, 32, 64, 64)
FULL = (16, 256, 128, 128)
CHUNK = 16  # channels at a time: at r = 8 the paper's tensor would take 17 GB in float32


def expected_ratio(r: int, size: int) -> float:
    """E[Var[UP_r(X)]] / Var[X] of square maps of independent values; r even.

    Along an axis the r outputs between two source positions are (1 - w) a + w b with
    w = (j + 1/2) / r, 0 <= j < r. Their variance (1 - w)^2 + w^2 averages (4 r^2 - 1) / (6 r^2);
    r outputs of the whole axis lie beyond the border's centres and copy one value.
    """
    inner = (4 * r * r - 1) / (6 * r * r)
    return (inner + (1 - inner) / size) ** 2


def variance(planes: list[tuple[Tensor, Tensor]]) -> float:
    """The biased variance of a tensor from the variances and means of its (equal) planes."""
    within = torch.cat([v.double().flatten() for v, _ in planes])
    means = torch.cat([m.double().flatten() for _, m in planes])
    return (within.mean() + means.var(correction=0)).item()


def measure(shape: tuple[int, int, int, int], s2: float, generator: torch.Generator) -> list[float]:
    """Variance before upsampling and after each of RATIOS."""
    batch, channels, height, width = shape
    planes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in (1, *RATIOS)]
    for _ in range(batch * channels // CHUNK):
        noise = torch.randn(1, CHUNK, height, width, generator=generator)
        x = MEAN + math.sqrt(s2) * noise
        for results, r in zip(planes, (1, *RATIOS), strict=True):
            up = fastfuse.upsample_equalize_concat([x], size=(r * height, r * width))
            results.append(torch.var_mean(up, dim=(2, 3), correction=0))
    return [variance(results) for results in planes]


def table(rows: list[list[float]], size: int) -> Table:
    result = Table(title="Variance after bilinear upsampling: measured (expected)")
    for name in ("s²", "before", *(f"r = {r}" for r in RATIOS)):
        result.add_column(name, justify="right")
    for s2, (before, *after) in zip(S2, rows, strict=True):
        cells = [
            f"{value:.4f} ({s2 * expected_ratio(r, size):.4f})"
            for r, value in zip(RATIOS, after, strict=True)
        ]
        result.add_row(f"{s2:.1f}", f"{before:.4f}", *cells)
    return result


def plot(rows: list[list[float]], size: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="before upsampling")
    for i, r in enumerate(RATIOS):
        ratio = expected_ratio(r, size)
        axes.plot([0, 1], [0, ratio], color=COLORS[r], linewidth=1)
        after = [row[i + 1] for row in rows]
        label = f"r = {r}: {ratio:.3f} s²"
        axes.plot([row[0] for row in rows], after, "o", color=COLORS[r], markersize=4, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="variance before upsampling, s²")
    axes.set(ylabel="variance after upsampling", title="Bilinear upsampling lowers variance")
    axes.legend(title="points: measured, lines: expected", loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    spell_out()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("paper_figure3.png"), metavar="FILE.png")
    parser.add_argument(
        "--full", action="store_true", help=f"the paper's shape {FULL}, minutes; else {REDUCED}"
    )
    arguments = parser.parse_args()
    shape = FULL if arguments.full else REDUCED
    generator = torch.Generator().manual_seed(0)
    rows = [measure(shape, s2, generator) for s2 in S2]
    plot(rows, shape[-1], arguments.out)
    console = Console()
    console.print(table(rows, shape[-1]))
    console.print(f"{' x '.join(map(str, shape))}: {arguments.out}")


if __name__ == "__main__":
    main()
