"""Swin's and CSwin's blocks, as CEDNet has them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.nn.ced_block import depthwise
from fastfuse.nn.composition import leaf
from fastfuse.nn.layer_norm import LayerNorm2d
from fastfuse.nn.mlp_block import MLPBlock
from fastfuse.nn.stochastic_depth import check_drop_path, drawn_keep
from fastfuse.nn.window_attention import StripeAttention, WindowAttention
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.ced_block.reference import scaled_and_added
from fastfuse.ops.checks import check_feature_map, check_ints

__all__ = ["CSwinBlock", "SwinBlock"]


class _AttentionBlock(nn.Module):
    """``x + keep * attention(LN(x))``, and then an :class:`fastfuse.nn.MLPBlock`."""

    def __init__(
        self, attention: nn.Module, channels: int, drop_path: float, recompute: bool
    ) -> None:
        super().__init__()
        check_drop_path(type(self).__name__, drop_path)
        self.norm = LayerNorm2d(channels)
        self.attention = attention
        self.mlp = MLPBlock(channels, drop_path=drop_path, recompute=recompute)
        self.drop_path = drop_path

    def _branch(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x))

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(type(self).__name__, "x", x)
        (x,) = cast_for_autocast([x])
        keep = drawn_keep(x, self.drop_path, self.training)
        branch = self._branch(x).permute(0, 2, 3, 1)
        return self.mlp(scaled_and_added(x, branch, None, keep))


class SwinBlock(_AttentionBlock):
    """Swin's block: x + attention in windows of LN(x), then an :class:`fastfuse.nn.MLPBlock`.

    12 C^2 + 13 C + (2 w - 1)^2 heads parameters; keys ``norm.*``, ``attention.*``, ``mlp.*``. With
    ``long_range``, CEDNet's for the lowest resolution, there are 54 C more, ``attention_norm.*``,
    ``dw2.*`` and ``norm2.*``: of z = LN(x), z = z + GELU(LN(attention(z))) and then
    z = z + GELU(LN(DW 7x7(z))), dilated, x + z goes to the MLP.

    Args:
        channels: C; the MLP's hidden width is 4 C.
        heads: C // 32 if None.
        window: w.
        shift: by how many pixels windows are shifted: w // 2 in every second block.
        long_range: see above.
        dilation: of the depthwise convolution.
        drop_path: the rate of stochastic depth in training, in [0, 1), drawn for each sample and
            branch.
        recompute: whether training keeps the MLP's input alone and computes the rest again.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: what :class:`fastfuse.nn.WindowAttention` raises; a dilation below 1, or
            drop_path outside [0, 1).

    Source: *Swin Transformer*, section 3.2; CEDNet, table 5.

    >>> import torch, fastfuse
    >>> fastfuse.nn.SwinBlock(64, long_range=True)(torch.randn(2, 64, 9, 9)).shape
    torch.Size([2, 64, 9, 9])
    """

    def __init__(
        self,
        channels: int,
        heads: int | None = None,
        *,
        window: int = 7,
        shift: int = 0,
        long_range: bool = False,
        dilation: int = 3,
        drop_path: float = 0.0,
        recompute: bool = True,
    ) -> None:
        check_ints("SwinBlock", 1, dilation=dilation)
        attention = WindowAttention(channels, heads, window=window, shift=shift)
        super().__init__(attention, channels, drop_path, recompute)
        self.long_range = long_range
        if long_range:
            self.attention_norm = LayerNorm2d(channels)
            self.dw2 = depthwise("SwinBlock", channels, dilation)
            self.norm2 = LayerNorm2d(channels)

    def _branch(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        if not self.long_range:
            return self.attention(z)
        z = z + F.gelu(self.attention_norm(self.attention(z)))
        return z + F.gelu(self.norm2(self.dw2(z)))


class CSwinBlock(_AttentionBlock):
    """CSwin's block: x + attention in stripes of LN(x), then an :class:`fastfuse.nn.MLPBlock`.

    12 C^2 + 23 C parameters; keys ``norm.*``, ``attention.*``, ``mlp.*``.

    Args:
        channels: C; the MLP's hidden width is 4 C.
        heads: C // 32 if None.
        stripe: width of the stripes. None: every token sees all of its image, in one branch, as at
            CEDNet's lowest resolution.
        drop_path, recompute: as a SwinBlock's.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: what :class:`fastfuse.nn.StripeAttention` raises; drop_path outside [0, 1).

    Source: *CSWin Transformer*, section 3.4; CEDNet, table 5.

    >>> import torch, fastfuse
    >>> fastfuse.nn.CSwinBlock(64, stripe=2)(torch.randn(2, 64, 9, 9)).shape
    torch.Size([2, 64, 9, 9])
    """

    def __init__(
        self,
        channels: int,
        heads: int | None = None,
        *,
        stripe: int | None = 7,
        drop_path: float = 0.0,
        recompute: bool = True,
    ) -> None:
        attention = StripeAttention(channels, heads, stripe=stripe)
        super().__init__(attention, channels, drop_path, recompute)
