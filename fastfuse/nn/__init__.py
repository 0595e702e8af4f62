"""Thin modules over the ops."""

from fastfuse.nn.ced_block import CONVNEXT_KEYS, CEDBlock, LRCEDBlock, TokenMixer, conv3x3
from fastfuse.nn.conv2d import Conv2d
from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.depthwise_conv2d import DepthwiseConv2d
from fastfuse.nn.layer_norm import LayerNorm2d
from fastfuse.nn.level_fusion import LevelFusion
from fastfuse.nn.mlp_block import MLPBlock
from fastfuse.nn.multi_level_fusion import MultiLevelFusion
from fastfuse.nn.resnet_block import ResNetBlock
from fastfuse.nn.scale_equalizer import ScaleEqualizer
from fastfuse.nn.separable import SeparableConvUnit, SeparableFusion
from fastfuse.nn.swin_block import CSwinBlock, SwinBlock
from fastfuse.nn.window_attention import StripeAttention, WindowAttention

__all__ = [
    "CONVNEXT_KEYS",
    "CEDBlock",
    "CSwinBlock",
    "Conv2d",
    "ConvUnit",
    "DepthwiseConv2d",
    "LRCEDBlock",
    "LayerNorm2d",
    "LevelFusion",
    "MLPBlock",
    "MultiLevelFusion",
    "ResNetBlock",
    "ScaleEqualizer",
    "SeparableConvUnit",
    "SeparableFusion",
    "StripeAttention",
    "SwinBlock",
    "TokenMixer",
    "WindowAttention",
    "conv3x3",
]
