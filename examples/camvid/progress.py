"""What a run shows while it works: loss, mIoU, images a second, time left."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Meter"]


class Meter:
    """A bar over all epochs where there is a terminal, and a line for each that ends.

    Args:
        console: where to.
        epochs: of the whole run.
        done: epochs that are finished.
        miou: of the last of them.
    """

    def __init__(self, console: Console, epochs: int, done: int, miou: float | None) -> None:
        self.console = console
        self.epochs = epochs
        self.done = done
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  mIoU {task.fields[miou]}"),
            TextColumn("{task.fields[rate]} images/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        shown = "–" if miou is None else _percent(miou)
        self._task: TaskID = self._bar.add_task(
            "", total=None, epoch=f"{done + 1}/{epochs}", loss="–", miou=shown, rate="–"
        )

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, loss: float, rate: float, steps: int) -> None:
        """Of an epoch's steps one more is done."""
        if self._bar.tasks[0].total is None:  # known only now
            self._bar.update(self._task, total=(self.epochs - self.done) * steps)
        self._bar.update(self._task, advance=1, loss=f"{loss:.3f}", rate=f"{rate:.1f}")

    def epoch(self, entry: dict[str, Any]) -> None:
        """An epoch is done, and on the disk."""
        self.done = entry["epoch"]
        self.console.print(
            f"epoch {self.done}/{self.epochs}: loss {entry['loss']:.3f}, "
            f"mIoU {_percent(entry['miou'])}, {entry['images_per_second']:.1f} images/s",
            highlight=False,
        )
        following = min(self.done + 1, self.epochs)
        self._bar.update(
            self._task, epoch=f"{following}/{self.epochs}", miou=_percent(entry["miou"])
        )


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
