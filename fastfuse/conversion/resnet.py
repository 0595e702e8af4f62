"""Residual blocks of torchvision, which segmentation_models_pytorch has too, and of timm: while a
batch norm evaluates, it is in the weights of the convolution before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastfuse.conversion.pattern import register_pattern
from fastfuse.nn.batch_norm import normalized

_TORCHVISION, _TIMM = "torchvision.models.resnet", "timm.models.resnet"


@register_pattern(f"{_TORCHVISION}:BasicBlock")
def torchvision_basic(self: Any, x: Tensor) -> Tensor:
    out = self.relu(normalized(self.conv1, self.bn1, x))
    out = normalized(self.conv2, self.bn2, out)
    out += x if self.downsample is None else self.downsample(x)
    return self.relu(out)


@register_pattern(f"{_TORCHVISION}:Bottleneck")
def torchvision_bottleneck(self: Any, x: Tensor) -> Tensor:
    out = self.relu(normalized(self.conv1, self.bn1, x))
    out = self.relu(normalized(self.conv2, self.bn2, out))
    out = normalized(self.conv3, self.bn3, out)
    out += x if self.downsample is None else self.downsample(x)
    return self.relu(out)


def _timm_sum(self: Any, x: Tensor, shortcut: Tensor) -> Tensor:
    if self.se is not None:
        x = self.se(x)
    if self.drop_path is not None:
        x = self.drop_path(x)
    x += shortcut if self.downsample is None else self.downsample(shortcut)
    return x


@register_pattern(f"{_TIMM}:BasicBlock")
def timm_basic(self: Any, x: Tensor) -> Tensor:
    out = self.act1(self.drop_block(normalized(self.conv1, self.bn1, x)))
    out = normalized(self.conv2, self.bn2, self.aa(out))
    return self.act2(_timm_sum(self, out, x))


@register_pattern(f"{_TIMM}:Bottleneck")
def timm_bottleneck(self: Any, x: Tensor) -> Tensor:
    out = self.act1(normalized(self.conv1, self.bn1, x))
    out = self.act2(self.drop_block(normalized(self.conv2, self.bn2, out)))
    out = normalized(self.conv3, self.bn3, self.aa(out))
    return self.act3(_timm_sum(self, out, x))
