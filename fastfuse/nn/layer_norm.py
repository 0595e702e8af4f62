"""Layer norm over the channels of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.nn.composition import leaf
from fastfuse.ops.checks import check_ints
from fastfuse.ops.layout import defined_memory_format, is_channels_last

__all__ = ["LayerNorm2d"]


class LayerNorm2d(nn.Module):
    """Normalizes the channels of each pixel, with an affine map; keys ``weight``, ``bias``.

    Args:
        channels: C.
        eps: added to the variance.

    Shape: (N, C, H, W) -> (N, C, H, W), in the memory format of the input.

    Raises:
        TypeError: a number that is no int.
        ValueError: channels below 1, or eps not above 0.

    >>> import torch, fastfuse
    >>> fastfuse.nn.LayerNorm2d(8)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        check_ints("LayerNorm2d", 1, channels=channels)
        if not eps > 0:
            raise ValueError(f"LayerNorm2d: eps must be above 0; got {eps}")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.weight.shape[0]:
            raise ValueError(
                f"LayerNorm2d: x must be (N, C, H, W) with C = {self.weight.shape[0]}; "
                f"got shape {tuple(x.shape)}"
            )
        pixels = x.permute(0, 2, 3, 1)
        normalized = F.layer_norm(pixels, self.weight.shape, self.weight, self.bias, self.eps)
        return defined_memory_format(normalized.permute(0, 3, 1, 2), is_channels_last([x]))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
