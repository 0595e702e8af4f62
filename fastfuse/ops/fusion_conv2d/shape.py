"""What a fusion is, but for its tensors; its equalization; and what its backward finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import steps_of

__all__ = ["Equalization", "FusionShape", "Gradients"]


@dataclass(frozen=True)
class FusionShape:
    """Everything about a fusion but its tensors: what both schemas name, built where they end.

    Attributes:
        channels, sizes: of every level.
        size: the target's.
    """

    batch: int
    channels: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    out_channels: int
    size: tuple[int, int]
    kernel_size: int
    padding: int
    align_corners: bool

    @classmethod
    def of(
        cls,
        features: Sequence[Tensor],
        weight: Tensor,
        height: int,
        width: int,
        padding: int,
        align_corners: bool,
    ) -> FusionShape:
        """Of the arguments of forward."""
        return cls(
            features[0].shape[0],
            tuple(f.shape[1] for f in features),
            tuple((f.shape[2], f.shape[3]) for f in features),
            weight.shape[0],
            (height, width),
            weight.shape[2],
            padding,
            align_corners,
        )

    @classmethod
    def of_gradient(
        cls,
        grad_output: Tensor,
        channels: Sequence[int],
        heights: Sequence[int],
        widths: Sequence[int],
        height: int,
        width: int,
        kernel_size: int,
        padding: int,
        align_corners: bool,
    ) -> FusionShape:
        """Of the arguments of backward: the gradient of the result, and :attr:`arguments`."""
        batch, out_channels = grad_output.shape[:2]
        sizes = tuple(zip(heights, widths, strict=True))
        return cls(
            batch, tuple(channels), sizes, out_channels, (height, width), kernel_size, padding,
            align_corners,
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[object, ...]:
        """As the schema of backward has them."""
        heights, widths = ([size[i] for size in self.sizes] for i in range(2))
        return (
            list(self.channels), heights, widths, *self.size, self.kernel_size, self.padding,
            self.align_corners,
        )  # fmt: skip

    def of_levels(self, levels: Sequence[int]) -> FusionShape:
        """The fusion of some of the levels."""
        return FusionShape(
            self.batch, tuple(self.channels[i] for i in levels),
            tuple(self.sizes[i] for i in levels), self.out_channels, self.size, self.kernel_size,
            self.padding, self.align_corners,
        )  # fmt: skip

    @property
    def out_size(self) -> tuple[int, int]:
        margin = 2 * self.padding - (self.kernel_size - 1)
        return self.size[0] + margin, self.size[1] + margin

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, *self.out_size

    @property
    def out_pixels(self) -> int:
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def tap_arguments(self) -> tuple[int, int, int, int, bool, bool]:
        """What every tap_sum op ends with; channels_last."""
        return (*self.size, self.kernel_size, self.padding, self.align_corners, True)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, sum(self.channels), self.kernel_size, self.kernel_size

    def level_shape(self, level: int) -> tuple[int, int, int, int]:
        return self.batch, self.channels[level], *self.sizes[level]

    def slice_of(self, level: int) -> slice:
        """A level's channels among those of the weight."""
        start = sum(self.channels[:level])
        return slice(start, start + self.channels[level])


@dataclass(frozen=True)
class Equalization:
    """mean and 1 / std, one value per level in the accumulation dtype, None for 0 and 1."""

    mean: Tensor | None
    inverse_std: Tensor | None

    @classmethod
    def of(cls, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Equalization:
        accumulation = accumulation_dtype(dtype)
        return cls(
            None if mean is None else mean.to(accumulation),
            None if std is None else _inverse(std, accumulation),
        )

    def mean_and_std(self, levels: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Of some levels; picked one by one, for a list of indices is a host copy."""
        mean = None if self.mean is None else torch.stack([self.mean[i] for i in levels])
        if self.inverse_std is None:
            return mean, None
        return mean, torch.stack([self.inverse_std[i] for i in levels]).reciprocal()

    def scale(self, level: int) -> Tensor | None:
        """1 / std of one level, of shape (1,)."""
        return None if self.inverse_std is None else self.inverse_std[level : level + 1]

    def center(self, level: int) -> Tensor | None:
        """The mean of one level, of shape (1,)."""
        return None if self.mean is None else self.mean[level : level + 1]

    def centered(self, feature: Tensor, level: int) -> Tensor:
        """A channels_last feature less the mean of its level, rounded once."""
        center = self.center(level)
        if center is None:
            return feature
        _, channels, *size = feature.shape
        return steps_of(feature.device.type).upsample_equalize_concat(
            [feature], *size, center, None, False,
            channels > 1,  # one channel is contiguous too, which PyTorch's sums of products prefer
        )  # fmt: skip


def _inverse(std: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / std, rounded to a dtype. (What float64 gives of float32, which has less than half its
    digits, rounds to what float32 gives.)"""
    if std.dtype != dtype:
        std = std.to(torch.float64)
    return std.reciprocal().to(dtype)


@dataclass
class Gradients:
    """What backward is asked for, and what of it was found.

    Attributes:
        levels: whose gradients are wanted.
        weight: memory for the weight's, (C_out, sum C_i, k, k), if that is wanted.
        found: the levels' gradients, channels_last, by level.
    """

    shape: FusionShape
    levels: tuple[int, ...]
    weight: Tensor | None
    found: dict[int, Tensor] = field(default_factory=dict)

    def wanted_of(self, levels: Sequence[int]) -> list[int]:
        return [i for i in levels if i in self.levels]

    def write_weight(self, level: int, outputs: slice, taps: Tensor) -> None:
        """A level's, of some outputs, tap-major: (k * k, outputs, inputs) in any view of it."""
        assert self.weight is not None
        target = self.weight[outputs, self.shape.slice_of(level)].permute(2, 3, 0, 1)
        target.copy_(taps.reshape(target.shape))
