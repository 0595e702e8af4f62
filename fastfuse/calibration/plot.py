"""The picture of a report: one row per fusion, a group of bars per branch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastfuse.calibration.branch_report import BranchReport

__all__ = ["check_plot_path", "plot"]

_SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = {"before": "#e07b39", "after": "#2f6f9f"}
_LABELS = {"before": "before: no equalizer", "after": "after: equalized"}
_QUANTITIES = {  # its title, the value of an equalized branch
    "mean": ("mean", 0.0),
    "variance": ("variance", 1.0),
    "gradient": ("gradient scale of its weights", 1.0),
}


def check_plot_path(path: Path) -> None:
    """Raises ValueError for a suffix that is not a picture's, ImportError without matplotlib."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"report: output must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; "
            f"got {str(path)!r}"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "report: the plot needs matplotlib; pip install 'fastfuse[calibrate]'"
        ) from error


def plot(branches: list[BranchReport], path: Path) -> None:
    check_plot_path(path)
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(branch.fusion for branch in branches))
    rows = [[b for b in branches if b.fusion == name] for name in names]
    widest = max(map(len, rows))
    figure = Figure(
        figsize=(max(11.0, 3 * (1.0 + 0.95 * widest)), 1.1 + 2.9 * len(rows)),
        layout="constrained",
        dpi=130,
    )
    figure.suptitle(
        "Scale of the branches before and after equalization", fontsize=14, weight="bold"
    )
    grid = figure.subplots(len(rows), len(_QUANTITIES), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for ax, quantity in zip(axes, _QUANTITIES, strict=True):
            _bars(ax, row, quantity, widest)
        axes[0].set_ylabel(row[0].fusion or "model", fontsize=10, weight="bold")
    for ax, (title, _) in zip(grid[0], _QUANTITIES.values(), strict=True):
        ax.set_title(title, fontsize=11)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def _bars(ax: Any, row: list[BranchReport], quantity: str, widest: int) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    values = {when: [getattr(getattr(b, when), quantity) for b in row] for when in _COLOURS}
    everything = [v for when in values.values() for v in when]
    target = _QUANTITIES[quantity][1]
    logarithmic = quantity != "mean" and min(everything) > 0
    if logarithmic:
        ax.set_yscale("log")
        low, high = min([*everything, target]), max([*everything, target])
        span = math.log10(high / low)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if span > 2 else (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylim(low / 10 ** (0.15 + 0.1 * span), high * 10 ** (0.08 + 0.12 * span))
    else:
        low, high = min([*everything, 0.0]), max([*everything, target])
        margin = 0.14 * max(high - low, 1e-3)
        ax.set_ylim(low - margin if low < -1e-3 * high else -0.05 * margin, high + margin)
    for shift, (when, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
        places = [i + shift for i in range(len(row))]
        bars = ax.bar(places, values[when], 0.38, color=colour, label=_LABELS[when], zorder=2)
        texts = ax.bar_label(bars, [_short(v) for v in values[when]], fontsize=7.5, padding=1.5)
        for text in texts:  # readable across the dashed line
            text.set(zorder=5, path_effects=[withStroke(linewidth=2.5, foreground="white")])
    label = "all equal: mean 0, variance 1, gradient scale 1"
    ax.axhline(target, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), label=label, zorder=3)
    labels = [f"level {b.level}\n{b.channels} ch, {b.ratio.replace('x', '×')}" for b in row]
    ax.set_xticks(range(len(row)), labels, fontsize=8)
    middle = (len(row) - 1) / 2
    ax.set_xlim(middle - widest / 2 - 0.1, middle + widest / 2 + 0.1)  # bars of one width
    ax.tick_params(axis="y", labelsize=8)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.7, zorder=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _short(value: float) -> str:
    if abs(value) < 5e-4:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"
    return f"{value:.2f}" if abs(value) >= 0.095 else f"{value:.2g}"
