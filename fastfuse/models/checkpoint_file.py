"""What a checkpoint file holds, found out without running any of it."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch

__all__ = ["read_file"]

_PROTOCOL = 3  # the last that weights_only reads; torch.save writes 2
_LEGACY_PICKLES = 4  # magic number, protocol, system, object: the format before torch 1.6
_ALLOWING = Lock()  # what torch.load allows is the process's
_SHOWN = 16  # bytes at the start of what is no checkpoint


def read_file(path: Path) -> tuple[Any, bool]:
    """What a file holds, and whether stand-ins took the place of some of it.

    Read by ``torch.load`` with ``weights_only=True`` alone. Classes and functions that it refuses
    (numpy's arrays beside the weights, configurations, histories) are replaced by stand-ins that
    keep nothing, so that nothing is imported or called because a file says so. Other threads should
    not call ``torch.load(weights_only=True)`` meanwhile: what PyTorch allows it is the process's,
    so that they would get stand-ins where it refuses.

    Raises:
        OSError: the file cannot be opened.
        ValueError: no checkpoint, a damaged one, or one that cannot be read so.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    where = f"load_checkpoint: {path}"
    with path.open("rb") as file:
        start = file.read(_SHOWN)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _safetensors(path, where), False
    if fault := _fault(path, start):
        raise ValueError(f"{where} {fault}")
    refusal: Exception | None = None
    for stand_in in (None, _opaque, _mapping):
        try:
            return _load(path, stand_in), stand_in is not None
        except (pickle.UnpicklingError, TypeError) as error:
            refusal = refusal or error
        except Exception as error:  # of many kinds, where a file is damaged
            refusal = refusal if stand_in is _mapping else error
            break
    if (protocol := _protocol(path)) > _PROTOCOL:
        raise ValueError(
            f"{where} is pickled by protocol {protocol}, which torch.load does not read without "
            "running what it says. Save it again by torch.save(state, path) or, if you trust it, "
            "pass what it holds: torch.load(path, weights_only=False)"
        ) from refusal
    name = re.search(r"GLOBAL (\S+)", str(refusal))
    if isinstance(refusal, pickle.UnpicklingError) and name:
        raise ValueError(
            f"{where} holds {name[1]}, and cannot be read without running what it says. If you "
            "trust it, pass what it holds: torch.load(path, weights_only=False)"
        ) from refusal
    summary = f"{type(refusal).__name__}: {refusal}".splitlines()[0]
    raise ValueError(
        f"{where} is damaged, or pickled otherwise than by torch.save ({summary})"
    ) from refusal


def _load(path: Path, stand_in: Callable[[str], type] | None) -> Any:
    allowed = [(stand_in(name), name) for name in _names(path)] if stand_in else []
    with _ALLOWING, torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors(path: Path, where: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{where} needs safetensors; pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{where} is no safetensors file, or a damaged one: {error}") from error


def _fault(path: Path, start: bytes) -> str | None:
    """What can be seen to be wrong before loading."""
    if not start:
        return "is empty"
    if start.startswith(b"\x80"):  # a pickle
        return None
    if not start.startswith(b"PK"):
        return f"must be a file of torch.save or of safetensors; it starts with {start!r}"
    if not zipfile.is_zipfile(path):
        return "is truncated or damaged"
    with zipfile.ZipFile(path) as archive:
        records = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in records:
        return "is a TorchScript archive; pass torch.jit.load(path).state_dict()"
    return None if "data.pkl" in records else "is a zip archive that torch.save did not write"


# ---- stand-ins ----------------------------------------------------------------------------------


class _StandIn:
    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name} of a stand-in: fastfuse.models.load_checkpoint, which lets torch.load put it "
            f"in the place of {type(self).__name__}, ran at the same time"
        )


class _Mapping:
    """For subclasses of dict: weights_only adds items to dict and OrderedDict themselves alone."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def _opaque(name: str) -> type:
    return type(name, (_StandIn,), {})


def _mapping(name: str) -> type:
    return _opaque(name) if name.startswith("numpy.") else type(name, (_Mapping,), {})


def _names(path: Path) -> set[str]:
    """Every class and function that a checkpoint names, but those that the user has allowed."""
    allowed = {
        f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}"
        for f in torch.serialization.get_safe_globals()
    }
    found = set()
    for stream in _pickles(path):
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                module, name = str(argument).split(" ", 1)
                # Pickles of protocol 2 have names of Python 2, of which torch.load knows some.
                renamed = (IMPORT_MAPPING.get(module, module), name)
                renamed = NAME_MAPPING.get((module, name), renamed)
                found |= {f"{module}.{name}", ".".join(renamed)}
    return found - allowed


def _protocol(path: Path) -> int:
    """0 where a file does not say."""
    for stream in _pickles(path):
        start = stream.read(2)
        return start[1] if start[:1] == b"\x80" and start[1:] else 0
    return 0


def _pickles(path: Path) -> Iterator[BinaryIO]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.namelist():
                if record.rpartition("/")[2] == "data.pkl":
                    yield io.BytesIO(archive.read(record))
    else:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                yield file
