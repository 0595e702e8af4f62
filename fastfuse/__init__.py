"""Fused kernels for multi-level feature fusion in dense-prediction networks.

>>> import torch, fastfuse
>>> levels = [torch.randn(1, 16, 64 >> i, 64 >> i) for i in range(4)]
>>> fused = fastfuse.upsample_equalize_concat(levels, std=[0.9, 0.8, 0.7, 0.6])
"""

import importlib.metadata

from fastfuse import heads, models, nn
from fastfuse._info import Info, info
from fastfuse.backends import BackendError, backend
from fastfuse.calibration import BranchStatistics, calibrate
from fastfuse.calibration.folding import fold_scale_equalizers
from fastfuse.calibration.statistics_file import load_calibration, save_calibration
from fastfuse.conversion import ConversionReport, convert, revert
from fastfuse.conversion.pattern import register_pattern
from fastfuse.conversion.plain import plain
from fastfuse.nn.composition import explain
from fastfuse.ops.ced_block import ced_block
from fastfuse.ops.depthwise_conv2d import depthwise_conv2d
from fastfuse.ops.fusion_conv2d import fusion_conv2d
from fastfuse.ops.lr_ced_block import lr_ced_block
from fastfuse.ops.tap_sum import tap_sum
from fastfuse.ops.upsample_add import upsample_add
from fastfuse.ops.upsample_argmax import upsample_argmax
from fastfuse.ops.upsample_cross_entropy import upsample_cross_entropy
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

try:
    __version__ = importlib.metadata.version("fastfuse")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "BackendError",
    "BranchStatistics",
    "ConversionReport",
    "Info",
    "backend",
    "calibrate",
    "ced_block",
    "convert",
    "depthwise_conv2d",
    "explain",
    "fold_scale_equalizers",
    "fusion_conv2d",
    "heads",
    "info",
    "load_calibration",
    "lr_ced_block",
    "models",
    "nn",
    "plain",
    "register_pattern",
    "revert",
    "save_calibration",
    "tap_sum",
    "upsample_add",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_equalize_concat",
]
