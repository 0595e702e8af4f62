"""Folders, files and labels that are wrong are named; augmentation and scores are right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from camvid_runs import SIZE, options
from PIL import Image
from small_models import camvid
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from examples.camvid import cli
from examples.camvid.augmentation import augmented, epoch_batches
from examples.camvid.data import CAMVID, DataSet, normalized, open_data
from examples.camvid.scores import Scores, confusion


def _empty(folder: Path) -> None:
    for file in (folder / "train").iterdir():
        file.unlink()


def _relabel(mode: str, value: object, size: tuple[int, int] = SIZE[::-1]) -> Callable[..., None]:
    def change(folder: Path) -> None:
        Image.new(mode, size, value).save(folder / "valannot" / "001.png")  # type: ignore[arg-type]

    return change


def _void(split: str, count: int | None = None) -> Callable[[Path], None]:
    """The first label maps of a split, or all."""

    def change(folder: Path) -> None:
        for file in sorted((folder / f"{split}annot").iterdir())[:count]:
            Image.new("L", SIZE[::-1], 5).save(file)

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "valannot" / "001.png").unlink(),
            "1 of 3 in {f}/val have none, first {f}/valannot/001.png",
        ),
        (lambda f: shutil.rmtree(f / "valannot"), "must have a folder valannot"),
        (_empty, "{f}/train must hold images (png, jpg, jpeg, webp, bmp, tif, tiff); got none"),
        (
            _relabel("L", 1, (40, 30)),
            "{f}/valannot/001.png must be of its image's size, 64x64; got 30x40",
        ),
        (
            _relabel("L", 9),
            "{f}/valannot/001.png must have classes from 0 to 4, or 5 for void; got 9 at row 0, "
            "column 0",
        ),
        (_relabel("RGB", (1, 1, 1)), "{f}/valannot/001.png must have one byte a pixel"),
        (
            lambda f: (f / "train" / "002.png").write_bytes(b"nothing"),
            "{f}/train/002.png cannot be read as an image: cannot identify image file",
        ),
        (
            lambda f: (f / "train" / "002.png").write_bytes(
                (f / "train" / "002.png").read_bytes()[:200]
            ),
            "{f}/train/002.png cannot be read as an image: ",
        ),
        (
            lambda f: (f / "classes.txt").write_text("one\n", encoding="utf-8"),
            "{f}/classes.txt must name at least 2 classes; got 1",
        ),
        (
            lambda f: (f / "classes.txt").write_bytes(b"caf\xe9\nb\n"),
            "{f}/classes.txt must be UTF-8",
        ),
        (_void("val"), "{f}/valannot must have labelled pixels; all are void"),
        (_void("test"), "{f}/testannot must have labelled pixels; all are void"),
        (_void("train", 1), "{f}/trainannot/000.png must have labelled pixels; all are void"),
        (
            lambda f: Image.new("I;16", SIZE[::-1]).save(f / "train" / "000.png"),
            "{f}/train/000.png must have 8 bits a channel; got an image of mode I",
        ),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoiled = tmp_path / "data"
    shutil.copytree(folder, spoiled)
    spoil(spoiled)
    out = tmp_path / "out"
    assert cli.main(["--data", str(spoiled), "--out", str(out), *options(epochs=1)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("camvid: ")
    assert message.format(f=spoiled) in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 10}, "--batch times processes must be at most the 9 training images; got 10"),
        ({"batch": 1}, "--batch must be at least 2; got 1"),
        ({"epochs": 0}, "--epochs must be at least 1; got 0"),
        ({"output_stride": 16}, "--output-stride must be left out, for cednet-nano's is fixed"),
        ({"lr": -1.0}, "--lr must be positive; got -1.0"),
    ],
)
def test_options_that_are_wrong(
    folder: Path,
    tmp_path: Path,
    change: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["--data", str(folder), "--out", out, *options(**change)]) == 2
    assert message in capsys.readouterr().err


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    assert cli.main(["--data", missing, "--out", str(tmp_path)]) == 2
    assert f"--data must be a folder; got {missing}" in capsys.readouterr().err


def test_camvid_itself() -> None:
    data = open_data(camvid().parent, (180, 240))
    assert data.classes == CAMVID
    assert [len(split) for split in data.splits.values()] == [367, 101, 233]
    image, labels = data.splits["val"].read(0)
    assert image.shape == (3, 180, 240)
    assert labels.shape == (180, 240)
    counts = torch.bincount(labels.flatten(), minlength=12) / labels.numel()
    assert counts[[1, 3]].min() > 0.05  # buildings and the road


# ---- augmentation -------------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_move_with_the_image() -> None:
    """An image that shows its own labels still does, wherever the window lies."""
    labels = torch.zeros(64, 96, dtype=torch.int64)
    labels[:, 40:] = 1
    labels[30:, :] = 2
    image = (100 + 50 * labels).expand(3, -1, -1).to(torch.uint8)
    flipped = 0
    for seed in range(20):
        x, y = augmented(image, labels, (32, 64), _generator(seed))
        assert x.shape == (3, 32, 64)
        assert y.shape == (32, 64)
        grey = [x[0][y == k] for k in y.unique().tolist()]
        for darker, brighter in pairwise(grey):
            assert darker.median() < brighter.median()
            assert (darker < brighter.median()).float().mean() > 0.9
        flipped += bool((y[0, 0] == 1) & (y[0, -1] == 0))
    assert flipped  # the class on the right stands on the left


def test_augmentation_is_a_function_of_its_seed(data: DataSet) -> None:
    image, labels = data.splits["train"].read(0)
    first, again, other = (augmented(image, labels, (32, 32), _generator(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_batches_are_shared_and_differ_by_epoch(data: DataSet) -> None:
    train = data.splits["train"]

    def order(epoch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        batches = epoch_batches(train, (32, 32), 2, seed=0, epoch=epoch, rank=rank, world=world)
        return list(batches.batch_sampler)  # type: ignore[arg-type]

    assert len(order(0)) == 4  # of 9 images
    assert order(0) == order(0) != order(1)
    shares = [list(chain(*order(0, rank, 2))) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 4
    assert not set(shares[0]) & set(shares[1])


def test_workers_read_the_same(data: DataSet) -> None:
    batches = [
        list(epoch_batches(data.splits["train"], (32, 32), 2, seed=0, epoch=1, workers=workers))
        for workers in (0, 1)
    ]
    for alone, read in zip(*batches, strict=True):
        assert torch.equal(alone[0], read[0])
        assert torch.equal(alone[1], read[1])


def test_normalized_as_calibration_reads_images(folder: Path, data: DataSet) -> None:
    from fastfuse.calibration.images import ImageFolder

    (expected,) = ImageFolder(folder / "val", 3)
    read = torch.stack([data.splits["val"].read(i)[0] for i in range(3)])
    torch.testing.assert_close(normalized(read), expected)


# ---- scores -------------------------------------------------------------------------------------


def test_scores_against_torchmetrics() -> None:
    classes, void = 6, 6
    labels = torch.randint(5, (3, 40, 50))  # the last class is never predicted
    targets = torch.where(torch.rand(3, 40, 50) < 0.5, labels, torch.randint(7, (3, 40, 50)))
    targets[targets == 4] = void  # of the last but one there is nothing
    scores = Scores.of(confusion(labels, targets, classes))
    options = {"num_classes": classes, "ignore_index": void}
    per_class = MulticlassJaccardIndex(**options, average="none")(labels, targets)
    assert scores.iou == pytest.approx(per_class.tolist(), abs=1e-6)
    mean = MulticlassJaccardIndex(**options)(labels, targets)
    assert scores.miou == pytest.approx(float(mean), abs=1e-6)
    right = MulticlassAccuracy(**options, average="micro")(labels, targets)
    assert scores.accuracy == pytest.approx(float(right), abs=1e-6)
    assert scores.pixels == (targets != void).sum()


def test_classes_that_do_not_occur_do_not_count() -> None:
    scores = Scores.of(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert scores.miou == pytest.approx((0.75 + 0.8) / 2)
    assert scores.entry()["iou"] == [0.75, 0.8, None]
    assert Scores.of_entry(scores.entry()).miou == scores.miou
