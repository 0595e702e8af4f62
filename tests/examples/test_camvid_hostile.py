"""Two runs in one folder, files of others, checkpoints that were edited, names with markup, and
numbers out of their range."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from camvid_runs import config, finish, options
from safetensors.torch import load_file, save_file

from examples.camvid import cli
from examples.camvid.checkpoint import INDEX, claimed, load_state
from examples.camvid.study import compare


def copied(finished: Path, to: Path) -> Path:
    shutil.copytree(finished, to)
    return to


def test_a_folder_is_of_one_run_at_a_time(finished: Path, folder: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with claimed(out), pytest.raises(ValueError, match="--out must be of one run"):
        finish(folder, out, config())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    finish(folder, out, config())


def test_files_of_others_stay(folder: Path, tmp_path: Path) -> None:
    theirs = [tmp_path / name for name in ("movie.partial", "epoch-best.safetensors", "notes.json")]
    for file in theirs:
        file.write_text("x", encoding="utf-8")
    leftover = tmp_path / "epoch-0007.safetensors.partial"
    leftover.write_text("x", encoding="utf-8")
    finish(folder, tmp_path, config(epochs=1))
    assert all(file.exists() for file in theirs)
    assert not leftover.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"version": ...},
        {"identity": ...},
        {"unknown": 1},
        {"identity": None},
        {"epoch": "3"},
        {"history": []},
        {"history": [{"loss": 1.0}] * 3},
        {"weights": None},
        {"weights": ""},
        {"test": {}},
    ],
    ids=str,
)
def test_an_edited_index_is_named(
    finished: Path, folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    out = copied(finished, tmp_path / "out")
    document = json.loads((out / INDEX).read_text(encoding="utf-8")) | change
    document = {key: value for key, value in document.items() if value is not ...}
    (out / INDEX).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=r"camvid: .*checkpoint\.json (is damaged|must be of)"):
        finish(folder, out, config())


@pytest.mark.parametrize("kind", ["missing", "shape", "unknown", "none", "model"])
def test_edited_tensors_are_named(finished: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    out = copied(finished, tmp_path / "out")
    state = load_state(out)
    assert state is not None
    tensors = load_file(out / state.weights)
    if kind == "missing":
        del tensors["optimizer.3.exp_avg"]
    elif kind == "shape":
        tensors["optimizer.3.exp_avg"] = torch.zeros(1, 2, 3)
    elif kind == "unknown":
        tensors["optimizer.x.step"] = torch.zeros(1)
    elif kind == "none":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}
    else:
        key = next(k for k, v in tensors.items() if k.startswith("model.") and v.dim() == 4)
        tensors[key] = torch.zeros(1, 2, 3)
    save_file(tensors, out / state.weights)
    with pytest.raises(ValueError, match=state.weights):
        finish(folder, out, config())


def test_grey_labels_of_four_bits(folder: Path, tmp_path: Path) -> None:
    """Pillow spreads them over eight: class 1 would be 17."""
    spoiled = copied(folder, tmp_path / "data")
    file = next((spoiled / "trainannot").iterdir())
    data = bytearray(file.read_bytes())
    data[24:26] = (4, 0)  # of the header; nothing after it is read
    file.write_bytes(data)
    from examples.camvid.data import _grey_bits

    assert _grey_bits(file) == 4


def test_other_splits_are_other_data(finished: Path, folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "data")
    shutil.rmtree(other / "test")
    out = copied(finished, tmp_path / "out")
    with pytest.raises(ValueError, match=r"another configuration \(data: "):
        finish(other, out, config())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "-1"], "--threads must be at least 0; got -1"),
        (["--workers", "-1"], "--workers must be at least 0; got -1"),
        (["--lr", "1e38"], "--lr must be at most 100; got 1e+38"),
        (["--lr", "inf"], "--lr must be at most 100; got inf"),
        (["--epochs", "1" + 400 * "0"], "--epochs must be below 2^31"),
        (["--seed", str(1 << 64)], "--seed must be below 2^31"),
        (["--study", "psp", "--head", "uper"], "--head must not stand beside --study HEAD"),
        (["--study", "psp", "--seeds", "0"], "--seeds must be at least 1; got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["--out", str(out), "--quick", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_out_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--data", str(folder), "--out", "/proc/none", *options()]) == 2
    assert "camvid: cannot write /proc/none" in capsys.readouterr().err


def test_names_with_markup(folder: Path, tmp_path: Path) -> None:
    marked, out = copied(folder, tmp_path / "data"), tmp_path / "out[/b]$x$"
    count = len((marked / "classes.txt").read_text(encoding="utf-8").split("\n")) - 1
    names = ["[/b]", "$\\x$", "[red]", *(f"_{i}" for i in range(count - 3))]
    (marked / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    assert cli.main(["--data", str(marked), "--out", str(out), *options(epochs=1)]) == 0
    assert (out / "predictions.png").exists()
    both = ["--curves", str(out), str(copied(out, tmp_path / "b" / out.name))]
    assert cli.main([*both, "--out", str(tmp_path / "c")]) == 0


def test_one_seed_is_json() -> None:
    entry = compare([50.0], [51.0]).entry()
    assert json.loads(json.dumps(entry, allow_nan=False))["interval"] is None
