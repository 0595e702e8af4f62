"""ResNet-50 and -101 with a stem of three 3x3 convolutions, dilated for dense prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastfuse.nn import Conv2d
from fastfuse.nn.initialize import kaiming_normal_relu
from fastfuse.ops.checks import check_feature_map

__all__ = ["ResNetV1c"]

torch.fx.wrap("check_feature_map")  # recorded, not looked into

_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Stride and dilation of the four stages, by output stride.
_STAGES = {
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
}
_STEM = 64
_EXPANSION = 4


def _conv3x3(in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, added to the shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * width
        self.conv1 = Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
            if stride != 1 or in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


class ResNetV1c(nn.Module):
    """The backbone of MMSegmentation's PSPNet, DeepLabV3, DeepLabV3+, FCN and UPerNet models.

    Keys as MMSegmentation's ``ResNetV1c``: ``stem.*``, ``layerN.i.*``. With an output stride below
    32 the last stages are dilated instead of strided; a stage's first block has half the dilation
    of the others.

    Args:
        depth: 50 or 101.
        output_stride: 8, 16 or 32: of the last feature.

    Attributes:
        channels: (256, 512, 1024, 2048), of the four features.

    Shape: images (N, 3, H, W) -> four features of strides (4, 8, 8 or 16, output_stride).

    Raises:
        ValueError: another depth or output stride; images of another number of channels.

    Source: *Deep Residual Learning for Image Recognition*; the stem is that of *Bag of Tricks for
    Image Classification with Convolutional Neural Networks* ("C").

    >>> import torch, fastfuse
    >>> backbone = fastfuse.models.ResNetV1c(50, output_stride=8).eval()
    >>> [tuple(f.shape[1:]) for f in backbone(torch.randn(1, 3, 64, 64))]
    [(256, 16, 16), (512, 8, 8), (1024, 8, 8), (2048, 8, 8)]
    """

    channels = tuple(_EXPANSION * _STEM << i for i in range(4))

    def __init__(self, depth: int = 50, *, output_stride: int = 8) -> None:
        super().__init__()
        for argument, value, allowed in (
            ("depth", depth, _DEPTHS),
            ("output_stride", output_stride, _STAGES),
        ):
            if value not in allowed:
                listed = ", ".join(str(choice) for choice in allowed)
                raise ValueError(f"ResNetV1c: {argument} must be one of {listed}; got {value}")
        self.stem = nn.Sequential(
            _conv3x3(3, _STEM // 2, stride=2),
            nn.BatchNorm2d(_STEM // 2),
            nn.ReLU(inplace=True),
            _conv3x3(_STEM // 2, _STEM // 2),
            nn.BatchNorm2d(_STEM // 2),
            nn.ReLU(inplace=True),
            _conv3x3(_STEM // 2, _STEM),
            nn.BatchNorm2d(_STEM),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = _STEM
        for i, (blocks, (stride, dilation)) in enumerate(
            zip(_DEPTHS[depth], _STAGES[output_stride], strict=True)
        ):
            width = _STEM << i
            first = Bottleneck(in_channels, width, stride, max(dilation // 2, 1))
            in_channels = _EXPANSION * width
            rest = [Bottleneck(in_channels, width, 1, dilation) for _ in range(blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
        kaiming_normal_relu(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        check_feature_map("ResNetV1c", "images", images, channels=3)
        x = self.maxpool(self.stem(images))
        features = []
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
            features.append(x)
        return tuple(features)
