"""Runs that are interrupted, killed or cannot write end in the same bits; what is no checkpoint,
or another one's, is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from camvid_runs import Interrupting, config, finish, finish_killed_by, options, weights

from examples.camvid import cli, training
from examples.camvid.checkpoint import INDEX, load_state, restore
from examples.camvid.data import DataSet
from examples.camvid.training import model_of
from fastfuse.models import load_checkpoint


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Processes that can be killed, forked from one that has imported all and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["camvid_runs"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11's server does not take sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process = context.Process(target=int)
        process.start()
        process.join()
        yield context


@pytest.mark.slow  # the next one kills where it matters
def test_killed_at_random_moments(
    processes: ForkServerContext, folder: Path, finished: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    whole = processes.Process(target=finish, args=(folder, tmp_path / "whole", config()))
    whole.start()
    whole.join()
    seconds = time.monotonic() - start
    assert weights(tmp_path / "whole") == weights(finished)  # in another process
    seed = random.randrange(1 << 32)
    moments, out, killed = random.Random(seed), tmp_path / "killed", 0
    while killed < 3:
        process = processes.Process(target=finish, args=(folder, out, config()))
        process.start()
        time.sleep(moments.uniform(0.05, 0.6) * seconds)
        process.kill()
        process.join()
        killed += 1
        if process.exitcode == 0:  # it was quicker than the moment: once more
            shutil.rmtree(out)
            killed, seconds = 0, seconds / 2
    finish(folder, out, config())
    assert weights(out) == weights(finished), f"seed {seed}"


def test_killed_at_every_step_of_writing(
    processes: ForkServerContext, folder: Path, finished: Path, tmp_path: Path
) -> None:
    """Tensors, their name, the index, its name: one after the other, in one run."""
    for fsync, epochs in ((5, 1), (2, 1), (3, 1), (4, 2)):
        arguments = (fsync, folder, tmp_path, config())
        process = processes.Process(target=finish_killed_by, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        state = load_state(tmp_path)
        assert state is not None
        assert state.epoch == epochs
        assert len(state.history) == epochs
        assert weights(tmp_path)
    finish(folder, tmp_path, config())
    assert weights(tmp_path) == weights(finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "epoch-0003.safetensors"]


@pytest.mark.parametrize("variant", ["module", "fold"])
def test_interrupted_with_equalizers(folder: Path, tmp_path: Path, variant: str) -> None:
    run = config(scale_equalizer=variant, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        finish(folder, tmp_path / "a", run, Interrupting(1))
    for out in ("a", "b"):
        finish(folder, tmp_path / out, run)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_finished_run_is_not_trained_again(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / INDEX).read_bytes()
    assert cli.main(["--data", str(folder), "--out", str(finished), *options()]) == 0
    assert (finished / INDEX).read_bytes() == before
    out = capsys.readouterr().out
    assert "3 of 3 epochs are done" in out
    assert "mean" in out


# ---- what cannot be written or read -------------------------------------------------------------


@pytest.fixture
def begun(folder: Path, tmp_path: Path) -> Path:
    """A run after its first epoch."""
    out = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        finish(folder, out, config(), Interrupting(1))
    return out


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Files end at so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk(
    begun: Path, folder: Path, finished: Path, small_files: Callable[[int], None]
) -> None:
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    small_files(4096)
    with pytest.raises(OSError, match=r"cannot write .*epoch-0002.safetensors: File too large"):
        finish(folder, begun, config())
    small_files(resource.RLIM_INFINITY)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before
    finish(folder, begun, config())
    assert weights(begun) == weights(finished)


def test_bad_label_after_an_epoch(begun: Path, folder: Path, finished: Path) -> None:
    label = folder / "trainannot" / "004.png"
    good = label.read_bytes()
    label.write_bytes(good[:40])
    try:
        with pytest.raises(ValueError, match=r"004\.png cannot be read as an image"):
            finish(folder, begun, config())
    finally:
        label.write_bytes(good)
    finish(folder, begun, config())
    assert weights(begun) == weights(finished)


def test_loss_that_is_no_number(begun: Path, folder: Path, data: DataSet) -> None:
    state = load_state(begun)
    assert state is not None
    model = model_of(config(), data)
    optimizer = training._optimizer(model, config())
    restore(begun, state, model, optimizer)
    with torch.no_grad():
        model.decode_head.conv_seg.bias.fill_(torch.nan)
    from examples.camvid.checkpoint import save_state

    save_state(begun, state, model, optimizer)
    before = weights(begun)
    with pytest.raises(FloatingPointError, match="got nan in step 1 of epoch 2"):
        finish(folder, begun, config())
    assert weights(begun) == before


def test_another_configuration(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / INDEX).read_bytes()
    arguments = ["--data", str(folder), "--out", str(finished)]
    assert cli.main([*arguments, *options(head="psp", seed=1)]) == 2
    error = capsys.readouterr().err
    assert "is of another configuration (head: uper, not psp; seed: 0, not 1)" in error
    assert (finished / INDEX).read_bytes() == before


def test_other_images(finished: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("train", "trainannot", "val", "valannot"):
        (tmp_path / name).mkdir()
        for file in list((folder / name).iterdir())[:2]:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"another configuration \(data: "):
        finish(tmp_path, finished, config())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: "),
        ("[]", "is no checkpoint of this program"),
        ('{"format": "fastfuse camvid checkpoint", "version": 2}', "of version 1; got 2"),
    ],
)
def test_what_is_no_checkpoint(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        finish(folder, tmp_path, config())
    assert (tmp_path / INDEX).read_text(encoding="utf-8") == text


def test_damaged_and_missing_tensors(begun: Path, folder: Path) -> None:
    (file,) = begun.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"epoch-0001\.safetensors is no safetensors file, or a"):
        finish(folder, begun, config())
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"epoch-0001\.safetensors"):
        finish(folder, begun, config())


def test_weights_load_as_any_checkpoint(finished: Path, data: DataSet) -> None:
    model = model_of(config(seed=7), data)
    state = load_state(finished)
    assert state is not None
    load_checkpoint(model, finished / state.weights, prefix="model.")
    assert json.loads((finished / INDEX).read_text(encoding="utf-8"))["epoch"] == 3
