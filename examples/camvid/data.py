"""CamVid's folders: ``train`` with images, ``trainannot`` with label maps of the same names, ..."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastfuse.calibration.images import IMAGENET_MEAN, IMAGENET_STD, SUFFIXES

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CAMVID", "DataSet", "Split", "normalized", "open_data"]

CAMVID = (  # 11 is void
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
CLASSES_FILE = "classes.txt"  # of other data: a name a line
_LABEL_MODES = ("L", "P")  # one byte a pixel: the class, whatever colour a palette gives it


@dataclass(frozen=True)
class Split:
    """Images and label maps of one folder.

    Attributes:
        pairs: the files.
        size: (height, width) that both are resized to.
        classes: number of classes; this value in a label map is void.
    """

    pairs: tuple[tuple[Path, Path], ...]
    size: tuple[int, int]
    classes: int

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, (3, H, W) uint8, and its labels, (H, W) int64.

        Raises:
            ValueError: a file that cannot be read, or labels that are no class; it is named.
        """
        from PIL.Image import Resampling

        image_path, label_path = self.pairs[index]
        image = _decoded(image_path)
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"camvid: {image_path} must have 8 bits a channel; got an image of mode "
                f"{image.mode}"
            )
        image = image.convert("RGB")
        labels = _decoded(label_path)
        if (bits := _grey_bits(label_path)) is not None and bits != 8:
            raise ValueError(
                f"camvid: {label_path} must have 8 bits a pixel, the class; got {bits}"
            )
        if labels.mode not in _LABEL_MODES:
            raise ValueError(
                f"camvid: {label_path} must have one byte a pixel, the class; got an image of "
                f"mode {labels.mode}"
            )
        classes = _pixels(labels)[0].long()
        if (wrong := (classes > self.classes).nonzero()).numel():
            row, column = wrong[0].tolist()
            raise ValueError(
                f"camvid: {label_path} must have classes from 0 to {self.classes - 1}, or "
                f"{self.classes} for void; got {classes[row, column]} at row {row}, "
                f"column {column}"
            )
        height, width = self.size
        if image.size != (width, height):
            image = image.resize((width, height), Resampling.BILINEAR)
            classes = _pixels(labels.resize((width, height), Resampling.NEAREST))[0].long()
        return _pixels(image), classes

    def check_labelled(self) -> None:
        """Whether there is a pixel to score.

        Raises:
            ValueError: all label maps are void.
        """
        if not any(bool((self.read(i)[1] != self.classes).any()) for i in range(len(self))):
            folder = self.pairs[0][1].parent
            raise ValueError(f"camvid: {folder} must have labelled pixels; all are void")


@dataclass(frozen=True)
class DataSet:
    """The splits "train", "val" and, where there is one, "test"; the names of the classes."""

    splits: dict[str, Split]
    classes: tuple[str, ...]

    @property
    def void(self) -> int:
        return len(self.classes)

    def fingerprint(self) -> str:
        """Of the names of classes and of all images: what weights and scores are of."""
        files = [
            f"{n} {image.name}" for n, split in self.splits.items() for image, _ in split.pairs
        ]
        return hashlib.sha256("\n".join([*files, "", *self.classes]).encode()).hexdigest()[:16]


def open_data(folder: Path, size: tuple[int, int]) -> DataSet:
    """Finds the files and checks all but their pixels, which :meth:`Split.read` does.

    Args:
        folder: with ``train`` and ``trainannot``, ``val`` and ``valannot``, perhaps ``test`` and
            ``testannot``; and ``classes.txt``, with a name a line, where the classes are not
            CamVid's.
        size: (height, width) to resize to.

    Raises:
        ValueError: a folder that is missing or empty, an image without a label map, a file that is
            no image, a label map of another size than its image. All of a kind are counted, and the
            first is named.
    """
    names: tuple[str, ...] = CAMVID
    if (file := folder / CLASSES_FILE).exists():
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"camvid: {file} must be UTF-8: {error}") from error
        names = tuple(name for line in lines if (name := line.strip()))
        if len(names) < 2:
            raise ValueError(f"camvid: {file} must name at least 2 classes; got {len(names)}")
    wanted = ["train", "val", *(["test"] if (folder / "test").exists() else [])]
    splits = {name: Split(_pairs(folder, name), size, len(names)) for name in wanted}
    return DataSet(splits, names)


def normalized(images: Tensor) -> Tensor:
    """(..., 3, H, W) in 0..255 as networks take them: ImageNet's mean and deviation, float32."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def _pairs(folder: Path, name: str) -> tuple[tuple[Path, Path], ...]:
    images, labels = folder / name, folder / f"{name}annot"
    for needed in (images, labels):
        if not needed.is_dir():
            raise ValueError(f"camvid: --data must have a folder {needed.name}; got no {needed}")
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"camvid: {images} must hold images ({', '.join(s[1:] for s in SUFFIXES)}); got none"
        )
    pairs = tuple((image, labels / f"{image.stem}.png") for image in files)
    missing = [label for _, label in pairs if not label.is_file()]
    if missing:
        raise ValueError(
            f"camvid: every image must have a label map; {len(missing)} of {len(pairs)} in "
            f"{images} have none, first {missing[0]}"
        )
    for image, label in pairs:
        sizes = [_size(image), _size(label)]
        if sizes[0] != sizes[1]:
            (w, h), (label_w, label_h) = sizes
            raise ValueError(
                f"camvid: {label} must be of its image's size, {h}x{w}; got {label_h}x{label_w}"
            )
    return pairs


def _size(path: Path) -> tuple[int, int]:
    """(width, height), from the file's first bytes."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.size
    except Exception as error:  # pillow has many kinds
        raise _unreadable(path, error) from error


def _decoded(path: Path) -> Image:
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            image.load()
            return image
    except Exception as error:
        raise _unreadable(path, error) from error


def _grey_bits(path: Path) -> int | None:
    """Of a grey PNG, whose values Pillow would spread over 8 bits."""
    with path.open("rb") as file:
        head = file.read(26)
    return head[24] if head.startswith(b"\x89PNG") and len(head) == 26 and head[25] == 0 else None


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"camvid: {path} cannot be read as an image: {str(error) or type(error).__name__}"
    )


def _pixels(image: Image) -> Tensor:
    """(bands, H, W) uint8."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()
