"""FCN's head: convolutions on the last level, fused with that level."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastfuse.heads.decode_head import DecodeHead
from fastfuse.nn import ConvUnit, MultiLevelFusion
from fastfuse.ops.checks import check_ints

__all__ = ["FCNHead"]


class FCNHead(DecodeHead):
    """Convolutions on the last level; the auxiliary head of every model here, too.

    Keys as MMSegmentation's: ``convs.i``, ``conv_cat`` only with concat_input, ``conv_seg``;
    ``conv_cat.equalizer`` only with scale_equalizer.

    Args:
        in_channels: of the last level.
        channels: of the convolutions and of the map that is classified.
        num_classes: at least 1.
        num_convs: number of convolutions before the fusion, at least 0; with 0 and no fusion the
            level itself is classified, which then must have as many channels.
        kernel_size: of the convolutions, odd.
        concat_input: whether their result is fused with the level they started from.
        scale_equalizer: whether that fusion equalizes its levels: see ``fastfuse.calibrate``.
        dropout: of channels, before the classifier.
        align_corners: of the upsampling.
        norm: called with a number of channels, e.g. ``nn.SyncBatchNorm``.

    Shape: features, finest first, the last of them (N, in_channels, H, W) -> logits
    (N, num_classes, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range; no level, or one of other channels.

    Source: *Fully Convolutional Networks for Semantic Segmentation*.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.FCNHead(16, channels=8, num_classes=5).eval()
    >>> head([torch.randn(1, 16, 8, 8)]).shape
    torch.Size([1, 5, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        num_classes: int = 150,
        *,
        num_convs: int = 2,
        kernel_size: int = 3,
        concat_input: bool = True,
        scale_equalizer: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        check_ints("FCNHead", 0, num_convs=num_convs)
        if num_convs == 0 and in_channels != channels:
            raise ValueError(
                f"FCNHead: channels must be in_channels = {in_channels} if num_convs is 0; "
                f"got {channels}"
            )
        if scale_equalizer and not concat_input:
            raise ValueError(
                "FCNHead: scale_equalizer needs the fusion that concat_input makes; "
                "got concat_input=False"
            )
        super().__init__({-1: in_channels}, channels, num_classes, dropout, align_corners)
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(ConvUnit(c, channels, kernel_size, norm=norm) for c in widths[:-1])
        )
        self.conv_cat = (
            MultiLevelFusion(
                [in_channels, channels],
                channels,
                kernel_size,
                scale_equalizer=scale_equalizer,
                norm=norm,
                align_corners=align_corners,
            )
            if concat_input
            else None
        )
        self.initialize()

    def fuse(self, levels: list[Tensor]) -> Tensor:
        (x,) = levels
        refined = self.convs(x)
        return refined if self.conv_cat is None else self.conv_cat([x, refined], x.shape[2:])
