"""``python -m fastfuse convert`` and ``bench --model``, of small models in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import user_model
from peak_memory import peak_extra_memory
from torch import nn

import fastfuse
from fastfuse import cli, register_pattern
from fastfuse.conversion.pattern import PATTERNS

MODELS = """
import torch
from torch import nn


class Blocks(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Linear(2, 2)
        self.classifier = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        x = self.dropout(self.norm(self.depthwise(self.stem(x))).relu())
        logits = self.classifier(x)
        return {"logits": logits, "more": (x.mean(), logits.argmax(1), None)}


class Off(Blocks):
    pass


class OneValue(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))


class Frozen(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.requires_grad_(False)


class Labels(nn.Identity):
    def forward(self, x):
        return x.argmax(1)


instance = Blocks()
number = 3


def fails():
    raise OSError("no weights")
"""
SMALL = ["--input", "2x3x16x16"]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "some_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_model, "BUDGET_S", 0.1)
    yield
    sys.modules.pop("some_models", None)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = user_model.main(arguments)
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), printed.err


@pytest.mark.parametrize("factory", ["Blocks", "instance"])
def test_convert_prints_the_report(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", f"some_models:{factory}"]) == 0
    printed = capsys.readouterr().out
    model = _instance(getattr(sys.modules["some_models"], factory))
    fastfuse.revert(model)
    assert printed == f"some_models:{factory}: {fastfuse.convert(model)}\n"
    assert "depthwise" in printed


def _instance(model: Any) -> nn.Module:
    return model if isinstance(model, nn.Module) else model()


def test_convert_dry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "some_models:instance", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("some_models:instance, unchanged (dry run): 1 module")
    assert "forward" not in vars(sys.modules["some_models"].instance.depthwise)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("some_models", "must be given as package.module:factory; got 'some_models'"),
        ("no_models:a", "cannot import 'no_models': ModuleNotFoundError: No module named"),
        ("some_models:none", "module 'some_models' has no 'none'"),
        ("some_models:number", "some_models:number must be callable without arguments; got 3"),
        ("some_models:fails", "some_models:fails() failed: OSError: no weights"),
        ("some_models:Blocks.mro", "must return a torch.nn.Module; got list"),
    ],
)
def test_what_is_no_model(factory: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", factory]) == 2
    assert bench(capsys, factory, *SMALL)[0] == 2
    assert cli.main(["convert", factory]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("convert: ")
    assert not printed.out


def test_a_model_before_and_after(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("some_models:Blocks", *SMALL, "--out", "found.json")
    code, printed, _ = bench(capsys, *arguments)
    assert code == 0
    for words in ("1 module of 7 converted", "forward pass: ", "training step: ", "x as fast"):
        assert words in printed
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["converted"] == ["depthwise"]
    assert [mode["mode"] for mode in found["modes"]] == ["forward pass", "training step"]
    forward, training = found["modes"]
    assert set(forward["agreement"]) == {"outputs"}
    assert set(training["agreement"]) == {"outputs", "gradients"}
    for mode in found["modes"]:
        assert max(mode["agreement"].values()) < 1e-4
        best = {
            rival: min(v["median_ms"] for v in mode["variants"] if v["rival"] is rival)
            for rival in (True, False)
        }
        assert mode["speedup"] == pytest.approx(best[True] / best[False])
        peaks = [v["peak_bytes"] for v in mode["variants"] if v["peak_bytes"] is not None]
        assert len(peaks) == (2 if sys.platform == "linux" else 0)


def test_one_layout_and_no_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--layout=contiguous", "--no-training", "--dtype=float64", "--out=found.json")
    assert bench(capsys, "some_models:instance", *SMALL, *options)[0] == 0
    (found,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["modes"]
    titles = [(v["name"], v["layout"]) for v in found["variants"]]
    assert titles == [("fastfuse", "contiguous"), ("eager", "contiguous")]
    assert found["agreement"]["outputs"] < 1e-12


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("Blocks", ["--input", "2x4x16x16"], "some_models:Blocks fails on 2x4x16x16, float32: Run"),
        ("Labels", SMALL, "it returns no floating-point tensor"),
        ("Blocks", [*SMALL, "--out", "nowhere/found.json"], "--out must be in a folder that"),
    ],
)
def test_what_cannot_be_measured(
    factory: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = bench(capsys, f"some_models:{factory}", *options)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("factory", "size", "why"),
    [
        ("OneValue", "1x3x8x8", "ValueError: Expected more than 1 value per channel"),
        ("Frozen", "1x1x4x4", "RuntimeError: element 0 of tensors does not require grad"),
    ],
)
def test_what_cannot_train_is_measured_forward(
    factory: str, size: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, _ = bench(capsys, f"some_models:{factory}", "--input", size)
    assert code == 0
    assert f"training step: left out, for the original fails on {size}: " in printed
    assert why in printed or factory == "Frozen"
    assert "forward pass: " in printed


def test_nothing_converted_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = bench(capsys, "some_models:Frozen", "--input", "1x1x4x4", "--no-training")
    assert code == 0
    assert "none of 1 modules is known" in printed
    assert "nothing is converted: both models run the same code" in printed


@pytest.mark.parametrize("training_only", [False, True])
def test_a_wrong_conversion_is_refused(
    training_only: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is timed; in gradients too, where outputs are right."""
    monkeypatch.delitem(PATTERNS, "some_models:Off", raising=False)

    @register_pattern("some_models:Off")
    def wrong(self: Any, x: torch.Tensor) -> Any:
        found = type(self).forward(self, x)
        if training_only:
            right = found["logits"].detach()
            return found | {"logits": right + 1.1 * (found["logits"] - right)}
        return found | {"logits": found["logits"] * 1.01}

    code, printed, error = bench(capsys, "some_models:Off", *SMALL)
    del PATTERNS["some_models:Off"]
    assert code == 1
    assert "bench: the converted model does not agree with the original: " in error
    what = "training step: the converted model's gradients are " if training_only else "output 0"
    assert what in error
    assert "x as fast" not in printed


def test_gradients_of_what_converts_are_compared_at_equal_random_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Dropout(0.5))

    def call(**more: Any) -> user_model.ModelCall:
        return user_model.call_of(model, shape=(1, 8, 9, 9), dtype="float32", device="cpu", **more)

    apart = user_model.agreement(call, "contiguous", user_model.TRAINING)
    assert 0 <= apart["outputs"] < 1e-5
    assert 0 <= apart["gradients"] < 1e-5
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--model", "a:b", *SMALL], "--quick: only without --model"),
        (["--no-training"], "--no-training: only with --model"),
        (["--model", "a:b"], "--model needs --input NxCxHxW, such as 1x3x512x512"),
        (["--model", "a:b", "--input", "512"], "expected NxCxHxW, each at least 1"),
    ],
)
def test_wrong_arguments_of_bench(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_bench_of_a_model_in_a_shell(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", "1x1x4x4", "--no-training", "--layout", "contiguous"]
    assert cli.main(["bench", "--model", "some_models:Frozen", *arguments]) == 0
    assert "forward pass: " in capfd.readouterr().out
    assert cli.main(["bench", "--model", "some_models:none", *arguments]) == 2
    assert "bench: module 'some_models' has no 'none'" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux's /proc")
def test_memory_is_measured_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever folder the process that measures was started in."""
    where = {"shape": (1, 1, 4, 4), "dtype": "float32", "mode": "forward pass", "device": "cpu"}
    case = {"factory": "others:a", "name": "eager", "layout": "contiguous", **where}
    warm_up = {"factory": "user_model:small", "shape": (1, 3, 8, 8)}
    with pytest.raises(RuntimeError, match="cannot import 'others'"):
        peak_extra_memory("user_model:build", [case], warm_up=warm_up)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("others.py").write_text("from torch import nn\na = nn.Identity()\n", encoding="utf-8")
    (peak,) = peak_extra_memory("user_model:build", [case], warm_up=warm_up)
    assert peak is not None
