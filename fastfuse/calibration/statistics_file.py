"""Statistics of scale equalizers in a file: JSON, to be read, or safetensors."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastfuse.calibration import BranchStatistics, write_statistics
from fastfuse.calibration.equalizers import find_equalizers, unwrap

__all__ = ["check_statistics_path", "load_calibration", "save_calibration"]

_FORMAT = "fastfuse scale equalizers"
_VERSION = 1
_FIELDS = ("mean", "std", "count")


def save_calibration(statistics: dict[str, BranchStatistics], path: str | PathLike[str]) -> None:
    """Writes what :func:`fastfuse.calibrate` returned; floats keep every bit.

    Args:
        statistics: by the equalizer's name.
        path: ends in ``.json``, or in ``.safetensors`` (needs the package of that name): tensors
            ``NAME.mean`` and ``NAME.std``, float64, and ``NAME.count``, int64, of shape (levels,).

    Raises:
        ValueError: another suffix.
        ImportError: safetensors is not installed.

    >>> import fastfuse, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "equalizers.json"
    >>> statistics = {"fusion.equalizer": fastfuse.BranchStatistics((0.4,), (0.6,), (32,))}
    >>> fastfuse.save_calibration(statistics, path)
    """
    path = Path(path)
    if check_statistics_path("save_calibration", path) == ".json":
        entries = {n: {f: list(getattr(s, f)) for f in _FIELDS} for n, s in statistics.items()}
        document = {"format": _FORMAT, "version": _VERSION, "equalizers": entries}
        path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return
    dtypes = dict(zip(_FIELDS, (torch.float64, torch.float64, torch.int64), strict=True))
    tensors = {
        f"{name}.{field}": torch.tensor(getattr(s, field), dtype=dtypes[field], device="cpu")
        for name, s in statistics.items()
        for field in _FIELDS
    }
    metadata = {"format": _FORMAT, "version": str(_VERSION)}
    _safetensors("save_calibration").save_file(tensors, path, metadata)


def load_calibration(model: nn.Module, path: str | PathLike[str]) -> dict[str, BranchStatistics]:
    """Gives the equalizers of ``model`` the statistics of a file of :func:`save_calibration`.

    All of them or, if anything does not fit, none. Returns the statistics.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a file that is not one of ours, or that does not fit the model:
            equalizers that it lacks or that the model lacks, numbers of levels that differ, values
            that an equalizer refuses.
        ImportError: safetensors is not installed.

    >>> import fastfuse, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "equalizers.json"
    >>> statistics = {"equalizer": fastfuse.BranchStatistics((0.4,), (0.5,), (32,))}
    >>> fastfuse.save_calibration(statistics, path)
    >>> fusion = fastfuse.nn.MultiLevelFusion([8], 16, scale_equalizer=True)
    >>> fastfuse.load_calibration(fusion, path)["equalizer"].std
    (0.5,)
    >>> fusion.equalizer.std
    tensor([0.5000])
    """
    path = Path(path)
    where = f"load_calibration: {path}"
    suffix = check_statistics_path("load_calibration", path)
    read = _read_json if suffix == ".json" else _read_safetensors
    statistics = read(path, where)
    modules = find_equalizers(unwrap(model))
    problems = [
        f"the model has equalizers that the file lacks: {sorted(modules.keys() - statistics)}",
        f"the file has equalizers that the model lacks: {sorted(statistics.keys() - modules)}",
    ]
    problems = [p for p in problems if not p.endswith("[]")]
    problems += [
        f"{name} has {module.num_levels} levels in the model, "
        f"{len(statistics[name].mean)} in the file"
        for name, module in modules.items()
        if name in statistics and len(statistics[name].mean) != module.num_levels
    ]
    if problems:
        raise ValueError(f"{where} does not fit the model: " + "; ".join(problems))
    try:
        write_statistics(modules, statistics)
    except ValueError as error:
        raise ValueError(f"{where} does not fit the model: {error}") from error
    return statistics


def check_statistics_path(caller: str, path: Path) -> str:
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"{caller}: path must end in .json or .safetensors; got {str(path)!r}")
    return path.suffix


def _safetensors(caller: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{caller}: .safetensors files need the package safetensors; "
            f"pip install 'fastfuse[calibrate]', or use a .json file"
        ) from error
    return safetensors.torch


def _read_json(path: Path, where: str) -> dict[str, BranchStatistics]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
        return _checked({n: [e[f] for f in _FIELDS] for n, e in document["equalizers"].items()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(where, error) from error


def _read_safetensors(path: Path, where: str) -> dict[str, BranchStatistics]:
    if not path.exists():
        raise FileNotFoundError(f"{where}: no such file")
    library = _safetensors("load_calibration")
    try:
        tensors = library.load_file(path)
        names = {key.rpartition(".")[0] for key in tensors}
        return _checked({n: [tensors[f"{n}.{f}"].tolist() for f in _FIELDS] for n in names})
    except Exception as error:  # safetensors has an exception of its own
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where} is not a file of save_calibration: {type(error).__name__}: {error}")


def _checked(entries: dict[str, list[Any]]) -> dict[str, BranchStatistics]:
    for name, fields in entries.items():
        numbers = all(isinstance(v, (int, float)) for field in fields for v in field)
        if not numbers or len({len(field) for field in fields}) != 1:
            raise ValueError(f"{name} must have as many numbers in each of {', '.join(_FIELDS)}")
    return {
        name: BranchStatistics(*(tuple(field) for field in fields))
        for name, fields in entries.items()
    }
