"""Images of a folder, in batches, as networks take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolder"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder:
    """Batches of (N, 3, H, W) float32 images: RGB in 0..1, minus ``mean``, over ``std``.

    Args:
        folder: png, jpg, jpeg, webp and bmp files in it and below, in the order of their paths.
        batch_size: at least 2; a last batch of a single image is left out (``dropped``).
        size: (height, width) to which every image is resized, bilinear; None keeps their own,
            which then must be one for all.
        mean, std: one value per channel; those of ImageNet by default.

    Raises:
        ValueError: no such folder, no images in it, a wrong batch size, a single image, a file
            that is no image; while iterating, two images of different sizes (named).
        ImportError: pillow is not installed.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int = 16,
        *,
        size: Sequence[int] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError("images need pillow; pip install 'fastfuse[calibrate]'") from error
        if not folder.is_dir():
            raise ValueError(f"--data must be a folder of images; got {str(folder)!r}")
        if batch_size < 2:
            raise ValueError(
                f"--batch-size must be at least 2, for BatchNorm on batch statistics; "
                f"got {batch_size}"
            )
        if size is not None and min(size) < 1:
            raise ValueError(f"--size must be two positive numbers, height and width; got {size}")
        if min(std) <= 0:
            raise ValueError(f"--std must be positive; got {tuple(std)}")
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if len(self.files) < 2:
            raise ValueError(
                f"--data must hold at least 2 images ({', '.join(s[1:] for s in SUFFIXES)}); "
                f"got {len(self.files)} in {str(folder)!r}"
            )
        self.batch_size = batch_size
        self.dropped = self.files[-1] if len(self.files) % batch_size == 1 else None
        self._size = tuple(size) if size is not None else None
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None, None]

    def __len__(self) -> int:
        return -(-(len(self.files) - bool(self.dropped)) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        first: tuple[Path, torch.Size] | None = None
        for index in range(len(self)):
            images = []
            for path in self.files[index * self.batch_size :][: self.batch_size]:
                image = self._read(path)
                first = first or (path, image.shape)
                if image.shape != first[1]:
                    sizes = ["x".join(map(str, shape[1:])) for shape in (first[1], image.shape)]
                    raise ValueError(
                        f"images must have one size (height x width); {first[0]} has {sizes[0]}, "
                        f"{path} has {sizes[1]}: give --size HEIGHT WIDTH"
                    )
                images.append(image)
            yield torch.stack(images)

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if self._size is not None:
            image = image.resize(self._size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()
        return (pixels.float() / 255 - self._mean) / self._std
