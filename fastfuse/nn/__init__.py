"""Thin modules over the ops."""

from fastfuse.nn.ced_block import CONVNEXT_KEYS, CEDBlock, LRCEDBlock, TokenMixer, conv3x3
from fastfuse.nn.conv2d import Conv2d
from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.depthwise_conv2d import DepthwiseConv2d
from fastfuse.nn.layer_norm import LayerNorm2d
from fastfuse.nn.level_fusion import LevelFusion
from fastfuse.nn.multi_level_fusion import MultiLevelFusion
from fastfuse.nn.scale_equalizer import ScaleEqualizer
from fastfuse.nn.separable import SeparableConvUnit, SeparableFusion

__all__ = [
    "CONVNEXT_KEYS",
    "CEDBlock",
    "Conv2d",
    "ConvUnit",
    "DepthwiseConv2d",
    "LRCEDBlock",
    "LayerNorm2d",
    "LevelFusion",
    "MultiLevelFusion",
    "ScaleEqualizer",
    "SeparableConvUnit",
    "SeparableFusion",
    "TokenMixer",
    "conv3x3",
]
