"""What decode heads have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastfuse.nn.composition import leaf
from fastfuse.nn.conv2d import Conv2d
from fastfuse.nn.initialize import kaiming_normal_relu
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import check_features, check_ints, feature_list
from fastfuse.ops.layout import is_channels_last, prefer_memory_format

__all__ = ["DecodeHead"]


class DecodeHead(nn.Module):
    """Features of a backbone to logits: levels chosen and checked, fused, classified.

    A head says which levels it reads (``level_channels``) and how they become one map (``fuse``).

    Args:
        level_channels: which of the features it reads, as an index from the front (0, 1, ...) or
            from the back (-1), and their channels.
        channels: of the map that is classified.
        num_classes: at least 1.
        dropout: probability of dropping a channel of that map in training, in [0, 1).
        align_corners: of the upsampling here, and of the logits' by a model.

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        level_channels: dict[int, int],
        channels: int,
        num_classes: int,
        dropout: float,
        align_corners: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_ints(name, 1, channels=channels, num_classes=num_classes)
        for channels_of_level in level_channels.values():
            check_ints(name, 1, in_channels=channels_of_level)
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must be in [0, 1); got {dropout}")
        self.level_channels = dict(level_channels)
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.conv_seg = Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout)

    def initialize(self) -> None:
        """As in MMSegmentation: Kaiming's normal distribution, and a small classifier."""
        kaiming_normal_relu(self)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def fuse(self, levels: list[Tensor]) -> Tensor:
        """The levels read, in the order of ``level_channels``, as one map of ``channels``."""
        raise NotImplementedError

    @leaf
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, finest first, (N, C_i, H_i, W_i) -> logits (N, num_classes, H, W)."""
        levels = self._select(features)
        channels_last = is_channels_last(levels)
        if levels[0].device.type == "cpu":  # every op below is at its best there
            levels = [prefer_memory_format(level, True) for level in levels]
        logits = self.conv_seg(self.dropout(self.fuse(levels)))
        return prefer_memory_format(logits, channels_last)

    def _select(self, features: Sequence[Tensor]) -> list[Tensor]:
        name = type(self).__name__
        features = feature_list(name, features)
        indices = list(self.level_channels)
        exact = len(indices) > 1 and indices == list(range(len(indices)))
        expected = max(len(indices), *(i + 1 if i >= 0 else -i for i in indices))
        if len(features) < expected or (exact and len(features) > expected):
            raise ValueError(
                f"{name}: expected {'' if exact else 'at least '}{expected} "
                f"level{'s' if expected > 1 else ''}, finest first; got {len(features)}"
            )
        levels = cast_for_autocast([features[index] for index in self.level_channels])
        check_features(name, levels)
        for (index, channels), level in zip(self.level_channels.items(), levels, strict=True):
            if level.shape[1] != channels:
                raise ValueError(
                    f"{name}: features[{index}] must have {channels} channels; "
                    f"got shape {tuple(level.shape)}"
                )
        return levels
