"""PNGs: curves of runs, the gradients' scale by branch, images with their labels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.camvid.checkpoint import State
from examples.camvid.data import CAMVID, DataSet, normalized
from examples.camvid.pipeline import predict, running
from fastfuse.models import Segmentor

__all__ = ["curves", "gradient_curves", "predictions"]

_CAMVID_COLOURS = (  # of the data set's own pictures
    *("#808080", "#800000", "#c0c080", "#804080", "#0000c0", "#808000"),
    *("#c08080", "#404080", "#400080", "#404000", "#0080c0"),
)
_VOID = "#000000"
_DPI = 110


def curves(runs: Mapping[str, Sequence[State]], path: Path) -> None:
    """Loss and mIoU by epoch; of several runs under one name a thin line each, and their mean.

    Args:
        runs: by name.
        path: of the PNG.
    """
    figure = _figure(10, 3.8)
    axes = figure.subplots(1, 2)
    for number, (name, states) in enumerate(runs.items()):
        for ax, key, factor in zip(axes, ("loss", "miou"), (1, 100), strict=True):
            lines = [[factor * entry[key] for entry in s.history] for s in states]
            _mean_line(ax, lines, f"C{number}", _literal(name), first=1)
    for ax, label in zip(axes, ("loss, training", "mIoU, validation, %"), strict=True):
        ax.set(xlabel="epoch", ylabel=label)
        _plain_axes(ax)
    axes[1].legend(frameon=False)
    figure.savefig(path)


def gradient_curves(
    variants: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], path: Path
) -> None:
    """RMS of the gradient of every branch's weights over the first steps: a row for each fusion, a
    column for each variant, the mean over its runs.

    Args:
        variants: by name, for each run the values by "fusion:level".
        path: of the PNG.
    """
    branches = [key.rpartition(":") for key in next(iter(variants.values()))[0]]
    fusions = list(dict.fromkeys(fusion for fusion, _, _ in branches))
    figure = _figure(5 * len(variants), 3.2 * len(fusions))
    grid = figure.subplots(len(fusions), len(variants), squeeze=False, sharey="row", sharex=True)
    for row, fusion in zip(grid, fusions, strict=True):
        for ax, (variant, runs) in zip(row, variants.items(), strict=True):
            for number, level in enumerate(level for f, _, level in branches if f == fusion):
                lines = [list(run[f"{fusion}:{level}"]) for run in runs]
                _mean_line(ax, lines, f"C{number}", f"level {level}", first=1, thin=False)
            ax.set_yscale("log")
            ax.set_title(f"{fusion.removeprefix('decode_head.')}, equalizers: {variant}", size=10)
            _plain_axes(ax)
        row[0].set_ylabel("gradient scale")
        row[-1].legend(frameon=False, fontsize=8)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    figure.savefig(path)


def predictions(
    model: Segmentor, pipeline: str, data: DataSet, split: str, path: Path, count: int = 4
) -> None:
    """Images, their labels and what the model makes of them, spread over a split.

    Args:
        model: on any device.
        pipeline: as in the configuration.
        data: of the classes and images.
        split: such as "val".
        path: of the PNG.
        count: of images, at most.
    """
    images = data.splits[split]
    count = min(count, len(images))
    device = next(model.parameters()).device
    height, width = images.size
    figure = _figure(10.5, 0.8 + 3.3 * height / width * count)
    grid = figure.subplots(count, 3, squeeze=False)
    for ax in grid.flat:  # some stay empty
        ax.set_axis_off()
    for row, index in zip(grid, range(0, len(images), -(-len(images) // count)), strict=False):
        image, truth = images.read(index)
        with running(pipeline):
            found = predict(model, pipeline, normalized(image)[None].to(device))[0].cpu()
        colours = _colours(data)
        shown = (image.permute(1, 2, 0), colours[truth], colours[found])
        for ax, pixels in zip(row, shown, strict=True):
            ax.imshow(pixels.numpy(), interpolation="nearest")
    for ax, title in zip(grid[0], ("image", "truth", "prediction"), strict=True):
        ax.set_title(title)
    _legend(figure, data)
    figure.savefig(path)


def _colours(data: DataSet) -> Tensor:
    """(classes + 1, 3) uint8, void last."""
    from matplotlib.colors import to_rgb

    return torch.tensor([to_rgb(c) for c in _names(data)]).mul(255).round().to(torch.uint8)


def _names(data: DataSet) -> list[str]:
    """A colour for each class, and void's."""
    if data.classes == CAMVID:
        return [*_CAMVID_COLOURS, _VOID]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours = colormaps["tab20"].resampled(data.void)
    return [*(to_hex(colours(i)) for i in range(data.void)), _VOID]


def _legend(figure: Any, data: DataSet) -> None:
    from matplotlib.patches import Patch

    labels = [_literal(name) for name in (*data.classes, "void")]
    handles = [Patch(color=c, label=n) for c, n in zip(_names(data), labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)


def _literal(name: str) -> str:
    """As matplotlib shows it, without mathematics; a name that begins with _ has no legend."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "camvid: pictures need matplotlib; pip install 'fastfuse[examples]'"
        ) from error
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _mean_line(
    ax: Any, lines: list[list[float]], colour: str, name: str, *, first: int, thin: bool = True
) -> None:
    shortest = min(map(len, lines))
    mean = [statistics.fmean(values) for values in zip(*(x[:shortest] for x in lines), strict=True)]
    for line in lines if thin and len(lines) > 1 else ():
        ax.plot(range(first, first + len(line)), line, color=colour, linewidth=0.7, alpha=0.5)
    marker = "o" if len(mean) < 2 else None
    ax.plot(range(first, first + shortest), mean, color=colour, label=name, marker=marker)


def _plain_axes(ax: Any) -> None:
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(color="#e4e4e4", linewidth=0.7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
