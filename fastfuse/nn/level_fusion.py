"""What the fusions of several levels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastfuse.nn.composition import Composition, Part
from fastfuse.nn.conv2d import Conv2d
from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.scale_equalizer import ScaleEqualizer
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import check_features, check_size, feature_list
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

__all__ = ["LevelFusion"]


EQUALIZER = Part(
    (ScaleEqualizer,),
    ("mean", "std"),
    conditions={
        "statistics that need no gradient": (
            lambda equalizer, mean, std: not (mean.requires_grad or std.requires_grad)
        )
    },
    optional=True,
)
_UNIT = Part((ConvUnit,), ())
_FOLDED_INTO = Part((Conv2d, nn.Conv2d), ("weight",))


class LevelFusion(Composition):
    """Levels brought to one size, (equalized,) concatenated and convolved; ``forward(features,
    size=None)``.

    Attributes:
        in_channels: channels of every level, in the order of concatenation.
        equalizer: the :class:`ScaleEqualizer` before the concatenation, or None.
        align_corners: of the upsampling.
    """

    in_channels: tuple[int, ...]
    equalizer: ScaleEqualizer | None
    align_corners: bool

    def _set_levels(
        self, in_channels: Sequence[int], scale_equalizer: bool, align_corners: bool
    ) -> None:
        self.in_channels = tuple(in_channels)
        self.align_corners = align_corners
        self.equalizer = ScaleEqualizer(len(in_channels)) if scale_equalizer else None

    def _check_levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        name = type(self).__name__
        features = cast_for_autocast(feature_list(name, features))
        check_features(name, features)
        channels = tuple(f.shape[1] for f in features)
        if channels != self.in_channels:
            raise ValueError(
                f"{name}: expected levels with {self.in_channels} channels; got {channels}"
            )
        return features

    def _concatenated(self, levels: Sequence[Tensor], size: Sequence[int] | None) -> Tensor:
        """The levels brought to one size, equalized and concatenated, by the equalizer's call if it
        is not what the op assumes."""
        tensors: list[Any] = []
        if EQUALIZER.read(self.equalizer, tensors) is None:
            mean, std = tensors
            return upsample_equalize_concat(
                levels, size=size, mean=mean, std=std, align_corners=self.align_corners
            )
        size = check_size(type(self).__name__, size, levels)
        upsampled = [
            upsample_equalize_concat([level], size=size, align_corners=self.align_corners)
            for level in levels
        ]
        assert self.equalizer is not None
        return torch.cat(self.equalizer(upsampled), 1)

    @property
    def level_conv(self) -> nn.Module:
        """The convolution that the concatenated levels meet."""
        raise NotImplementedError

    @property
    def level_units(self) -> Sequence[nn.Module]:
        """The units within this one in which it stands."""
        return ()

    @property
    def level_weight(self) -> Tensor:
        """Its weight, in which the levels' channels follow each other."""
        return cast(Tensor, self.level_conv.weight)

    @property
    def level_axis(self) -> int:
        """The axis of ``level_weight`` along which the levels' channels follow each other."""
        raise NotImplementedError

    def fold_problem(self) -> str | None:
        """What keeps the equalizer from being folded into the weight: more is done than they do."""
        for name, part, child in (
            *(("the unit of the convolution", _UNIT, unit) for unit in self.level_units),
            ("the convolution", _FOLDED_INTO, self.level_conv),
            ("the equalizer", EQUALIZER, self.equalizer),
        ):
            tensors: list[Any] = []
            reason = part.read(child, tensors)
            if reason is None and any(t is not None and t.is_meta for t in tensors):
                reason = "is on the meta device"
            if reason is not None:
                return (
                    f"expected a convolution and an equalizer to which nothing was done; {name} "
                    f"{reason}: remove it, merge it or make it permanent first"
                )
        return None

    @torch.no_grad()
    def fold_equalizer(self, *, keep_mean: bool = True) -> None:
        """Divides each level's weights by its std: see ``fastfuse.fold_scale_equalizers``."""
        if self.equalizer is None:
            return
        if (problem := self.fold_problem()) is not None:
            raise ValueError(f"{type(self).__name__}: {problem}")
        std = self.equalizer.std.to(torch.float64)
        pieces = self.level_weight.split(self.in_channels, self.level_axis)
        for piece, sigma in zip(pieces, std, strict=True):
            piece.copy_(piece / sigma)
        if keep_mean:
            self.equalizer.std.fill_(1)
        else:
            self.equalizer = None


def check_in_channels(name: str, in_channels: Sequence[int]) -> None:
    if not isinstance(in_channels, Sequence) or not in_channels or min(in_channels) < 1:
        raise ValueError(
            f"{name}: in_channels must be positive, one number per level; got {in_channels!r}"
        )
