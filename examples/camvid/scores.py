"""Intersection over union of a split, over any number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from examples.camvid.data import Split, normalized
from examples.camvid.pipeline import predict
from examples.camvid.processes import Processes
from fastfuse.models import Segmentor

__all__ = ["Scores", "confusion", "evaluate", "scores_table"]


@dataclass(frozen=True)
class Scores:
    """Of a data set; fractions, nan for classes that neither occur nor are predicted.

    >>> Scores.of(torch.tensor([[3, 1], [0, 4]])).iou
    (0.75, 0.8)
    """

    iou: tuple[float, ...]
    accuracy: float
    pixels: int

    @property
    def miou(self) -> float:
        """The mean over classes that occur or are predicted."""
        found = [value for value in self.iou if not math.isnan(value)]
        return sum(found) / len(found) if found else math.nan

    def entry(self) -> dict[str, Any]:
        """For a history, in JSON, which has no nan."""
        iou = [None if math.isnan(value) else value for value in self.iou]
        return {"miou": self.miou, "iou": iou, "accuracy": self.accuracy, "pixels": self.pixels}

    @classmethod
    def of_entry(cls, entry: dict[str, Any]) -> Scores:
        iou = tuple(math.nan if value is None else value for value in entry["iou"])
        return cls(iou, entry["accuracy"], entry["pixels"])

    @classmethod
    def of(cls, counts: Tensor) -> Scores:
        """Of the numbers of pixels by class (rows) and prediction."""
        counts = counts.double().cpu()
        right = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - right
        total = counts.sum()
        return cls(tuple((right / union).tolist()), float(right.sum() / total), int(total))


def confusion(labels: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Numbers of pixels by class and prediction, (classes, classes) int64; void does not count."""
    counted = targets < classes
    pairs = targets[counted] * classes + labels[counted]
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def evaluate(
    model: Segmentor,
    split: Split,
    pipeline: str,
    batch: int,
    device: torch.device,
    processes: Processes,
) -> Scores:
    """Every process takes its share of the images; all get the scores of the whole."""
    counts = torch.zeros(split.classes, split.classes, dtype=torch.int64, device=device)
    mine = range(processes.rank, len(split), processes.world)
    for start in range(0, len(mine), batch):
        images, targets = zip(*map(split.read, mine[start : start + batch]), strict=True)
        labels = predict(model, pipeline, normalized(torch.stack(images)).to(device))
        counts += confusion(labels, torch.stack(targets).to(device), split.classes)
    return Scores.of(processes.sum(counts))


def scores_table(classes: tuple[str, ...], scores: Scores) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class")
    table.add_column("IoU, %", justify="right")
    for name, value in zip(classes, scores.iou, strict=True):
        table.add_row(escape(name), "–" if math.isnan(value) else f"{100 * value:.1f}")
    table.add_section()
    table.add_row("[bold]mean[/]", f"[bold]{100 * scores.miou:.2f}[/]")
    table.add_row("pixels right", f"{100 * scores.accuracy:.1f}")
    return table
