"""Attention in windows and in stripes: the token mixers of Swin and CSwin."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.nn.composition import Composition, Part, leaf
from fastfuse.nn.conv2d import Conv2d, depthwise_dilation
from fastfuse.nn.depthwise_conv2d import DepthwiseConv2d
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import check_feature_map, check_ints
from fastfuse.ops.window_attention import convolved_in_windows, runs_kernel, window_attention

__all__ = ["StripeAttention", "WindowAttention", "check_heads"]

HEAD_CHANNELS = 32  # in both papers
_LINEAR = Part((nn.Linear,), ("weight", "bias"), maybe=("bias",))
_LOCAL = Part(
    (DepthwiseConv2d, Conv2d, nn.Conv2d),
    ("weight", "bias"),
    maybe=("bias",),
    conditions={
        "one 3x3 kernel a channel that keeps the size": (
            lambda conv, weight, bias: (
                weight.shape[2] == 3 and depthwise_dilation(conv, weight) == 1
            )
        )
    },
)


def check_heads(op: str, channels: int, heads: int | None, multiple: int = 1) -> int:
    """The number of heads, ``channels // 32`` if it is None."""
    check_ints(op, 1, channels=channels)
    if heads is None:
        heads = channels // HEAD_CHANNELS
        if heads < 1 or channels % HEAD_CHANNELS or heads % multiple:
            unit = HEAD_CHANNELS * multiple
            raise ValueError(
                f"{op}: channels must be a multiple of {unit} where heads are not given; "
                f"got {channels}"
            )
    check_ints(op, 1, heads=heads)
    if channels % heads or heads % multiple:
        even = f", and heads of {multiple}" if multiple > 1 else ""
        raise ValueError(
            f"{op}: channels must be a multiple of heads{even}; got {channels} channels and "
            f"{heads} heads"
        )
    return heads


class WindowAttention(Composition):
    """Self-attention in windows of w x w pixels, with a bias by relative position; Swin's.

    Maps are padded with zeros at the right and below to multiples of w. 4 C^2 + 4 C + (2 w - 1)^2
    heads parameters; keys ``qkv.*``, ``proj.*``, ``relative_position_bias_table``, as Swin's.

    Args:
        channels: C.
        heads: C // 32 if None.
        window: w.
        shift: by how many pixels windows are shifted to the right and down; the map wraps around,
            and tokens see those of their own side alone.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: channels that are no multiple of heads; a window below 1, or a shift outside
            [0, w).

    Source: *Swin Transformer: Hierarchical Vision Transformer using Shifted Windows*, section 3.2.

    >>> import torch, fastfuse
    >>> fastfuse.nn.WindowAttention(64, shift=3)(torch.randn(2, 64, 9, 16)).shape
    torch.Size([2, 64, 9, 16])
    """

    parts: ClassVar = {"qkv": _LINEAR}

    def __init__(
        self, channels: int, heads: int | None = None, *, window: int = 7, shift: int = 0
    ) -> None:
        super().__init__()
        self.heads = check_heads("WindowAttention", channels, heads)
        check_ints("WindowAttention", 1, window=window)
        check_ints("WindowAttention", 0, shift=shift)
        if shift >= window:
            raise ValueError(
                f"WindowAttention: shift must be below the window, {window}; got {shift}"
            )
        self.channels, self.window, self.shift = channels, window, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        table = torch.empty((2 * window - 1) ** 2, self.heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("WindowAttention", "x", x, channels=self.channels)
        (x,) = cast_for_autocast([x])
        height, width = x.shape[2:]
        w, rows = self.window, x.permute(0, 2, 3, 1)
        tensors, qkv_bias = self.read_parts(), None
        if isinstance(tensors, str) or not runs_kernel(rows):  # what it makes of zeros it knows
            qkv = self.qkv(F.pad(rows, (0, 0, 0, -width % w, 0, -height % w)))
        else:
            weight, qkv_bias = tensors
            qkv = F.linear(rows, weight)
        mixed = window_attention(
            qkv, (w, w), heads=self.heads, shift=self.shift, qkv_bias=qkv_bias, bias=self._bias()
        )
        return self.proj(mixed[:, :height, :width]).permute(0, 3, 1, 2)

    def _bias(self) -> Tensor:
        """What is added to logits, (heads, tokens, tokens)."""
        w, extent = self.window, 2 * self.window - 1
        table = self.relative_position_bias_table.view(extent, extent, -1)
        # [y of a query, x, head, y of a key, x]: the table's row is their difference + w - 1
        bias = table.unfold(0, w, 1).unfold(1, w, 1).flip(3, 4)
        return bias.permute(2, 0, 1, 3, 4).reshape(-1, w * w, w * w)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, shift={self.shift}"


class StripeAttention(Composition):
    """Self-attention in stripes: half of the heads in vertical ones, s pixels wide, half in
    horizontal ones; CSwin's.

    Values get a depthwise 3x3 convolution of themselves inside of each stripe. Queries, keys and
    values are padded with zeros on all sides to multiples of s. 4 C^2 + 14 C parameters; keys
    ``qkv.*``, ``lepe.i.*``, ``proj.*``.

    Args:
        channels: C.
        heads: of both halves, C // 32 if None.
        stripe: s. None: one branch, in which every token sees all of its image.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: channels that are no multiple of heads, or heads of two; a stripe below 1.

    Source: *CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows*,
    sections 3.2 and 3.3.

    >>> import torch, fastfuse
    >>> fastfuse.nn.StripeAttention(64, stripe=2)(torch.randn(2, 64, 9, 16)).shape
    torch.Size([2, 64, 9, 16])
    """

    parts: ClassVar = {"qkv": _LINEAR}

    def __init__(self, channels: int, heads: int | None = None, *, stripe: int | None = 7) -> None:
        super().__init__()
        branches = 1 if stripe is None else 2
        self.heads = check_heads("StripeAttention", channels, heads, branches)
        if stripe is not None:
            check_ints("StripeAttention", 1, stripe=stripe)
        self.channels, self.stripe = channels, stripe
        self.qkv = nn.Linear(channels, 3 * channels)
        self.lepe = nn.ModuleList(DepthwiseConv2d(channels // branches, 3) for _ in range(branches))
        self.proj = nn.Linear(channels, channels)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("StripeAttention", "x", x, channels=self.channels)
        (x,) = cast_for_autocast([x])
        windows = (0, 0) if self.stripe is None else (0, self.stripe, self.stripe, 0)
        rows = x.permute(0, 2, 3, 1)
        tensors = self.read_parts()
        if isinstance(tensors, str) or not runs_kernel(rows):
            qkv = self.qkv(rows)
            mixed = window_attention(qkv, windows, heads=self.heads, centered=True)
            values = qkv[..., 2 * self.channels :].chunk(len(self.lepe), 3)
            local = [
                convolved_in_windows(v, windows[2 * i : 2 * i + 2], lepe)
                for i, (v, lepe) in enumerate(zip(values, self.lepe, strict=True))
            ]
            return self.proj(mixed + torch.cat(local, 3)).permute(0, 3, 1, 2)
        weight, qkv_bias, *local = tensors
        taps = [t.flatten(1) for t in local[::2]]
        biases = [
            tap.new_zeros(tap.shape[0]) if bias is None else bias
            for tap, bias in zip(taps, local[1::2], strict=True)
        ]
        mixed = window_attention(
            F.linear(rows, weight),
            windows,
            heads=self.heads,
            centered=True,
            qkv_bias=qkv_bias,
            local_weight=torch.cat(taps).t(),
            local_bias=torch.cat(biases),
        )
        return self.proj(mixed).permute(0, 3, 1, 2)

    def read_parts(self) -> list[Any] | str:
        tensors = super().read_parts()
        if isinstance(tensors, str):
            return tensors
        for i, lepe in enumerate(self.lepe):
            reason = _LOCAL.read(lepe, tensors)
            if reason is not None:
                return f"lepe.{i} {reason}"
        return tensors

    def extra_repr(self) -> str:
        return f"heads={self.heads}, stripe={self.stripe}"
