"""Checkpoints that a crash at any moment leaves whole: weights first, then one line that counts.

The tensors of epoch 3 go to ``epoch-0003.safetensors``, and only when that file is on the disk
does ``checkpoint.json`` name it, by a rename. What a crash leaves behind is not named, and goes
with the next checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.camvid.config import differences
from fastfuse.models import load_checkpoint
from fastfuse.models.checkpoint import state_dict_of

__all__ = ["INDEX", "State", "claimed", "load_state", "restore", "save_state"]

INDEX = "checkpoint.json"
_FORMAT = "fastfuse camvid checkpoint"
_MODEL, _OPTIMIZER = "model.", "optimizer."
_OWN = re.compile(r"epoch-\d{4,}\.safetensors(\.partial)?|checkpoint\.json\.partial")
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's


@dataclass
class State:
    """What a run has reached.

    Attributes:
        identity: the configuration and whatever else decides about the weights.
        epoch: epochs finished.
        history: an entry for each of them.
        gradients: by branch of every fusion, the RMS of its weights' gradient, step by step.
        test: the scores on the test images, when all is done.
        weights: the file of tensors.
    """

    identity: dict[str, Any]
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    gradients: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, Any] | None = None
    weights: str = ""

    def check(self) -> None:
        """Of what a file says; a TypeError names what is not as it was written."""
        kinds = {"identity": dict, "epoch": int, "history": list, "gradients": dict, "weights": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be of type {kind.__name__}")
        if not self.weights:
            raise TypeError("weights must be a name")
        if not self.epoch == len(self.history) > 0:
            raise TypeError("history must have an entry for each epoch")
        for entry in (*self.history, *([] if self.test is None else [self.test])):
            if missing := {"miou", "iou", "accuracy", "pixels"} - entry.keys():
                raise TypeError(f"an entry must have {min(missing)}")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Of one run at a time; the system gives it back whatever ends the process.

    Raises:
        OSError: the folder cannot be made.
        ValueError: another run has it.
    """
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"camvid: --out must be of one run; another one is in {folder}"
            ) from error
        yield
    finally:
        os.close(descriptor)


def save_state(
    folder: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint; until it is whole, the one before it stands.

    The weights alone load by ``fastfuse.models.load_checkpoint(model, file, prefix="model.")``.

    Raises:
        OSError: what could not be written, with its name; the folder is as it was.
    """
    from safetensors.torch import save

    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"{_OPTIMIZER}{index}.{key}"] = value
    data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    state.weights = f"epoch-{state.epoch:04}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / state.weights, data)
    write_index(folder, state)


def write_index(folder: Path, state: State) -> None:
    """The line that counts; files that it does not name go."""
    document = {"format": _FORMAT, "version": 1, **vars(state)}
    _write(folder / INDEX, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    for path in folder.iterdir():
        if path.name != state.weights and _OWN.fullmatch(path.name):
            path.unlink(missing_ok=True)


def load_state(folder: Path, identity: dict[str, Any] | None = None) -> State | None:
    """What is there, without its tensors; None if nothing is.

    Raises:
        ValueError: a file that is no such checkpoint, or is of another configuration than
            ``identity``: all differences are listed.
    """
    path = folder / INDEX
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"camvid: {path} is damaged: {error}") from error
    if not isinstance(document, dict) or document.pop("format", None) != _FORMAT:
        raise ValueError(f"camvid: {path} is no checkpoint of this program")
    if (version := document.pop("version", None)) != 1:
        raise ValueError(f"camvid: {path} must be of version 1; got {version}")
    try:
        state = State(**document)
        state.check()
    except (AttributeError, TypeError) as error:
        raise ValueError(f"camvid: {path} is damaged: {error}") from error
    if identity is not None and (different := differences(state.identity, identity)):
        raise ValueError(
            f"camvid: {path} is of another configuration ({'; '.join(different)}); give another "
            "--out, or the options of that run"
        )
    return state


def restore(
    folder: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Reads the tensors of a checkpoint.

    Raises:
        OSError, ValueError, RuntimeError: a file that is missing, damaged or does not fit.
    """
    path = folder / state.weights
    tensors = state_dict_of(path)
    try:
        load_checkpoint(model, tensors, prefix=_MODEL)
    except RuntimeError as error:
        raise ValueError(f"camvid: {path} does not fit the model: {error}") from error
    if optimizer is None:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {
        f"{_OPTIMIZER}{i}.{key}": () if key == "step" else tuple(p.shape)
        for i, p in enumerate(parameters)
        for key in _MOMENTS
    }
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(_OPTIMIZER)}
    if wrong := sorted(n for n in expected | shapes if expected.get(n) != shapes.get(n)):
        raise ValueError(
            f"camvid: {path} must have the optimizer's tensors; {len(wrong)} are missing, of "
            f"another shape or of no parameter, first {wrong[0]}"
        )
    found: dict[int, dict[str, Tensor]] = {}
    for name in expected:
        index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
        found.setdefault(int(index), {})[key] = tensors[name]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def _write(path: Path, data: bytes) -> None:
    """A file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with _named(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with _named(path):
            partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # a rename is on the disk when its folder is
        descriptor = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing say which file, which those of a full disk do not."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"camvid: cannot write {path}: {error.strerror}; nothing earlier is lost"
        ) from error
