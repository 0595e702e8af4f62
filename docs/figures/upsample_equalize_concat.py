"""Draws docs/upsample_equalize_concat.png.

python docs/figures/upsample_equalize_concat.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from fastfuse.ops.bilinear import axis_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "upsample_equalize_concat.png"

LEVELS = ("#1b6ca8", "#d1742f", "#3f8f4f")  # r = 1, 2, 4
PALE = ("#cfe1ef", "#f6dfcc", "#d3e8d7")
INK, GREY = "#222222", "#8a8a8a"
TARGET = 8  # pixels along an axis of the drawn output; the levels have 8, 4 and 2


def cell(axes: Axes, x: float, y: float, size: float, color: str, **style: object) -> None:
    style = {"edgecolor": "white", "linewidth": 1.0, **style}
    axes.add_patch(Rectangle((x, y), size, size, facecolor=color, **style))


def grid(
    axes: Axes,
    left: float,
    top: float,
    shape: tuple[int, int],
    size: float,
    color: str,
    strong: dict[tuple[int, int], str] | None = None,
) -> None:
    """Rows run down from ``top``; ``strong`` colours single cells."""
    for row in range(shape[0]):
        for column in range(shape[1]):
            fill = (strong or {}).get((row, column), color)
            cell(axes, left + column * size, top - (row + 1) * size, size, fill)


def arrow(axes: Axes, start: float, end: float, y: float, text: str) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3}
    axes.annotate("", (end, y), (start, y), arrowprops=style)
    axes.text((start + end) / 2, y + 0.16, text, ha="center", va="bottom", fontsize=9, color=INK)


def cache(axes: Axes, left: float, bottom: float, width: float, height: float, text: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0.12",
            facecolor="#fafafa",
            edgecolor=GREY,
            linestyle="--",
            linewidth=1.2,
        )
    )
    axes.text(left + width / 2, bottom - 0.24, text, ha="center", va="top", fontsize=9, color=GREY)


def caption(axes: Axes, x: float, y: float, text: str, color: str = INK) -> None:
    axes.text(x, y, text, ha="center", va="top", fontsize=9, color=color)


def panel(axes: Axes, title: str) -> None:
    axes.set(xlim=(0, 16), ylim=(-0.75, 3.55))
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)


def forward_contiguous(axes: Axes) -> None:
    panel(axes, "Forward, contiguous: the two source rows an output row lies between, widened")
    lower, upper, weight = axis_table(4, TARGET, align_corners=False)
    y = 4  # the output row in the making
    read = (int(lower[y]), int(upper[y]))

    for i, (count, size, left) in enumerate(((8, 0.2, 0.2), (4, 0.45, 2.3), (2, 0.45, 4.55))):
        rows = {(row, column): LEVELS[1] for row in read for column in range(4)} if i == 1 else {}
        grid(axes, left, 2.45, (count, count), size, PALE[i], rows)
        caption(axes, left + count * size / 2, 2.45 - count * size - 0.1, f"level {i}\nr = {2**i}")

    arrow(axes, 5.65, 7.35, 1.75, "equalize, then\ninterpolate along x")
    cache(axes, 7.9, 1.3, TARGET * 0.28, 0.9, "in cache, one thread:\ntwo wide rows")
    for slot, row in enumerate(read):
        for column in range(TARGET):
            cell(axes, 7.9 + column * 0.28, 1.88 - slot * 0.54, 0.28, LEVELS[1])
        axes.text(7.7, 2.02 - slot * 0.54, f"{row}", ha="right", va="center", fontsize=8)
    text = f"interpolate along y\n{1 - weight[y]:.2f} · above\n+ {weight[y]:.2f} · below"
    arrow(axes, 10.4, 12.4, 1.75, text)

    for i in (2, 1, 0):  # the output: one slab of channels per level, level 0 in front
        left, top = 12.6 + 0.85 * i, 2.25 + 0.4 * i
        strong = {(y, column): LEVELS[1] for column in range(TARGET)} if i == 1 else {}
        grid(axes, left, top, (TARGET, TARGET), 0.2, PALE[i], strong)
        axes.add_patch(
            Rectangle((left, top - TARGET * 0.2), TARGET * 0.2, TARGET * 0.2, fill=False, lw=0.8)
        )
    caption(axes, 14.0, 0.5, "the concatenation,\nwritten once")


def pixel_bar(axes: Axes, x: float, bottom: float, colors: list[str], width: float = 0.2) -> None:
    """One channels_last pixel: its channels lie together in memory."""
    for i, color in enumerate(colors):
        axes.add_patch(
            Rectangle((x, bottom + 0.5 * i), width, 0.5, facecolor=color, edgecolor="white", lw=0.8)
        )


def forward_channels_last(axes: Axes) -> None:
    panel(axes, "Forward, channels_last: the two source columns an output pixel lies between")
    lower, upper, weight = axis_table(4, TARGET, align_corners=False)
    x = 4
    read = (int(lower[x]), int(upper[x]))

    strong = {(row, column): LEVELS[1] for row in read for column in read}
    grid(axes, 2.3, 2.45, (4, 4), 0.45, PALE[1], strong)
    caption(axes, 3.2, 0.55, "level 1: the pixels\naround one output pixel")
    arrow(axes, 5.0, 7.65, 1.75, "interpolate along y,\nequalize: all channels\nof a pixel at once")
    cache(axes, 7.9, 0.95, 2.24, 1.45, "in cache, one thread:\ntwo columns of channels")
    for slot, column in enumerate(read):
        left = 8.45 + slot * 0.8
        for channel in range(5):
            cell(axes, left, 1.0 + channel * 0.26, 0.26, LEVELS[1])
        axes.text(left - 0.08, 1.65, f"{column}", ha="right", va="center", fontsize=8)
    text = f"interpolate along x\n{1 - weight[x]:.2f} · left\n+ {weight[x]:.2f} · right"
    arrow(axes, 10.4, 12.4, 1.75, text)
    for column in range(TARGET):
        colors = [PALE[0], LEVELS[1] if column == x else PALE[1], PALE[2]]
        pixel_bar(axes, 12.85 + 0.3 * column, 1.0, colors)
    caption(axes, 14.0, 0.8, "a row of output pixels: each\nholds the channels of all levels")


def backward(axes: Axes) -> None:
    panel(axes, "Backward: every source pixel gathers the window of the target that read it")
    lower, upper, weight = axis_table(4, TARGET, align_corners=False)
    lower, upper = lower.tolist(), upper.tolist()

    def adjoint(source: int) -> Tensor:
        weights = torch.zeros(TARGET)
        for d in range(TARGET):
            weights[d] += (1 - weight[d]) * (lower[d] == source) + weight[d] * (upper[d] == source)
        return weights

    row, column, size, left, top = 2, 1, 0.34, 0.9, 2.95
    window = torch.outer(adjoint(row), adjoint(column))
    grid(axes, left, top, (TARGET, TARGET), size, PALE[1])
    for y, x in window.nonzero().tolist():
        value = window[y, x].item()
        cell(axes, left + x * size, top - (y + 1) * size, size, LEVELS[1], alpha=0.25 + value)
        axes.text(
            left + (x + 0.5) * size,
            top - (y + 0.5) * size,
            f"{value:.2f}".removeprefix("0"),
            ha="center",
            va="center",
            fontsize=6.5,
            color=INK,
        )
    neighbour = torch.outer(adjoint(row), adjoint(column + 1)).nonzero()
    (y0, x0), (y1, x1) = neighbour.amin(dim=0).tolist(), neighbour.amax(dim=0).tolist()
    axes.add_patch(
        Rectangle(
            (left + x0 * size, top - (y1 + 1) * size),
            (x1 - x0 + 1) * size,
            (y1 - y0 + 1) * size,
            fill=False,
            edgecolor=INK,
            linestyle=":",
            linewidth=1.4,
        )
    )
    caption(axes, left + 4 * size, top - 8 * size - 0.08, "level 1's slice of the gradient")
    axes.text(
        4.0,
        0.75,
        "numbers: weights of the\norange source pixel;\ndotted: the window of\nits right neighbour",
        fontsize=8.5,
        color=GREY,
        va="center",
    )
    arrow(axes, 4.2, 8.2, 1.9, "weighted sum along y, then x,\nin a fixed order; divide by std")
    grid(axes, 8.6, 2.6, (4, 4), 0.34 * 1.3, PALE[1], {(row, column): LEVELS[1]})
    caption(axes, 8.6 + 2 * 0.34 * 1.3, 0.72, "gradient of level 1")
    axes.text(
        11.2,
        1.75,
        "One thread owns a source pixel and\nwrites it once. Nothing is scattered, so\n"
        "there are no atomics, and the bits do\nnot depend on the number of threads.",
        fontsize=9.5,
        va="center",
        color=INK,
    )


def main() -> None:
    figure, panels = plt.subplots(3, 1, figsize=(11.5, 9.6), layout="constrained")
    for axes, draw in zip(
        panels, (forward_contiguous, forward_channels_last, backward), strict=True
    ):
        draw(axes)
    figure.savefig(PICTURE, dpi=110, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
