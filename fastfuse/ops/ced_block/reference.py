"""The definition of ced_block, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.layout import defined_memory_format, is_channels_last

__all__ = ["mlp", "reference", "scaled_and_added"]


def scaled_and_added(
    x: Tensor, branch: Tensor, layer_scale: Tensor | None, keep: Tensor | None
) -> Tensor:
    """``x + keep * layer_scale * branch``, in x's dtype and memory format; branch (N, H, W, C)."""
    if layer_scale is not None:
        branch = branch * layer_scale
    if keep is not None:
        branch = branch * keep.to(branch.dtype)[:, None, None, None]
    output = x + branch.to(x.dtype).permute(0, 3, 1, 2)
    return defined_memory_format(output, is_channels_last([x]))


def mlp(
    x: Tensor,
    inputs: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """``x + keep * layer_scale * (fc2 GELU(fc1 inputs))``; inputs (N, H, W, C)."""
    branch = F.linear(F.gelu(F.linear(inputs, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return scaled_and_added(x, branch, layer_scale, keep)


def reference(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None = None,
    keep: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """``x + keep * layer_scale * MLP(LN(DW(x)))``, LN over the channels of each pixel."""
    channels = x.shape[1]
    y = F.conv2d(x, dw_weight, dw_bias, padding=dw_weight.shape[2] // 2, groups=channels)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (channels,), norm_weight, norm_bias, eps)
    return mlp(x, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, keep)
