"""Levels of different sizes, fused by one convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastfuse.nn.batch_norm import folded, normalized
from fastfuse.nn.composition import Part, leaf
from fastfuse.nn.conv2d import Conv2d, dense_padding
from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.level_fusion import EQUALIZER, LevelFusion, check_in_channels
from fastfuse.ops.fusion_conv2d import fusion_conv2d

__all__ = ["MultiLevelFusion"]


class MultiLevelFusion(ConvUnit, LevelFusion):
    """Upsample, (equalize,) concatenate, Conv2d without bias, normalization, activation.

    All of it up to the convolution is one :func:`fastfuse.fusion_conv2d`, which convolves smaller
    levels at their own resolution, unless something was done to ``conv`` or ``equalizer``: then
    they are called (:func:`fastfuse.explain` says why).

    Args:
        in_channels: channels of every level, in the order of concatenation.
        out_channels: channels of the result.
        kernel_size: odd.
        scale_equalizer: whether a :class:`ScaleEqualizer` stands before the concatenation.
        norm, activation: as in :class:`ConvUnit`.
        align_corners: of the upsampling.

    Shape: levels (N, in_channels[i], H_i, W_i) -> (N, out_channels, H, W), where (H, W) is ``size``
    or the largest height and width among the levels.

    Keys: ``conv.*``, ``bn.*``, and ``equalizer.*`` only if enabled.

    Raises:
        ValueError: in_channels empty or not positive, a wrong number of levels or channels (named).

    >>> import torch, fastfuse
    >>> fusion = fastfuse.nn.MultiLevelFusion([8, 8], 16, scale_equalizer=True)
    >>> fusion([torch.randn(2, 8, 16, 16), torch.randn(2, 8, 4, 4)]).shape
    torch.Size([2, 16, 16, 16])
    """

    parts: ClassVar = {
        "conv": Part(
            (Conv2d, nn.Conv2d),
            ("weight", "bias"),
            maybe=("bias",),
            conditions={
                "a square kernel of all channels, stride and dilation 1": (
                    lambda conv, weight, bias: dense_padding(conv, weight) is not None
                )
            },
        ),
        "equalizer": EQUALIZER,
    }

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        kernel_size: int = 3,
        *,
        scale_equalizer: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
        align_corners: bool = False,
    ) -> None:
        check_in_channels("MultiLevelFusion", in_channels)
        super().__init__(
            sum(in_channels), out_channels, kernel_size, norm=norm, activation=activation
        )
        self._set_levels(in_channels, scale_equalizer, align_corners)

    @property
    def level_conv(self) -> nn.Module:
        return self.conv

    @property
    def level_axis(self) -> int:
        return 1

    @leaf
    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor], size: Sequence[int] | None = None
    ) -> Tensor:
        levels = self._check_levels(features)
        tensors = self.read_parts()
        if isinstance(tensors, str):
            x = normalized(self.conv, self.bn, self._concatenated(levels, size))
        else:
            weight, bias, mean, std = tensors
            assert weight is not None
            pixels = sum(f.shape[0] * f.shape[2] * f.shape[3] for f in levels)
            in_weights = folded(self.bn, pixels, weight, bias)
            weight, bias = in_weights or (weight, bias)
            x = fusion_conv2d(
                levels,
                weight,
                bias,
                size=size,
                mean=mean,
                std=std,
                padding=dense_padding(self.conv, weight),
                align_corners=self.align_corners,
            )
            x = self.bn(x) if in_weights is None else x
        return self.activation(x)
