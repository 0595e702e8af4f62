"""Small runs of examples.camvid for its tests, here and in processes that can be killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.camvid.checkpoint import State, load_state
from examples.camvid.config import Config
from examples.camvid.data import open_data
from examples.camvid.training import train

SIZE = (64, 64)
COUNTS = {"train": 9, "val": 3, "test": 3}
THREADS = 2


def config(**changes: Any) -> Config:
    """Three epochs of four steps."""
    small: dict[str, Any] = {"backbone": "cednet-nano", "channels": 8, "epochs": 3, "batch": 2}
    return Config(**{**small, "size": SIZE, "crop": (32, 32), **changes})


def options(**changes: Any) -> list[str]:
    """The same on the command line."""
    given = {"backbone": "cednet-nano", "channels": 8, "epochs": 3, "batch": 2}
    sizes = ["--size", *map(str, SIZE), "--crop", "32", "32"]
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**given, **changes}.items()]
    return [*flags, *sizes]


class Interrupting(Console):
    """Presses Ctrl-C when an epoch is reported done."""

    def __init__(self, epoch: int) -> None:
        super().__init__(quiet=True)
        self.line = f"epoch {epoch}/"

    def print(self, *args: Any, **kwargs: Any) -> None:
        if str(args[0]).startswith(self.line):
            raise KeyboardInterrupt


def finish(folder: Path, out: Path, run: Config, console: Console | None = None) -> State:
    torch.set_num_threads(THREADS)
    return train(run, open_data(folder, run.size), out, console=console)[1]


def finish_killed_by(fsync: int, folder: Path, out: Path, run: Config) -> None:
    """Dies as by a power cut, before what the given call of fsync was to put on the disk."""
    real, calls = os.fsync, iter(range(1, 10**9))

    def counting(descriptor: int) -> None:
        if next(calls) == fsync:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = counting
    finish(folder, out, run)


def weights(out: Path) -> bytes:
    """The tensors of the last checkpoint, of model and optimizer, as they are on the disk."""
    state = load_state(out)
    assert state is not None
    return (out / state.weights).read_bytes()
