"""Levels of different sizes, fused by one convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.scale_equalizer import ScaleEqualizer
from fastfuse.ops.checks import check_features, feature_list
from fastfuse.ops.fusion_conv2d import fusion_conv2d

__all__ = ["MultiLevelFusion"]


class MultiLevelFusion(ConvUnit):
    """Upsample, (equalize,) concatenate, Conv2d without bias, normalization, activation.

    All of it up to the convolution is one :func:`fastfuse.fusion_conv2d`, which convolves smaller
    levels at their own resolution.

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

    equalizer: ScaleEqualizer | None

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
        if not isinstance(in_channels, Sequence) or not in_channels or min(in_channels) < 1:
            raise ValueError(
                "MultiLevelFusion: in_channels must be positive, one number per level; "
                f"got {in_channels!r}"
            )
        super().__init__(
            sum(in_channels), out_channels, kernel_size, norm=norm, activation=activation
        )
        self.in_channels = tuple(in_channels)
        self.align_corners = align_corners
        self.equalizer = ScaleEqualizer(len(in_channels)) if scale_equalizer else None

    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor], size: Sequence[int] | None = None
    ) -> Tensor:
        features = feature_list("MultiLevelFusion", features)
        check_features("MultiLevelFusion", features)
        channels = tuple(f.shape[1] for f in features)
        if channels != self.in_channels:
            raise ValueError(
                f"MultiLevelFusion: expected levels with {self.in_channels} channels; "
                f"got {channels}"
            )
        fused = fusion_conv2d(
            features,
            self.conv.weight,
            size=size,
            mean=self.equalizer.mean if self.equalizer else None,
            std=self.equalizer.std if self.equalizer else None,
            align_corners=self.align_corners,
        )
        return self.activation(self.bn(fused))
