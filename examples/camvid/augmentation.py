"""Random scale, crop, flip and colour, each a function of seed, epoch and image alone.

Libraries draw from generators of the process; then what is drawn depends on what was drawn before,
and a run that goes on after an interruption is another one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.camvid.data import Split, normalized

__all__ = ["augmented", "epoch_batches", "seed_of"]

_SCALES = (0.5, 2.0)
_TRIES = 10  # until a crop has a labelled pixel: of a batch without any there is no loss
_CONTRAST = 0.3  # brightness, contrast and saturation are multiplied by 1 - 0.3 to 1 + 0.3


def seed_of(*parts: int) -> int:
    """One seed of several numbers.

    >>> seed_of(0, 1, 2) != seed_of(0, 2, 1)
    True
    """
    seed = 0
    for part in parts:
        seed = (seed * 0x9E3779B1 + part + 1) % (1 << 63)
    return seed


def augmented(
    image: Tensor, labels: Tensor, crop: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A window of an image, resized to ``crop``, perhaps mirrored, in other colours.

    The window is what a scale from 0.5 to 2 makes of ``crop``, and at most the image.

    Args:
        image: (3, H, W) uint8.
        labels: (H, W) int64.
        crop: (height, width) of the result, at most the image's.
        generator: of all that is random.

    Returns:
        The image, (3, *crop) float32, normalized, and the labels, (*crop) int64.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    scale = _SCALES[0] * (_SCALES[1] / _SCALES[0]) ** uniform(0, 1)
    window = [min(round(c / scale), n) for c, n in zip(crop, labels.shape, strict=True)]
    top, left = (int(uniform(0, n - w + 1)) for w, n in zip(window, labels.shape, strict=True))
    here = (slice(top, top + window[0]), slice(left, left + window[1]))
    x = image[:, here[0], here[1]].float()
    x = F.interpolate(x[None], crop, mode="bilinear", antialias=True)[0]
    y = F.interpolate(labels[None, None, here[0], here[1]].float(), crop, mode="nearest-exact")
    if uniform(0, 1) < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    brightness, contrast, saturation = (uniform(1 - _CONTRAST, 1 + _CONTRAST) for _ in range(3))
    x = x * brightness
    x = torch.lerp(x.mean(), x, contrast)
    x = torch.lerp(x.mean(0, keepdim=True), x, saturation)
    return normalized(x.clamp(0, 255)), y[0, 0].long()


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, split: Split, crop: tuple[int, int], seed: int, epoch: int) -> None:
        self.split, self.crop, self.seed, self.epoch = split, crop, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch, index))
        image, labels = self.split.read(index)
        if not (labels != self.split.classes).any():
            path = self.split.pairs[index][1]
            raise ValueError(f"camvid: {path} must have labelled pixels; all are void")
        for _ in range(_TRIES):
            found = augmented(image, labels, self.crop, generator)
            if (found[1] != self.split.classes).any():
                break
        return found


def epoch_batches(
    split: Split,
    crop: tuple[int, int],
    batch: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """One epoch's batches of one process, in random order; what fills none on all is left out.

    Raises:
        ValueError: fewer images than the processes' batches take.
    """
    order = torch.randperm(
        len(split), generator=torch.Generator().manual_seed(seed_of(seed, epoch))
    ).tolist()
    steps = len(order) // (batch * world)
    if not steps:
        raise ValueError(
            f"camvid: --batch times processes must be at most the {len(order)} training images; "
            f"got {batch} times {world}"
        )
    mine = order[rank : steps * batch * world : world]
    batches = [mine[i : i + batch] for i in range(0, len(mine), batch)]
    return DataLoader(
        _Augmented(split, crop, seed, epoch),
        batch_sampler=batches,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
