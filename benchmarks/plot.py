"""Draws a report: speedups over each rival, shares of the roof, and time per work as maps grow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

__all__ = ["draw"]

COLORS = {"fresh": "#1f5fa8", "huge pages": "#6fa8dc", "warm": "#e69138"}
OTHER_COLOR = "#888888"
PANEL_WIDTH, ROW_HEIGHT, PANEL_MARGIN = 6.2, 0.26, 1.1  # inches
GROWTH_HEIGHT = 3.6
MOST_BYTES, COLOR_COUNT, RESOLUTIONS = 180_000, 32, (110, 90, 75, 60, 50)
MIN_BARS = 3  # of a panel: fewer leave room

Cell = dict[str, Any]


def draw(report: dict[str, Any], path: Path) -> bool:
    """One row of panels per op, shape and mode: a panel per dtype, then shares of the roof."""
    cells = [c for c in report["cells"] if c["series"] == "main"]
    growth = [c for c in report["cells"] if c["series"] == "growth"]
    if not cells:
        return False
    rows = list(dict.fromkeys((c["op"], c["shape"], c["mode"]) for c in cells))
    dtypes = list(dict.fromkeys(c["dtype"] for c in cells))
    regimes = list(dict.fromkeys(c["regime"] for c in cells))
    of = {row: [c for c in cells if (c["op"], c["shape"], c["mode"]) == row] for row in rows}
    regimes_of = {row: list(dict.fromkeys(c["regime"] for c in of[row])) for row in rows}
    bars = [max(len(_rivals(of[row])), MIN_BARS) * max(len(regimes_of[row]), 2) for row in rows]
    growing = list(dict.fromkeys(c["op"] for c in growth))
    heights = [n * ROW_HEIGHT + PANEL_MARGIN for n in bars] + [GROWTH_HEIGHT] * len(growing)
    about = report["environment"]

    figure, axes = plt.subplots(
        len(heights),
        len(dtypes) + 1,
        figsize=(PANEL_WIDTH * (len(dtypes) + 0.8), sum(heights) + 1.2),
        gridspec_kw={"height_ratios": heights, "width_ratios": [1] * len(dtypes) + [0.8]},
        squeeze=False,
        layout="constrained",
    )
    for row, line in zip(rows, axes, strict=False):
        op, shape, mode = row
        for dtype, axis in zip(dtypes, line, strict=False):
            here = [c for c in of[row] if c["dtype"] == dtype]
            if not here:
                axis.set_visible(False)
                continue
            _speedups(axis, here, _rivals(of[row]), regimes_of[row])
            axis.set_title(f"{op}\n{shape}, {mode}, {dtype}", fontsize=10, loc="left")
        _shares(line[-1], of[row], regimes_of[row], about["gemm_gflops"])
    for op, line in zip(growing, axes[len(rows) :], strict=True):
        _growth(line, [c for c in growth if c["op"] == op], regimes)
    copies = f"copy rate ({about['copy_gbs']:.0f} GB/s) or " if about["copy_gbs"] else ""
    figure.suptitle(
        f"Speedup of fastfuse over each rival, and the share of the {copies}GEMM rate that it "
        f"reaches\n"
        f"{about['name']}, {about['threads']} threads, "
        f"torch {about['versions']['torch']}, {about['date'][:10]}",
        fontsize=12,
    )
    if len(regimes) > 1:
        handles = [plt.Rectangle((0, 0), 1, 1, color=_color(regime)) for regime in regimes]
        labels = [f"memory: {regime}" for regime in regimes]
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)
    plt.close(figure)
    return True


def _save(figure: Figure, path: Path) -> None:
    """In a palette, and at the best resolution that makes MOST_BYTES at most."""
    for dpi in RESOLUTIONS:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=dpi)
        Image.open(drawn).convert("RGB").quantize(COLOR_COUNT).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            return


def _color(regime: str) -> str:
    return COLORS.get(regime, OTHER_COLOR)


def _rivals(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(v["title"] for c in cells for v in c["variants"] if v["rival"]))


def _bars(
    axis: Axes,
    labels: list[str],
    values: dict[tuple[str, str], float],
    regimes: list[str],
    text: str,
) -> None:
    """Horizontal bars: a group per label, in it a bar per regime; ``values[label, regime]``."""
    thickness = 0.8 / len(regimes)
    for i, label in enumerate(labels):
        present = [regime for regime in regimes if (label, regime) in values]
        for j, regime in enumerate(present):
            y = i + (j - (len(present) - 1) / 2) * thickness
            value = values[label, regime]
            axis.barh(y, value, height=thickness * 0.92, color=_color(regime))
            axis.annotate(
                text.format(value),
                (value, y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.set_ylim(max(len(labels), MIN_BARS) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)
    axis.margins(x=0.14)


def _speedups(axis: Axes, cells: list[Cell], rivals: list[str], regimes: list[str]) -> None:
    values = {
        (v["title"], c["regime"]): v["speedup"] for c in cells for v in c["variants"] if v["rival"]
    }
    _bars(
        axis,
        [r for r in rivals if any(r == title for title, _ in values)],
        values,
        regimes,
        "{:.1f}x",
    )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("median of the rival / median of the fastest fastfuse (1: as fast)", fontsize=8)


def _shares(axis: Axes, cells: list[Cell], regimes: list[str], rates: dict[str, float]) -> None:
    """Of the GEMM rate where FLOPs are counted, else of the copy rate."""
    values = {}
    for c in cells:
        for v in c["variants"]:
            share = v["gflops"] / rates[c["dtype"]] if v["gflops"] else v["share"]
            if not v["rival"] and share is not None:
                way = v["name"].removeprefix("fastfuse").removeprefix(", ")
                label = "\n".join(filter(None, (c["dtype"], way, v["layout"])))
                values[label, c["regime"]] = 100 * share
    labels = list(dict.fromkeys(label for label, _ in values))
    _bars(axis, labels, values, regimes, "{:.0f} %")
    axis.axvline(100, color="black", linewidth=1)
    if any(v["gflops"] for c in cells for v in c["variants"]):
        axis.set_title("fastfuse: share of the GEMM rate", fontsize=10, loc="left")
        axis.set_xlabel("FLOPs done / median / rate of a large product, in %", fontsize=8)
    else:
        axis.set_title("fastfuse: share of the copy rate", fontsize=10, loc="left")
        axis.set_xlabel("bytes that must move / median / copy rate, in %", fontsize=8)


def _growth(axes: Any, cells: list[Cell], regimes: list[str]) -> None:
    """Flat lines: the time grows as the bytes, or the products done, do."""
    compute = any(c.get("flops") for c in cells)
    modes = list(dict.fromkeys(c["mode"] for c in cells))
    for axis, mode in zip(axes, modes, strict=False):
        for regime in regimes:
            here = [c for c in cells if c["mode"] == mode and c["regime"] == regime]
            points = []
            for c in here:
                ours = next(v for v in c["variants"] if v["title"] == c["ours"])
                work = c["flops"] / 2e9 if compute else c["bytes"] / 1e6
                points.append((work, ours["median_ms"] / work * (1 if compute else 1e3)))
            if points:
                axis.plot(*zip(*sorted(points), strict=True), "o-", color=_color(regime))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_ylim(bottom=0)
        what = "multiply-add" if compute else "byte"
        axis.set_title(f"{cells[0]['op']}\ntime per {what}, {mode}", fontsize=10, loc="left")
        axis.set_xlabel("GMAC done" if compute else "MB that must move", fontsize=8)
        axis.set_ylabel("ms per GMAC" if compute else "ps per byte", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(modes) :]:
        axis.set_visible(False)
