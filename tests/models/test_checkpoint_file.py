"""Checkpoint files: what else they hold is neither run nor in the way; what is none is named."""

from __future__ import annotations

import argparse
import collections
import datetime
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastfuse.models import CEDNet, checkpoint_file, load_checkpoint, load_published_cednet
from fastfuse.models.checkpoint_file import read_file

np = pytest.importorskip("numpy")


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.fixture
def library() -> Iterator[types.ModuleType]:
    """Classes of a module that is there only while a checkpoint is written."""
    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)

    class HistoryBuffer:
        """As mmengine's: arrays and functions in its state."""

        def __init__(self) -> None:
            self._log_history = np.array([0.5, 0.25])

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

        def mean(self) -> float:
            return self._log_history.mean()

    class ConfigDict(dict[str, Any]):
        """As mmengine's: pickled as a call."""

        def __reduce_ex__(self, _: Any) -> Any:
            return type(self), (dict(self),)

    class AttributeDict(dict[str, Any]):
        """As Lightning's: pickled as a new object and its items."""

    class Config:
        """As mmengine's: a state that is no dict."""

        def __getstate__(self) -> Any:
            return ({"lr": 0.1}, "config.py")

        def __setstate__(self, state: Any) -> None:
            self.state = state

    class Net(nn.Conv2d):
        pass

    for kind in (HistoryBuffer, ConfigDict, AttributeDict, Config, Net):
        kind.__module__, kind.__qualname__ = name, kind.__name__
        setattr(module, kind.__name__, kind)
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = name
    parents = ("mmengine", "mmengine.logging")
    sys.modules |= {n: types.ModuleType(n) for n in parents} | {name: module}
    yield module
    for n in (*parents, name):
        sys.modules.pop(n, None)


BESIDE: dict[str, Callable[[Any], Any]] = {
    "arrays": lambda m: {"PALETTE": np.zeros((3, 3)), "CLASSES": np.array(["road"])},
    "scalars": lambda m: {"loss": np.float64(0.5), "step": np.int64(3)},
    "arrays of objects": lambda m: np.array([1, "a", None], dtype=object),
    "records": lambda m: np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
    "a history": lambda m: {"log_scalars": collections.OrderedDict(loss=m.HistoryBuffer())},
    "configurations": lambda m: m.ConfigDict(model=m.ConfigDict(depth=50)),
    "a configuration with a state": lambda m: m.Config(),
    "hyperparameters": lambda m: m.AttributeDict(lr=np.float32(0.1), inner=m.AttributeDict(a=1)),
    "containers": lambda m: (
        collections.defaultdict(list, a=[1]),
        {1, 2},
        collections.Counter("a"),
    ),
    "the standard library's": lambda m: (
        argparse.Namespace(lr=0.1),
        Path("a"),
        datetime.datetime(2020, 1, 1),
    ),
    "a class": lambda m: m.HistoryBuffer,
    "numbers of optimizers": lambda m: {"state": {0: {"step": torch.ones(1)}}},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_is_beside_the_weights(
    beside: str, zipped: bool, tmp_path: Path, library: Any
) -> None:
    """The weights bit for bit, of either format, where the classes' module is not installed."""
    theirs, path = model(), tmp_path / "model.pth"
    content = {"meta": BESIDE[beside](library), "state_dict": theirs.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    del sys.modules[library.__name__]
    before, ours = set(torch.serialization.get_safe_globals()), model()
    load_checkpoint(ours, path)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert set(torch.serialization.get_safe_globals()) == before
    assert library.__name__ not in sys.modules


def rewritten(path: Path, old: bytes, new: bytes) -> None:
    """A checkpoint whose pickle has other names."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(old, new) if "data.pkl" in name else content)


@pytest.mark.parametrize("names", [b"numpy.core", b"numpy._core"])
def test_arrays_of_either_numpy(names: bytes, tmp_path: Path) -> None:
    theirs, ours, path = model(), model(), tmp_path / "model.pth"
    torch.save({"meta": np.zeros(3), "state_dict": theirs.state_dict()}, path)
    for old in (b"numpy._core", b"numpy.core"):
        rewritten(path, old, names)
    load_checkpoint(ours, path)
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_what_the_user_allows_is_loaded(tmp_path: Path, library: Any) -> None:
    """Beside what is not."""
    path, allowed = tmp_path / "model.pth", [library.ConfigDict, (library.Net, "elsewhere.Net")]
    for beside, expected in ((None, False), (np.zeros(3), True)):
        torch.save({"meta": library.ConfigDict(a=1), "beside": beside}, path)
        with torch.serialization.safe_globals(allowed):
            content, stood_in = read_file(path)
        assert isinstance(content["meta"], library.ConfigDict)
        assert content["meta"]["a"] == 1
        assert stood_in == expected


class Runs:
    """Runs a function where it is unpickled as Python does it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", ["eval", "exec", "os.system", "subprocess.call"])
def test_nothing_is_run(function: str, zipped: bool, tmp_path: Path) -> None:
    import os
    import subprocess

    spoiled = tmp_path / "spoiled"
    calls: dict[str, Any] = {
        "eval": Runs(eval, f"open({str(spoiled)!r}, 'w')"),
        "exec": Runs(exec, f"open({str(spoiled)!r}, 'w')"),
        "os.system": Runs(os.system, f"touch {spoiled}"),
        "subprocess.call": Runs(subprocess.call, ["touch", str(spoiled)]),
    }
    theirs, ours, path = model(), model(), tmp_path / "model.pth"
    content = {"meta": calls[function], "state_dict": theirs.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if function == "os.system":  # which torch.load blocks by its module
        message = r"model\.pth holds \w+\.system, and cannot be read without running .*weights_only"
        with pytest.raises(ValueError, match=message):
            load_checkpoint(ours, path)
    else:
        load_checkpoint(ours, path)
        assert torch.equal(ours[0].weight, theirs[0].weight)
    assert not spoiled.exists()
    torch.load(path, weights_only=False)
    assert spoiled.exists()  # the file would have done it


def test_what_has_no_stand_in(tmp_path: Path, library: Any) -> None:
    """A state that is no dict beside a subclass of dict: refused by name."""
    path = tmp_path / "model.pth"
    beside = [library.Config(), library.AttributeDict(lr=0.1)]
    torch.save({"beside": beside, "state_dict": model().state_dict()}, path)
    message = rf"model\.pth holds {library.__name__}\.Config, and cannot .*weights_only=False\)$"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model(), path)
    load_checkpoint(model(), torch.load(path, weights_only=False))


def written(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


def cut(keep: float, *, arrays: bool = False, **options: Any) -> Callable[[Path], None]:
    """A file of which the rest is missing."""

    def write(path: Path) -> None:
        content = {"meta": np.ones(3) if arrays else 1, "state_dict": model().state_dict()}
        torch.save(content, path, **options)
        written = path.read_bytes()
        path.write_bytes(written[: int(keep * len(written))])

    return write


def archive(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, b"")

    return write


LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}
NONE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "a page": (lambda p: p.write_text("<!DOCTYPE html>"), "torch.save or .*starts with b'<!DOC"),
    "text": (lambda p: p.write_text("hello"), "must be a file of torch.save or of safetensors"),
    "git lfs": (lambda p: p.write_text("version https://git-lfs"), "starts with b'version https"),
    "half": (cut(0.5), "is truncated or damaged"),
    "nearly all": (cut(0.99), "is truncated or damaged"),
    "half, legacy": (cut(0.5, **LEGACY), "is damaged"),
    "nearly all, legacy": (cut(0.99, **LEGACY), "is damaged"),
    "half, legacy, with arrays": (cut(0.5, arrays=True, **LEGACY), "is damaged"),
    "nearly all, legacy, with arrays": (cut(0.99, arrays=True, **LEGACY), "is damaged"),
    "another zip": (archive("photo.png"), "is a zip archive that torch.save did not write"),
    "TorchScript": (archive("model/constants.pkl"), r"TorchScript.*pass torch.jit.load\(path\)"),
    "a pickle": (
        lambda p: p.write_bytes(pickle.dumps({"w": 1}, 2)),
        "pickled otherwise than by torch",
    ),
    "protocol 4": (written({"w": 1}, pickle_protocol=4), "is pickled by protocol 4, which torch"),
    "protocol 5, legacy": (
        written({"w": torch.ones(1)}, pickle_protocol=5, **LEGACY),
        r"protocol 5, .* Save it again by torch.save\(state, path\)",
    ),
    "no weights": (
        written({"epoch": 3}),
        r"got a dict with other entries, 'epoch': int",
    ),
    "weights elsewhere": (
        written({"ema": {"w": torch.ones(1)}, "epoch": 3}),
        r"got a dict with other entries, 'ema': dict, 'epoch': int\. .*pass key= or the s",
    ),
    "an empty state dict": (written({"state_dict": {}}), "got an empty one"),
    "arrays for weights": (
        written({"state_dict": {"w": np.ones(3)}}),
        r"other entries, 'w': numpy\._?core\.multiarray\._reconstruct\.",
    ),
    "numbers for keys": (written({0: torch.ones(1)}), "got a dict with other entries, 0: Tensor"),
    "a list": (written([torch.ones(1)]), "got list"),
    "a tensor": (written(torch.ones(1)), "got Tensor"),
}


@pytest.mark.parametrize("kind", NONE)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_checkpoint(kind: str, tmp_path: Path) -> None:
    write, message = NONE[kind]
    path, ours = tmp_path / "model.pth", model()
    write(path)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^load_checkpoint: {path} .*{message}"):
        load_checkpoint(ours, path)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_threads_load_at_once(tmp_path: Path) -> None:
    """What torch.load allows afterwards is what it allowed before."""
    path, allowed = tmp_path / "model.pth", set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": model().state_dict(), "history": np.ones(3)}, path)
    ours = [model() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda net: load_checkpoint(net, path), ours))
    assert set(torch.serialization.get_safe_globals()) == allowed
    expected = read_file(path)[0]["state_dict"]
    assert all(torch.equal(v, expected[k]) for net in ours for k, v in net.state_dict().items())


def test_a_stand_in_says_what_it_is() -> None:
    with pytest.raises(AttributeError, match=r"^shape of a stand-in: fastfuse\."):
        checkpoint_file._opaque("numpy.ndarray")().shape  # noqa: B018


def test_whole_models_are_named(tmp_path: Path, library: Any) -> None:
    path = tmp_path / "model.pth"
    for content in (library.Net(1, 1, 1), {"model": library.Net(1, 1, 1), "epoch": 3}):
        torch.save(content, path)
        with pytest.raises(
            ValueError, match=rf"got {library.__name__}\.Net\. .*pass key= or the state"
        ):
            load_checkpoint(model(), path)


def test_extra_states_are_no_stand_ins(tmp_path: Path) -> None:
    path, ours = tmp_path / "model.pth", model()
    state = {**ours.state_dict(), "0._extra_state": np.ones(3)}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"other entries, '0._extra_state': numpy"):
        load_checkpoint(ours, path)


def test_safetensors(tmp_path: Path) -> None:
    """By their content, too; damaged ones are named."""
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, ours = model(), model()
    for name in ("model.safetensors", "model.bin"):
        path = tmp_path / name
        safetensors.save_file(theirs.state_dict(), path)
        load_checkpoint(ours, path)
        assert torch.equal(ours[0].weight, theirs[0].weight)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=rf"{name} is no safetensors file, or a damaged one"):
            load_checkpoint(ours, path)
    torch.save(theirs.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_checkpoint(ours, tmp_path / "model.safetensors")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        load_checkpoint(model(), tmp_path / "missing.pth")
    with pytest.raises(IsADirectoryError):
        load_checkpoint(model(), tmp_path)


def test_published_cednets(tmp_path: Path) -> None:
    """They are read the same way."""
    path = tmp_path / "cednet.pth"
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"cednet\.pth must be a file of torch\.save"):
        load_published_cednet(CEDNet("tiny"), path)


def test_a_state_dict_elsewhere(tmp_path: Path) -> None:
    """Under a key of its own, beside what is not run, and under a wrapper's prefix."""
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "model.pth"
    wrapped = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"net": wrapped, "palette": np.zeros(3)}, path)
    before = model.weight.clone()
    with pytest.raises(
        RuntimeError, match=r"keys stand under 'module\.' .* pass prefix='module\.'"
    ):
        load_checkpoint(model, path, key="net")
    assert torch.equal(model.weight, before)
    load_checkpoint(model, path, key="net", prefix="module.")
    assert torch.equal(model.weight, source.weight)
    with pytest.raises(ValueError, match=r"model\.pth has no key 'ema'; it has 'net', 'palette'"):
        load_checkpoint(model, path, key="ema")
