"""Checkpoints that a crash at any moment leaves whole: weights first, then one line that counts.

The tensors of epoch 3 go to ``epoch-0003.safetensors``, and only when that file is on the disk
does ``checkpoint.json`` name it, by a rename. What a crash leaves behind is not named, and goes
with the next checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.camvid.config import differences
from fastfuse.models import load_checkpoint
from fastfuse.models.checkpoint import state_dict_of

__all__ = ["INDEX", "State", "load_state", "restore", "save_state"]

INDEX = "checkpoint.json"
_FORMAT = "fastfuse camvid checkpoint"
_MODEL, _OPTIMIZER = "model.", "optimizer."


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
    for path in (*folder.glob("epoch-*.safetensors"), *folder.glob("*.partial")):
        if path.name != state.weights:
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
    if (version := document.pop("version")) != 1:
        raise ValueError(f"camvid: {path} must be of version 1; got {version}")
    state = State(**document)
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
    tensors = state_dict_of(folder / state.weights)
    load_checkpoint(model, tensors, prefix=_MODEL)
    if optimizer is None:
        return
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
            found.setdefault(int(index), {})[key] = tensor
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
