"""Images of a folder, in batches, as networks take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolder"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_WHITE = 65535  # of integers wider than 8 bits


class ImageFolder:
    """Batches of (N, 3, H, W) float32 images: RGB in 0..1, minus ``mean``, over ``std``.

    The scale follows from the kind of file, never from its values:

    - up to 8 bits: over 255; palettes looked up, CMYK and others converted to RGB by pillow, which
      also takes colour of 16 bits down to 8;
    - grey of 16 or 32 bits: over 65535, which no value may exceed;
    - floating point: as it is, in 0..1.

    Grey is repeated three times. Images are turned upright, as EXIF says, and alpha is ignored, as
    MMSegmentation's and torchvision's loaders do. Of several pages or frames the first is taken.

    Args:
        folder: png, jpg, jpeg, webp, bmp, tif and tiff files in it and below, in the order of their
            paths (``files``).
        batch_size: at least 2; a last batch of a single image is left out (``dropped``).
        size: (height, width) to which every image is resized, bilinear; None keeps their own,
            which then must be one for all.
        mean, std: one value per channel; those of ImageNet by default.
        skip_unreadable: go on without files that cannot be read. ``skipped`` has those of the
            latest pass and what is wrong with each; ``len`` counts them as images.

    Raises:
        ValueError: no such folder, no images in it, a wrong batch size, a single image; while
            iterating, a file that cannot be read (broken, empty, no image, values out of range,
            more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` allows) or fewer than 2 that can, two
            images of different sizes. Files are named.
        ImportError: pillow is not installed.

    >>> import pathlib, tempfile, PIL.Image
    >>> from fastfuse.calibration.images import ImageFolder
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("a.png", "b.png"):
    ...     PIL.Image.new("I;16", (8, 6), 13107).save(folder / name)
    >>> batch = next(iter(ImageFolder(folder, mean=(0, 0, 0), std=(1, 1, 1))))
    >>> batch.shape, batch[0, 0, 0, 0]
    (torch.Size([2, 3, 6, 8]), tensor(0.2000))
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int = 16,
        *,
        size: Sequence[int] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        skip_unreadable: bool = False,
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
        self.files = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()
        )
        if len(self.files) < 2:
            raise ValueError(
                f"--data must hold at least 2 images ({', '.join(s[1:] for s in SUFFIXES)}); "
                f"got {len(self.files)} in {str(folder)!r}"
            )
        self.batch_size = batch_size
        self.skip_unreadable = skip_unreadable
        self.skipped: dict[Path, str] = {}
        alone = len(self.files) % batch_size == 1
        self.dropped = self.files[-1] if alone and not skip_unreadable else None
        self._size = (size[0], size[1]) if size is not None else None
        self._mean = torch.tensor(mean, dtype=torch.float32, device="cpu")[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32, device="cpu")[:, None, None]

    def __len__(self) -> int:
        full, rest = divmod(len(self.files), self.batch_size)
        return full + (rest > 1)

    def __iter__(self) -> Iterator[Tensor]:
        images, found = self._images(), False
        while len(batch := list(islice(images, self.batch_size))) > 1:
            found = True
            yield torch.stack([image for _, image in batch])
        if self.skip_unreadable:
            self.dropped = batch[0][0] if batch else None
            if not found:
                raise ValueError(
                    f"at least 2 images must be readable; got {len(batch)} of {len(self.files)}: "
                    f"{next(iter(self.skipped.values()))}"
                )

    def _images(self) -> Iterator[tuple[Path, Tensor]]:
        """Those that are neither dropped beforehand nor skipped."""
        self.skipped = {}
        if self.skip_unreadable:
            self.dropped = None
        first: tuple[Path, torch.Size] | None = None
        for path in self.files:
            if path == self.dropped and not self.skip_unreadable:
                continue
            try:
                image = self._read(path)
            except ValueError as error:
                if not self.skip_unreadable:
                    raise ValueError(f"{error} (--skip-unreadable goes on without it)") from error
                self.skipped[path] = str(error)
                continue
            first = first or (path, image.shape)
            if image.shape != first[1]:
                sizes = ["x".join(map(str, shape[1:])) for shape in (first[1], image.shape)]
                raise ValueError(
                    f"images must have one size (height x width); {first[0]} has {sizes[0]}, "
                    f"{path} has {sizes[1]}: give --size HEIGHT WIDTH"
                )
            yield path, image

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            image, white = _decoded(path)
        except Exception as error:  # pillow has many kinds, SyntaxError and zlib's among them
            why = _reason(path, error)
            raise ValueError(f"{path} cannot be read as an image: {why}") from error
        if self._size is not None:
            image = image.resize(self._size[::-1], Image.Resampling.BILINEAR)
        pixels = _values(image).permute(2, 0, 1).expand(3, -1, -1).contiguous()
        return (pixels.float() / white - self._mean) / self._std


def _decoded(path: Path) -> tuple[Image, int]:
    """An upright image of mode RGB or F, and what is white in it."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    image.info.pop("transparency", None)
    if image.mode[0] not in "IF":
        return image.convert("RGB"), 255
    kind, white = ("floating-point", 1) if image.mode == "F" else ("integer", _WHITE)
    if image.mode.startswith("I;"):  # any byte order
        image = image.convert("I")
    image = image.convert("F")
    low, high = (bound.item() for bound in _values(image).aminmax())
    if not (low >= 0 and high <= white):  # nor NaN
        raise ValueError(f"{kind} pixels must be in 0..{white}; got {low:g}..{high:g}")
    return image, white


def _values(image: Image) -> Tensor:
    """(H, W, channels) of an image of mode RGB or F."""
    dtype, channels = (torch.uint8, 3) if image.mode == "RGB" else (torch.float32, 1)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
    return values.reshape(image.height, image.width, channels)


def _reason(path: Path, error: Exception) -> str:
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError

    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(8)
        return f"pillow finds no image in it; it starts with {start!r}" if start else "it is empty"
    if isinstance(error, DecompressionBombError):
        return f"{error} Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS"
    return str(error) or type(error).__name__
