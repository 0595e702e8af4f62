"""The definition of lr_ced_block, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.ced_block.reference import mlp

__all__ = ["reference"]


def reference(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None = None,
    keep: Tensor | None = None,
    dilation: int = 3,
    eps: float = 1e-6,
) -> Tensor:
    """``x + keep * layer_scale * MLP(z)`` with

    ``y = x + GELU(LN(DW(x)))`` and ``z = y + GELU(LN(DW dilated(y)))``.
    """
    channels = x.shape[1]

    def step(
        image: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor], d: int
    ) -> Tensor:
        reach = d * (weight.shape[2] // 2)
        y = F.conv2d(image, weight, bias, padding=reach, dilation=d, groups=channels)
        y = F.layer_norm(y.permute(0, 2, 3, 1), (channels,), *norm, eps)
        return image + F.gelu(y).permute(0, 3, 1, 2)

    y = step(x, dw_weight, dw_bias, (norm_weight, norm_bias), 1)
    z = step(y, dw2_weight, dw2_bias, (norm2_weight, norm2_bias), dilation)
    z = z.permute(0, 2, 3, 1)
    return mlp(x, z, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, keep)
