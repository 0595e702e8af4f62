"""A small data set of shapes on textures, at several scales, for whoever has no CamVid."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.camvid.data import CLASSES_FILE

__all__ = ["NAMES", "write_synthetic"]

NAMES = ("ground", "disc", "square", "ring", "bar")
COUNTS = {"train": 48, "val": 12, "test": 12}
_COLOURS = torch.tensor(
    [[96, 104, 88], [176, 96, 80], [88, 112, 176], [168, 160, 80], [96, 160, 96]]
)
_RADII = (4, 32)  # pixels, the scales that a decoder's levels see


def write_synthetic(
    folder: Path,
    size: tuple[int, int] = (96, 128),
    counts: dict[str, int] | None = None,
    seed: int = 0,
) -> None:
    """Writes it in CamVid's layout, unless it is there.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_synthetic(folder, (32, 32), {"train": 2, "val": 1})
    >>> sorted(path.name for path in folder.iterdir())
    ['classes.txt', 'train', 'trainannot', 'val', 'valannot']
    """
    from PIL import Image

    if (folder / CLASSES_FILE).exists():  # written last
        return
    generator = torch.Generator().manual_seed(seed)
    for split, count in (counts or COUNTS).items():
        images, labels = folder / split, folder / f"{split}annot"
        for path in (images, labels):
            path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, classes = _scene(size, generator)
            name = f"{i:03}.png"
            Image.frombytes("RGB", size[::-1], _bytes(image.permute(1, 2, 0))).save(images / name)
            Image.frombytes("L", size[::-1], _bytes(classes)).save(labels / name)
    (folder / CLASSES_FILE).write_text("\n".join(NAMES) + "\n", encoding="utf-8")


def _bytes(values: Tensor) -> bytes:
    return bytes(values.to(torch.uint8).contiguous().flatten().tolist())


def _scene(size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image, (3, H, W) in 0..255, and its classes, (H, W)."""
    height, width = size

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def texture(grain: int) -> Tensor:
        coarse = (3, max(height // grain, 1), max(width // grain, 1))
        noise = torch.randn(coarse, generator=generator) * 20
        return F.interpolate(noise[None], size, mode="bilinear")[0]

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = _COLOURS[0][:, None, None] + texture(16)
    classes = torch.zeros(size, dtype=torch.int64)
    for _ in range(6):
        kind = int(uniform(1, len(NAMES)))
        radius = _RADII[0] * (_RADII[1] / _RADII[0]) ** uniform(0, 1)
        y, x = rows - uniform(0, height), columns - uniform(0, width)
        distance = (y.square() + x.square()).sqrt()
        shape = {
            1: distance < radius,
            2: torch.maximum(y.abs(), x.abs()) < radius * math.sqrt(math.pi) / 2,
            3: (distance < radius) & (distance > radius / 2),
            4: (y.abs() < radius / 3) & (x.abs() < 2 * radius),
        }[kind]
        paint = _COLOURS[kind][:, None, None] * uniform(0.8, 1.2) + texture(2 * kind)
        image = torch.where(shape, paint, image)
        classes[shape] = kind
    classes[:, :1] = len(NAMES)  # void, as along the borders of photographs
    return image.clamp(0, 255), classes
