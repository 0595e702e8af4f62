"""The definition of mlp_block, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.ced_block.reference import mlp

__all__ = ["reference"]


def reference(
    x: Tensor,
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
    """``x + keep * layer_scale * MLP(LN(x))``, LN over the channels of each pixel."""
    y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), norm_weight, norm_bias, eps)
    return mlp(x, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, keep)
