"""Reports, pictures, image folders, and the command line of calibrate and report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    POOLING,
    Bare,
    Model,
    Pair,
    assert_same_state,
    camvid,
    equalized,
    random_batches,
    state,
)
from torch import nn

from fastfuse import calibrate, cli, load_calibration
from fastfuse.calibration.branch_report import BranchReport
from fastfuse.calibration.images import ImageFolder
from fastfuse.calibration.report import report, save_report, table
from fastfuse.nn import MultiLevelFusion, SeparableFusion

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """These models are too small for more."""
    torch.set_num_threads(1)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Five images in three formats and two folders, and a file that is none."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("b.png", "a.jpg", "c.BMP", "more/e.webp", "more/d.jpeg"):
        pixels = torch.randint(256, (32, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


# ---- report -------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [None, False, True])
def test_report_of_plain_and_equalized_models(calibrated: bool | None) -> None:
    """Before: the statistics of calibration. After: those of the same model, calibrated."""
    batches = random_batches(2, 4)
    torch.manual_seed(0)
    model = Model(scale_equalizer=calibrated is not None).train()
    torch.manual_seed(0)
    twin = Model()
    statistics = calibrate(twin, batches)
    if calibrated:
        calibrate(model, batches[:1])
    before = state(model)
    branches = report(model, batches)
    assert_same_state(model, before)
    assert len(branches) == 4 + 3 + 2
    for branch in branches:
        found = statistics[f"{branch.fusion}.equalizer"]
        assert branch.before.mean == pytest.approx(found.mean[branch.level], rel=1e-9)
        assert branch.before.variance == pytest.approx(found.std[branch.level] ** 2, rel=1e-9)
    nested = {("decode_head.fpn_bottleneck", 2), ("decode_head.detail", 0)}
    for branch in branches:
        exact = (branch.fusion, branch.level) not in nested
        assert branch.after.mean == pytest.approx(0, abs=1e-5 if exact else 0.5)
        assert branch.after.variance == pytest.approx(1, abs=1e-5 if exact else 0.8)
    if calibrated is None:
        assert not any("equalizer" in name for name, _ in model.named_modules())
        fusion = model.decode_head.detail
        assert "equalizer" in vars(fusion)
        assert vars(fusion)["equalizer"] is None


@pytest.mark.parametrize("kind", [MultiLevelFusion, SeparableFusion])
def test_gradient_scale_is_the_root_of_the_second_moment(kind: Any) -> None:
    """Proposition 3.1, with an upstream gradient that has nothing to do with the features."""
    torch.manual_seed(0)
    channels = [128, 128]

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion = kind(channels, 64, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            first, second = images.split(channels, 1)
            return self.fusion([first, nn.functional.avg_pool2d(second, 4)])

    images = torch.randn(4, sum(channels), 16, 16) * 3 + 0.1
    for branch in report(Many(), [images], encoder=None):
        for scale in (branch.before, branch.after):
            expected = (scale.mean**2 + scale.variance) ** 0.5
            margin = 0.02 if kind is MultiLevelFusion else 0.15  # of many values, or of 128
            assert scale.gradient == pytest.approx(expected, rel=margin)


def test_report_after_an_exception() -> None:
    class Once(list[torch.Tensor]):
        """A data set that breaks in the second pass."""

        passes = 0

        def __iter__(self) -> Any:
            if self.passes == 2:  # report asks for an iterator once, to see what it is
                raise KeyError("broken")
            self.passes += 1
            return super().__iter__()

    for model in (Model(), Model(scale_equalizer=False)):
        before = state(model)
        with pytest.raises(KeyError):
            report(model, Once(random_batches()))
        assert_same_state(model, before)


def test_report_refuses() -> None:
    with pytest.raises(ValueError, match=r"^report: the model has no fusions"):
        report(Bare(), random_batches(), encoder=None)
    with pytest.raises(ValueError, match=r"batches must be iterable twice.*; got list_iterator"):
        report(Model(), iter(random_batches()))
    with pytest.raises(ValueError, match=r"^report: the model has no module 'backbone'"):
        report(Pair(MultiLevelFusion([3, 3], 4)), random_batches())
    with pytest.raises(ValueError, match=r"^report: no batches"):
        report(Model(), [])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures(suffix: str, tmp_path: Path) -> None:
    branches = report(Model(), random_batches(1))
    path = tmp_path / f"scale.{suffix}"
    assert save_report(branches, path) == [path, tmp_path / "scale.json"]
    assert path.stat().st_size > 10_000
    entry = json.loads((tmp_path / "scale.json").read_text())["branches"][1]
    assert entry["label"] == "level 1 (4 ch, x4)"
    assert entry["before"]["variance"] == branches[1].before.variance
    assert BranchReport("f", 2, 512, (3, 4), (24, 30), *[branches[0].before] * 2).ratio == "x8x7.5"
    assert table(branches).row_count == len(branches) + 3  # and a line per fusion


def test_picture_of_what(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output must end in .png, .svg or .pdf; got"):
        save_report([], tmp_path / "scale.gif")


# ---- image folders ------------------------------------------------------------------------------


def test_image_folder(photographs: Path) -> None:
    images = ImageFolder(photographs, 2)
    assert [f.name for f in images.files] == ["a.jpg", "b.png", "c.BMP", "d.jpeg", "e.webp"]
    assert images.dropped == photographs / "more" / "e.webp"
    assert [tuple(batch.shape) for batch in images] == [(2, 3, 32, 40)] * 2
    assert len(images) == 2
    assert [len(batch) for batch in ImageFolder(photographs, 3)] == [3, 2]
    raw = next(iter(ImageFolder(photographs, 2, mean=(0, 0, 0), std=(1, 1, 1))))[1]
    pixels = torch.tensor(list(Image.open(photographs / "b.png").tobytes())).reshape(32, 40, 3)
    assert torch.equal(raw, pixels.permute(2, 0, 1) / 255)
    normalized = next(iter(images))[1]
    expected = (raw - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    torch.testing.assert_close(normalized, expected)
    assert next(iter(ImageFolder(photographs, 2, size=(8, 10)))).shape == (2, 3, 8, 10)


def test_nobody_elses_numbers_are_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "scale.json"
    mine.write_text("{}")
    with pytest.raises(ValueError, match=r"the numbers would go to .*scale.json, where another"):
        save_report([], tmp_path / "scale.png")
    assert mine.read_text() == "{}"


def test_image_folder_refuses(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"folder": tmp_path / "missing"}, "must be a folder of images; got"),
        ({"folder": tmp_path / "empty"}, r"at least 2 images \(png, jpg.*\); got 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"size": (0, 4)}, "--size must be two positive numbers"),
        ({"std": (1, 0, 1)}, "--std must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFolder(**{"folder": photographs, **options})
    Image.new("RGB", (41, 32)).save(photographs / "d.png")
    with pytest.raises(ValueError, match=r"a.jpg has 32x40, .*d.png has 32x41: give --size HEIGHT"):
        list(ImageFolder(photographs))
    (photographs / "d.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"d.png cannot be read as an image"):
        list(ImageFolder(photographs))


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_calibrate_command(
    suffix: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"equalizers.{suffix}"
    arguments = ["calibrate", "small_models:equalized", "--data", str(photographs)]
    assert cli.main([*arguments, "--output", str(output), "--batch-size", "2"]) == 0
    errors = capsys.readouterr().err
    assert "5 images in" in errors
    assert "e.webp is left out: alone in the last batch" in errors
    assert "3 equalizers calibrated on 4 images" in errors
    model = equalized()
    twin = copy.deepcopy(model)
    assert load_calibration(model, output) == calibrate(twin, ImageFolder(photographs, 2))
    assert model.get_submodule(POOLING).calibrated


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scale.png"
    arguments = ["report", "small_models:plain", "--data", str(camvid()), "--output", str(output)]
    options = ["--batch-size", "4", "--max-batches", "1", "--size", "64", "96"]
    assert cli.main([*arguments, *options]) == 0
    shown = capsys.readouterr()
    assert "367 images in" in shown.err
    assert "decode_head" in shown.out
    assert "level 1 (4 ch, x8x12)" in shown.out
    assert output.exists()
    assert output.with_suffix(".json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factory": "nonsense"}, "must be given as package.module:factory; got 'nonsense'"),
        ({"factory": "no_such_module:f"}, "cannot import 'no_such_module': ModuleNotFoundError"),
        ({"factory": "small_models:missing"}, "module 'small_models' has no 'missing'"),
        ({"factory": "small_models:POOLING"}, "must be callable without arguments"),
        ({"factory": "small_models:two_pass"}, "small_models:two_pass() failed: TypeError"),
        ({"factory": "small_models:camvid_batches"}, "failed: TypeError"),
        ({"factory": "builtins:dict"}, "must return a torch.nn.Module; got dict"),
        ({"factory": "small_models:plain"}, "has no scale equalizers"),
        ({"--output": "x.txt"}, "must end in .json or .safetensors"),
        ({"--output": "missing/x.json"}, "--output must be in a folder that exists"),
        ({"--data": "missing"}, "--data must be a folder of images; got 'missing'"),
        ({"--encoder": "stem"}, "no module 'stem'; give encoder="),
        ({"--max-batches": "0"}, "--max-batches must be at least 1; got 0"),
    ],
)
def test_commands_refuse_in_one_line(
    changed: dict[str, str],
    message: str,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"--data": str(photographs), "--output": str(tmp_path / "x.json")}
    factory = changed.pop("factory", "small_models:equalized")
    options |= changed
    flags = [word for option in options.items() for word in option]
    assert cli.main(["calibrate", factory, *flags, "--batch-size", "2"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("calibrate: ")
    assert message in last


def test_report_command_refuses_before_it_works(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "small_models:plain", "--data", "missing", "--output", "x.gif"]
    assert cli.main(arguments) == 2
    assert "output must end in .png, .svg or .pdf; got 'x.gif'" in capsys.readouterr().err
