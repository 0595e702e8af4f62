"""Draws docs/fusion_conv2d.png.

python docs/figures/fusion_conv2d.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from fastfuse.ops.bilinear import axis_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "fusion_conv2d.png"

LEVELS, PALE = ("#1b6ca8", "#d1742f"), ("#cfe1ef", "#f6dfcc")  # r = 1, 2
RESULT, PALE_RESULT = "#5b5b5b", "#e3e3e3"
INK, GREY = "#222222", "#8a8a8a"
PIXEL = 0.25
FULL, HALF = 8, 4  # pixels along an axis of the target and of level 1

PIXEL_Y, PIXEL_X = 4, 3  # of the result, from below and from the left
WINDOW = (range(PIXEL_Y - 1, PIXEL_Y + 2), range(PIXEL_X - 1, PIXEL_X + 2))

# Below: a row of level 1 and the kernel's weights for it.
ROW = torch.tensor([4.0, 8.0, 12.0, 4.0], dtype=torch.float64)
KERNEL = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def image(
    axes: Axes,
    left: float,
    bottom: float,
    pixels: int,
    color: str,
    strong: str = "",
    window: tuple[range, range] = (range(0), range(0)),
) -> None:
    """A square grid; the pixels of ``window`` (rows and columns, from below) are strong."""
    for row in range(pixels):
        for column in range(pixels):
            inside = row in window[0] and column in window[1]
            fill = strong if inside else color
            corner = (left + column * PIXEL, bottom + row * PIXEL)
            style = {"facecolor": fill, "edgecolor": "white", "linewidth": 0.9}
            axes.add_patch(Rectangle(corner, PIXEL, PIXEL, **style))


def frame(axes: Axes, left: float, bottom: float, side: float, dashed: bool = False) -> None:
    style = {"edgecolor": GREY, "linestyle": (0, (4, 3))} if dashed else {"edgecolor": INK}
    axes.add_patch(Rectangle((left, bottom), side, side, fill=False, linewidth=0.9, **style))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12)
    axes.text(*middle, text, ha="center", va="bottom", fontsize=9, color=INK)


def caption(axes: Axes, x: float, y: float, text: str, color: str = INK) -> None:
    axes.text(x, y, text, ha="center", va="top", fontsize=9, color=color)


def panel(axes: Axes, title: str, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)


def sources(target: range) -> range:
    """The pixels of level 1 that these target positions are interpolated from."""
    lower, upper, _ = axis_table(HALF, FULL, align_corners=False)
    return range(int(lower[target[0]]), int(upper[target[-1]]) + 1)


def levels(axes: Axes) -> None:
    image(axes, 0.1, 3.7, FULL, PALE[0], LEVELS[0], WINDOW)
    caption(axes, 1.1, 3.6, "level 0: 8 × 8")
    image(axes, 0.6, 1.35, HALF, PALE[1], LEVELS[1], (sources(WINDOW[0]), sources(WINDOW[1])))
    caption(axes, 1.1, 1.25, "level 1: 4 × 4")


def result(axes: Axes, left: float, bottom: float) -> None:
    pixel = (range(PIXEL_Y, PIXEL_Y + 1), range(PIXEL_X, PIXEL_X + 1))
    image(axes, left, bottom, FULL, PALE_RESULT, RESULT, pixel)
    frame(axes, left, bottom, FULL * PIXEL)
    caption(axes, left + 1, bottom - 0.1, "the result")


def as_written(axes: Axes) -> None:
    panel(axes, "As written: upsample, concatenate, convolve", 10.4, 6.0)
    levels(axes)
    arrow(axes, (2.35, 4.7), (3.75, 4.25), "copy")
    arrow(axes, (1.8, 1.85), (3.75, 2.75), "")
    axes.text(2.7, 2.5, "upsample", ha="right", va="bottom", fontsize=9, color=INK)

    for left, bottom, level in ((4.85, 3.05, 1), (4.0, 2.3, 0)):
        image(axes, left, bottom, FULL, PALE[level], LEVELS[level], WINDOW)
        frame(axes, left, bottom, FULL * PIXEL, dashed=True)
    caption(axes, 5.4, 2.15, "the concatenation,\nwhich fastfuse never builds")
    arrow(axes, (6.95, 3.65), (8.1, 3.65), "3 × 3")
    result(axes, 8.25, 2.65)
    caption(axes, 9.25, 2.05, "dark: one pixel, and\nwhat it is made of", GREY)
    axes.text(
        0.1,
        0.02,
        "products per pair of channels:   9 · 64 (level 0) + 9 · 64 (level 1) = 1152",
        fontsize=9,
        color=GREY,
        va="bottom",
    )


def convolve_first(axes: Axes) -> None:
    panel(axes, "The same: convolve first, upsample after", 11.6, 6.0)
    levels(axes)
    arrow(axes, (2.35, 4.85), (9.1, 4.85), "")
    axes.text(5.5, 4.97, "3 × 3 convolution", ha="center", va="bottom", fontsize=9, color=INK)

    arrow(axes, (1.8, 1.85), (3.55, 1.85), "9 products,\nat 4 × 4")
    for ky in range(3):
        for kx in range(3):
            left, bottom = 3.75 + kx * 1.13, 0.95 + (2 - ky) * 1.13
            y, x = PIXEL_Y + 1 - ky, PIXEL_X - 1 + kx  # where the tap is read for the pixel
            read = (sources(range(y, y + 1)), sources(range(x, x + 1)))
            image(axes, left, bottom, HALF, PALE[1], LEVELS[1], read)
    caption(axes, 5.38, 0.85, "taps: one map per position of the kernel")
    arrow(axes, (7.25, 2.6), (9.1, 3.5), "")
    axes.text(8.3, 2.85, "upsample,\nshift, add", ha="left", va="top", fontsize=9, color=INK)
    result(axes, 9.3, 3.2)
    axes.text(
        0.1,
        0.02,
        "products per pair of channels:   9 · 64 (level 0) + 9 · 16 (level 1) = 720",
        fontsize=9,
        color=GREY,
        va="bottom",
    )


def upsampled(row: Tensor) -> Tensor:
    lower, upper, weight = axis_table(len(row), FULL, align_corners=False)
    return (1 - weight) * row[lower] + weight * row[upper]


def number(axes: Axes, x: float, y: float, width: float, text: str, color: str, ink: str) -> None:
    style = {"facecolor": color, "edgecolor": "white", "linewidth": 1.0}
    axes.add_patch(Rectangle((x, y), width, CELL, **style))
    axes.text(x + width / 2, y + CELL / 2, text, ha="center", va="center", fontsize=9, color=ink)


def empty(axes: Axes, x: float, y: float) -> None:
    style = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.0, "hatch": "//////"}
    axes.add_patch(Rectangle((x + 0.03, y + 0.03), CELL - 0.06, CELL - 0.06, **style))
    frame(axes, x + 0.03, y + 0.03, CELL - 0.06, dashed=True)


CELL = 0.56


def along_a_row(axes: Axes) -> None:
    panel(axes, "Along one row: three taps, upsampled, shifted and added", 22.0, 5.6)
    shades = ("#f6dfcc", "#ecbd93", "#dd8f50")
    tops = (4.0, 3.1, 2.2)

    # The row and its products.
    caption(axes, 1.4, 3.1 + CELL + 0.75, "a row of level 1")
    for i, value in enumerate(ROW.tolist()):
        number(axes, 0.3 + i * CELL, 3.1, CELL, f"{value:.0f}", PALE[1], INK)
    caption(axes, 6.6, 5.45, "its taps  Y[k] = W[k] · x")
    for tap, (top, shade) in enumerate(zip(tops, shades, strict=True)):
        arrow(axes, (2.7, 3.1 + CELL / 2), (4.75, top + CELL / 2), "")
        weight = KERNEL[tap].item()
        middle = (3.1 + top) / 2 + CELL / 2
        style = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(3.75, middle, f"· {weight:.0f}", ha="center", va="center", fontsize=9, bbox=style)
        for i, value in enumerate((weight * ROW).tolist()):
            number(axes, 5.5 + i * CELL, top, CELL, f"{value:.0f}", shade, INK)
        axes.text(
            5.35, top + CELL / 2, f"{tap - 1:+d}".replace("+0", "0").replace("-", "−"),
            ha="right", va="center", fontsize=9, color=INK,
        )  # fmt: skip

    # Upsampled and shifted: under target position p stands what tap k reads at p + k.
    left = 11.6
    for p in range(FULL):
        axes.text(left + (p + 0.5) * CELL, 4.72, f"{p}", ha="center", fontsize=8, color=GREY)
    axes.text(left - 0.75, 4.72, "p =", ha="right", fontsize=8, color=GREY)
    caption(axes, left + FULL * CELL / 2, 5.45, "upsampled; tap k read at p + k")
    total = torch.zeros(FULL, dtype=torch.float64)
    for tap, (top, shade) in enumerate(zip(tops, shades, strict=True)):
        arrow(axes, (8.0, top + CELL / 2), (left - 1.0, top + CELL / 2), "")
        row = upsampled(KERNEL[tap] * ROW)
        for u, value in enumerate(row.tolist()):
            p = u - (tap - 1)
            inside = 0 <= p < FULL
            total[p if inside else 0] += value if inside else 0.0
            x = left + p * CELL
            number(
                axes, x, top, CELL, f"{value:.0f}", shade if inside else "white",
                INK if inside else GREY,
            )  # fmt: skip
            if not inside:
                frame(axes, x + 0.03, top + 0.03, CELL - 0.06, dashed=True)
        for p in range(FULL):
            if not 0 <= p + tap - 1 < FULL:
                empty(axes, left + p * CELL, top)
    convolved = torch.nn.functional.conv1d(
        upsampled(ROW).view(1, 1, -1), KERNEL.view(1, 1, -1), padding=1
    )
    assert torch.equal(total, convolved.flatten())  # the identity, on this row

    # Their sum.
    bottom = 1.0
    axes.plot([left, left + FULL * CELL], [1.88, 1.88], color=INK, linewidth=1.2)
    axes.text(left - 0.75, bottom + CELL / 2, "sum", ha="right", va="center", fontsize=9, color=INK)
    for p, value in enumerate(total.tolist()):
        number(axes, left + p * CELL, bottom, CELL, f"{value:.0f}", PALE_RESULT, INK)
    caption(
        axes, left + FULL * CELL / 2, bottom - 0.15,
        "= the upsampled row 4 5 7 9 11 10 6 4,\nzero-padded and convolved with 1 2 3",
    )  # fmt: skip

    # The border.
    empty(axes, 17.3, 4.0)
    axes.text(
        18.05, 4.0 + CELL / 2,
        "p + k lies outside: the tap\nadds nothing, as zero padding",
        fontsize=9, va="center", color=INK,
    )  # fmt: skip
    frame(axes, 17.33, 2.93, CELL - 0.06, dashed=True)
    axes.text(18.05, 2.9 + CELL / 2, "no output there: dropped", fontsize=9, va="center", color=INK)
    axes.text(
        17.3,
        1.75,
        "The equalizer's mean is an offset per\n"
        "tap. It is added where the tap falls\n"
        "inside, and nowhere else: exact at\n"
        "the border too.",
        fontsize=9,
        va="center",
        color=INK,
    )


def main() -> None:
    assert upsampled(ROW).tolist() == [4, 5, 7, 9, 11, 10, 6, 4]
    figure = plt.figure(figsize=(12.6, 7.6), layout="constrained")
    spec = figure.add_gridspec(2, 2, width_ratios=(10.4, 11.6), height_ratios=(6.0, 5.6))
    as_written(figure.add_subplot(spec[0, 0]))
    convolve_first(figure.add_subplot(spec[0, 1]))
    along_a_row(figure.add_subplot(spec[1, :]))
    figure.savefig(PICTURE, dpi=110, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
