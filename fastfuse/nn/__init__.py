"""Thin modules over the ops."""

from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.multi_level_fusion import MultiLevelFusion
from fastfuse.nn.scale_equalizer import ScaleEqualizer

__all__ = ["ConvUnit", "MultiLevelFusion", "ScaleEqualizer"]
