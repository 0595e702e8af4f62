"""The fused pipeline against the plain one, equalizers, two processes, a study, pictures."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from camvid_runs import COUNTS, config, finish, options, weights
from PIL import Image
from rich.console import Console

import examples.camvid
from examples.camvid import cli
from examples.camvid.checkpoint import INDEX, load_state
from examples.camvid.data import DataSet
from examples.camvid.models import BACKBONES, HEADS, build
from examples.camvid.pipeline import Objective, predict, running
from examples.camvid.study import compare, study, t_quantile
from examples.camvid.training import learning_rate, model_of, train
from fastfuse.calibration.equalizers import find_equalizers

ROOT = Path(__file__).resolve().parents[2]
MODULES = [m.name for m in pkgutil.iter_modules(examples.camvid.__path__, "examples.camvid.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# ---- two pipelines ------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["uper", "psp"])
def test_plain_pipeline_has_the_same_scores(folder: Path, tmp_path: Path, head: str) -> None:
    fused, plain = (
        finish(folder, tmp_path / pipeline, config(head=head, pipeline=pipeline, batch=4))
        for pipeline in ("fused", "plain")
    )
    for ours, theirs in zip(fused.history, plain.history, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours["miou"] == pytest.approx(theirs["miou"], abs=5e-4)
        assert ours["pixels"] == theirs["pixels"]
    assert weights(tmp_path / "fused") != weights(tmp_path / "plain")  # they are two pipelines


@pytest.mark.parametrize(
    ("backbone", "head"),
    [*(("cednet-nano", head) for head in HEADS), ("resnet", "uper"), ("resnet", "psp")],
)
def test_pipelines_agree(backbone: str, head: str) -> None:
    stride = 16 if BACKBONES[backbone].dilated else 0
    model = build(head, backbone, 5, 8, output_stride=stride, ignore_index=5)
    images, targets = torch.randn(2, 3, 64, 64), torch.randint(6, (2, 64, 64))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    losses, labels = [], []
    for pipeline in ("fused", "plain"):
        with running(pipeline):
            losses.append(Objective(model, pipeline)(images, targets).item())
    for pipeline in ("fused", "plain"):  # by the running statistics of both steps
        with running(pipeline):
            labels.append(predict(model, pipeline, images[:, :, :50, :60]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert labels[0].shape == (2, 50, 60)
    assert (labels[0] == labels[1]).float().mean() > 0.999


# ---- training -----------------------------------------------------------------------------------


def test_it_learns(folder: Path, tmp_path: Path) -> None:
    state = finish(folder, tmp_path, config(epochs=12, channels=16, lr=5e-3))
    first, last = state.history[0], state.history[-1]
    assert last["loss"] < 0.9 * first["loss"]


def test_learning_rate_rises_and_falls() -> None:
    run = config(lr=1.0)
    rates = [learning_rate(run, step, 100) for step in range(100)]
    assert rates[0] == 0.2
    assert max(rates) == rates[4] > 0.95
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_module_is_calibrated_and_kept(data: DataSet, tmp_path: Path) -> None:
    run = config(scale_equalizer="module", epochs=1)
    model, state = train(run, data, tmp_path)
    equalizers = find_equalizers(model)
    assert {name.split(".")[-2] for name in equalizers} == {"bottleneck", "fpn_bottleneck"}
    assert all(equalizer.calibrated for equalizer in equalizers.values())
    assert set(state.gradients) >= {f"decode_head.bottleneck:{level}" for level in range(5)}


def test_fold_trains_a_plain_network(data: DataSet, tmp_path: Path) -> None:
    model, _ = train(config(scale_equalizer="fold", epochs=1), data, tmp_path)
    assert not find_equalizers(model)
    assert model.state_dict().keys() == model_of(config(), data).state_dict().keys()


def test_equalizers_do_not_change_the_initial_weights(data: DataSet) -> None:
    plain, equalized = (
        model_of(config(scale_equalizer=s), data).state_dict() for s in ("none", "module")
    )
    assert plain.keys() < equalized.keys()
    assert all(torch.equal(plain[key], equalized[key]) for key in plain)


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    state = finish(folder, tmp_path, config(dtype="bfloat16", epochs=1, batch=2))
    assert math.isfinite(state.history[0]["loss"])


def test_two_processes(folder: Path, tmp_path: Path) -> None:
    """By torchrun: one speaks and writes, the images are shared, all are counted."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    place = ["--standalone", "--local-addr=127.0.0.1", "-m", "examples.camvid"]
    paths = ["--data", str(folder), "--out", str(tmp_path)]
    flags = options(epochs=1, scale_equalizer="module", threads=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(
        [*launcher, *place, *paths, *flags],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/1: loss") == 1
    document = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    assert document["identity"]["processes"] == 2
    assert len(document["history"][0]["losses"]) == COUNTS["train"] // 4
    with pytest.raises(ValueError, match="processes: 2, not 1"):
        finish(folder, tmp_path, config(epochs=1, scale_equalizer="module"))
    alone = finish(folder, tmp_path / "alone", config(epochs=1))
    assert document["history"][0]["pixels"] == alone.history[0]["pixels"]


# ---- the command and its pictures ---------------------------------------------------------------


def test_command_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    given = ["--backbone", "cednet-nano", "--channels", "8", "--epochs", "1", "--batch", "8"]
    assert cli.main(["--out", str(out), *given]) == 0
    printed = capsys.readouterr().out
    assert "no --data: a synthetic data set" in printed
    for line in ("12 test images of 96x128", "ring", "mean"):
        assert line in printed
    assert (out / "synthetic" / "classes.txt").exists()
    for name in ("curves.png", "predictions.png"):
        with Image.open(out / name) as image:
            assert len(image.convert("L").getcolors() or range(256)) > 20  # something is drawn
    assert cli.main(["--curves", str(out), "--out", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "curves.png").exists()
    assert cli.main(["--curves", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "--curves must name folders of runs" in capsys.readouterr().err


# ---- study --------------------------------------------------------------------------------------


def test_study(data: DataSet, tmp_path: Path) -> None:
    from examples.camvid.processes import Processes

    run = config(epochs=1)
    arguments = {"heads": ["uper"], "seeds": range(2), "processes": Processes()}
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        console = Console(file=log, width=100)
        found = study(run, data, tmp_path, console=console, **arguments)["uper"]
        before = {path: path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}
        again = study(run, data, tmp_path, console=console, **arguments)["uper"]
    assert found == again  # nothing is trained twice
    assert len(before) == 4
    for path, content in before.items():
        assert path.read_bytes() == content
    runs = [tmp_path / f"uper-{v}-seed{s}" for v in ("none", "module") for s in (0, 1)]
    scores = []
    for folder in runs:
        state = load_state(folder)
        assert state is not None
        assert state.test is not None
        scores.append(100 * state.test["miou"])
    assert found.without == tuple(scores[:2])
    assert found.with_equalizers == tuple(scores[2:])
    low, high = found.interval
    assert low <= found.difference <= high
    for name in ("uper.png", "uper-gradients.png", "study.json"):
        assert (tmp_path / name).stat().st_size
    assert f"{found.difference:+.2f}" in (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "2 seeds" in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize(  # of the tables of Student's distribution
    ("probability", "degrees", "quantile"),
    [(0.975, 1, 12.706), (0.975, 3, 3.182), (0.975, 4, 2.776), (0.975, 30, 2.042), (0.9, 7, 1.415)],
)
def test_quantiles(probability: float, degrees: int, quantile: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(quantile, abs=5e-4)


def test_comparison() -> None:
    found = compare([50.0, 60.0, 70.0], [51.0, 61.0, 71.0])  # seeds differ, the pairs do not
    assert found.difference == pytest.approx(1.0)
    assert found.interval == pytest.approx((1.0, 1.0))
    assert compare([1.0], [2.0]).interval == (-math.inf, math.inf)
