"""The second half of a transformer's block as a module."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.nn.ced_block import MLP_PARTS, NORM_PART
from fastfuse.nn.composition import Composition, leaf
from fastfuse.nn.layer_norm import LayerNorm2d
from fastfuse.nn.stochastic_depth import check_drop_path, drawn_keep
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.ced_block.reference import scaled_and_added
from fastfuse.ops.checks import check_feature_map, check_ints
from fastfuse.ops.mlp_block import mlp_block

__all__ = ["MLPBlock"]

_EXPANSION = 4


class MLPBlock(Composition):
    """``x + keep * fc2(GELU(fc1(LN(x))))``, the second half of Swin's and CSwin's blocks.

    8 C^2 + 7 C parameters; keys ``norm.*``, ``fc1.*``, ``fc2.*``.

    Args:
        channels: C; the MLP's hidden width is 4 C.
        drop_path: the rate of stochastic depth in training, in [0, 1), drawn for each sample.
        recompute: whether training keeps the input alone and computes the rest again.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: channels below 1, or drop_path outside [0, 1).

    >>> import torch, fastfuse
    >>> fastfuse.nn.MLPBlock(8)(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 8, 9, 9])
    """

    parts: ClassVar = {"norm": NORM_PART, **MLP_PARTS}

    def __init__(self, channels: int, *, drop_path: float = 0.0, recompute: bool = True) -> None:
        super().__init__()
        check_ints("MLPBlock", 1, channels=channels)
        check_drop_path("MLPBlock", drop_path)
        self.norm = LayerNorm2d(channels)
        self.fc1 = nn.Linear(channels, _EXPANSION * channels)
        self.fc2 = nn.Linear(_EXPANSION * channels, channels)
        self.channels = channels
        self.drop_path = drop_path
        self.recompute = recompute

    def read_parts(self) -> list[Any] | str:
        tensors = super().read_parts()
        if not isinstance(tensors, str) and len({tensor.dtype for tensor in tensors}) > 1:
            return "parameters of several dtypes"
        return tensors

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("MLPBlock", "x", x, channels=self.channels)
        keep = drawn_keep(x, self.drop_path, self.training)
        tensors = self.read_parts()
        if isinstance(tensors, str):
            (x,) = cast_for_autocast([x])
            hidden = F.gelu(self.fc1(self.norm(x).permute(0, 2, 3, 1)))
            return scaled_and_added(x, self.fc2(hidden), None, keep)
        return mlp_block(  # type: ignore[misc]
            x, *tensors, keep=keep, eps=self.norm.eps, recompute=self.recompute
        )

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}"
