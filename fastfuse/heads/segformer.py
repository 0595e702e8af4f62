"""SegFormer's head: a projection of each level, and a 1x1 fusion of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse.heads.decode_head import DecodeHead
from fastfuse.nn import ConvUnit, MultiLevelFusion

__all__ = ["SegformerHead"]


class SegformerHead(DecodeHead):
    """Each level projected to ``channels`` by a 1x1 unit, then one 1x1 fusion of them.

    The fusion multiplies every level at its own resolution and upsamples the products: for images
    of 512 x 512 and SegFormer-B2 to B5, with 768 channels, the head takes 16.4 GMAC, where
    convolving the concatenation takes 42.1.

    Keys as MMSegmentation's: ``convs.i``, ``fusion_conv``, ``conv_seg``; ``fusion_conv.equalizer``
    only with scale_equalizer.

    Args:
        in_channels: of every level, finest first; at least two.
        channels: of each projected level and of the fused map: 256 in B0 to B5 of MMSegmentation,
            768 in B2 to B5 of the paper.
        num_classes: at least 1.
        scale_equalizer: whether the fusion equalizes the levels: see ``fastfuse.calibrate``.
        dropout: of channels, before the classifier.
        align_corners: of every upsampling, which is bilinear.
        norm: called with a number of channels, e.g. ``nn.SyncBatchNorm``.

    Shape: levels (N, in_channels[i], H_i, W_i), finest first -> logits (N, num_classes, H_0, W_0).

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range; a wrong number of levels, or of channels, named.

    Source: *SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers*.

    >>> import torch, fastfuse
    >>> head = fastfuse.heads.SegformerHead([8, 16], channels=16, num_classes=5).eval()
    >>> head([torch.randn(1, 8, 16, 16), torch.randn(1, 16, 8, 8)]).shape
    torch.Size([1, 5, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        num_classes: int = 150,
        *,
        scale_equalizer: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        if not isinstance(in_channels, Sequence) or len(in_channels) < 2:
            raise ValueError(
                "SegformerHead: in_channels must have one number per level, at least two; "
                f"got {in_channels!r}"
            )
        super().__init__(
            dict(enumerate(in_channels)), channels, num_classes, dropout, align_corners
        )
        self.convs = nn.ModuleList(ConvUnit(c, channels, 1, norm=norm) for c in in_channels)
        self.fusion_conv = MultiLevelFusion(
            [channels] * len(in_channels),
            channels,
            kernel_size=1,
            scale_equalizer=scale_equalizer,
            norm=norm,
            align_corners=align_corners,
        )
        self.initialize()

    def fuse(self, levels: list[Tensor]) -> Tensor:
        projected = [conv(level) for conv, level in zip(self.convs, levels, strict=True)]
        return self.fusion_conv(projected, levels[0].shape[2:])
