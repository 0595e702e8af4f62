"""What a fusion is, but for its tensors, and what is done for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfuse.ops.fusion_conv2d import winograd
from fastfuse.ops.fusion_conv2d.plan import Plan, make_plan
from fastfuse.ops.policy import policy_of

__all__ = ["Constants", "Geometry", "geometry", "geometry_of"]


@dataclass(frozen=True)
class Geometry:
    """Everything about a fusion but its tensors."""

    channels: tuple[int, ...]  # per level
    sizes: tuple[tuple[int, int], ...]
    out_channels: int
    size: tuple[int, int]
    kernel_size: int
    padding: int
    align_corners: bool
    plan: Plan
    winograd: bool  # what is convolved at the target's resolution, is by Winograd's algorithm

    @property
    def out_size(self) -> tuple[int, int]:
        margin = 2 * self.padding - (self.kernel_size - 1)
        return self.size[0] + margin, self.size[1] + margin

    @property
    def tap_arguments(self) -> tuple[int, int, int, int, bool, bool]:
        """What every tap_sum op ends with; channels_last."""
        return (*self.size, self.kernel_size, self.padding, self.align_corners, True)

    @property
    def is_product(self) -> bool:
        """Whether the convolution at the target's resolution is one matrix product."""
        return self.kernel_size == 1 and self.padding == 0

    @property
    def equalizes_first(self) -> bool:
        """Whether what is convolved at the target's resolution is upsampled, equalized and
        concatenated first: levels of other sizes, or several where the convolution takes one."""
        resized = any(self.sizes[i] != self.size for i in self.plan.target)
        return resized or (len(self.plan.target) > 1 and not self.winograd)

    def described(self, like: Tensor) -> str:
        """What is done where, in words, for images like one."""
        work = policy_of(like.device.type).multiplies(like.dtype)
        name = str(work).removeprefix("torch.")
        parts = []
        for i, (height, width) in enumerate(self.sizes):
            if i in self.plan.own:
                where = f"at its own resolution in {name}"
            elif self.winograd:  # float32 for all narrower
                wide = torch.promote_types(work, torch.float32)
                where = f"by Winograd's F(4x4, 3x3) in {str(wide).removeprefix('torch.')}"
            elif self.is_product:
                where = f"by torch.mm in {name}"
            else:
                where = f"by the library's convolution in {name}"
            parts.append(f"{height}x{width} {where}")
        return ", ".join(parts)

    def slice_of(self, level: int) -> slice:
        start = sum(self.channels[:level])
        return slice(start, start + self.channels[level])


def geometry(
    like: Tensor,
    channels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    out_channels: int,
    size: tuple[int, int],
    kernel_size: int,
    padding: int,
    align_corners: bool,
) -> Geometry:
    """What is done for tensors like one, by static rules."""
    rule = (like.device.type, like.dtype)
    margin = 2 * padding - (kernel_size - 1)
    pixels = like.shape[0] * (size[0] + margin) * (size[1] + margin)

    def by_winograd(levels: Sequence[int]) -> bool:
        inputs = sum(channels[i] for i in levels)
        return winograd.applies(*rule, inputs, out_channels, pixels, kernel_size, padding)

    def plan(fewer_products: bool) -> Plan:
        policy = policy_of(like.device.type)
        return make_plan(channels, sizes, out_channels, size, kernel_size, fewer_products, policy)

    chosen = plan(True)
    use = by_winograd(chosen.target)
    if not use:
        chosen = plan(False)
    return Geometry(
        tuple(channels), tuple(sizes), out_channels, size, kernel_size, padding, align_corners,
        chosen, use,
    )  # fmt: skip


def geometry_of(
    features: Sequence[Tensor],
    weight: Tensor,
    size: tuple[int, int],
    padding: int,
    align_corners: bool,
) -> Geometry:
    """The same for features and a weight."""
    return geometry(
        features[0],
        [f.shape[1] for f in features],
        [(f.shape[2], f.shape[3]) for f in features],
        weight.shape[0],
        size,
        weight.shape[2],
        padding,
        align_corners,
    )


@dataclass(frozen=True)
class Constants:
    """mean and 1 / std, one value per level in the accumulation dtype, None for 0 and 1."""

    mean: Tensor | None
    inverse_std: Tensor | None

    @classmethod
    def of(cls, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Constants:
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            None if mean is None else mean.to(wide),
            None if std is None else std.to(torch.float64).reciprocal().to(wide),
        )

    def of_levels(self, levels: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """mean and std of some levels; picked one by one, for a list of indices is a host copy."""
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
