"""Attention in windows and in stripes: the token mixers of Swin and CSwin."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfuse.backends import (
    cpu_refusal,
    is_differentiated_otherwise,
    is_transformed,
    requested_backend,
)
from fastfuse.nn.composition import leaf
from fastfuse.nn.depthwise_conv2d import DepthwiseConv2d
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import check_feature_map, check_ints
from fastfuse.ops.gather_rows import gather_rows

__all__ = ["StripeAttention", "WindowAttention", "check_heads"]

HEAD_CHANNELS = 32  # in both papers
_SIZES = 32  # of which masks and places of windows are kept: a stage has three
_OUTSIDE = -100.0  # added to logits of tokens of another region: e^-100 of float64 is nothing


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


def _shifted_mask(
    height: int, width: int, window: int, shift: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What shifted windows add to logits, (windows, 1, tokens, tokens): the last ones hold regions
    that do not touch in the image."""

    def regions(extent: int) -> Tensor:
        position = torch.arange(extent, device=device)
        return (position >= extent - window).long() + (position >= extent - shift).long()

    region = 3 * regions(height)[:, None] + regions(width)
    tiles = _cut(region[None, :, :, None], window).mT
    return (tiles[..., None] != tiles[..., None, :]).to(dtype) * _OUTSIDE


class _Places(NamedTuple):
    """Where rows of an image's pixels and tokens of its windows come from, and which are zero."""

    of_tokens: Tensor
    padded: Tensor
    of_pixels: Tensor
    none: Tensor

    def cut(self, pixels: Tensor) -> Tensor:
        return gather_rows["cpu"](pixels, *self)

    def join(self, tokens: Tensor) -> Tensor:
        return gather_rows["cpu"](tokens, self.of_pixels, self.none, self.of_tokens, self.padded)


def _places(batch: int, height: int, width: int, window: int, shift: int) -> _Places:
    w, size = window, batch * height * width
    pixels = torch.arange(size, device="cpu").view(batch, height, width, 1)
    rows = _rolled(F.pad(pixels, (0, 0, 0, -width % w, 0, -height % w), value=-1), -shift)
    of_tokens = _cut(rows, w).flatten()
    padded = (of_tokens < 0).nonzero().flatten()
    of_pixels = torch.empty(size, dtype=torch.int64, device="cpu")
    of_pixels[of_tokens[of_tokens >= 0]] = (of_tokens >= 0).nonzero().flatten()
    return _Places(of_tokens.clamp_(min=0), padded, of_pixels, padded[:0])


@lru_cache(_SIZES)
def _kept(make: Callable[..., Any], *arguments: Any) -> Any:
    with torch.inference_mode(False):  # for training too
        return make(*arguments)


def _rolled(rows: Tensor, shift: int) -> Tensor:
    return rows.roll((shift, shift), (1, 2)) if shift else rows


def _cut(rows: Tensor, window: int) -> Tensor:
    """(N, H, W, C) -> (N windows, tokens, C)."""
    tiles = rows.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    return tiles.reshape(-1, window * window, rows.shape[3])


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's; by its definition where the reference runs, which has all derivatives."""
    if not torch.compiler.is_compiling() and (
        requested_backend() == "reference" or is_differentiated_otherwise()
    ):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, bias)


class WindowAttention(nn.Module):
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
        batch, channels, height, width = x.shape
        w, rows = self.window, x.permute(0, 2, 3, 1)
        padded = height + -height % w, width + -width % w
        places = None
        if self._moves_rows(rows):
            places = _kept(_places, batch, height, width, w, self.shift)
            tokens = places.cut(rows.reshape(-1, channels)).view(-1, w * w, channels)
        else:
            if padded != (height, width):
                rows = F.pad(rows, (0, 0, 0, -width % w, 0, -height % w))
            tokens = _cut(_rolled(rows, -self.shift), w)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._bias(batch, *padded, q)
        tokens = _attention(q, k, v, bias).transpose(1, 2)
        if places is not None:
            rows = places.join(tokens.reshape(-1, channels)).view(batch, height, width, channels)
        else:
            tiles = tokens.reshape(batch, padded[0] // w, padded[1] // w, w, w, channels)
            rows = _rolled(tiles.transpose(2, 3).reshape(batch, *padded, channels), self.shift)
        return self.proj(rows[:, :height, :width]).permute(0, 3, 1, 2)

    @staticmethod
    def _moves_rows(rows: Tensor) -> bool:
        """Whether by one gather: in graphs that are captured compilers fuse the passes."""
        if _is_captured(rows) or is_transformed() or requested_backend() == "reference":
            return False
        return cpu_refusal(rows) is None

    def _bias(self, batch: int, height: int, width: int, q: Tensor) -> Tensor:
        """What is added to logits, (1, heads, tokens, tokens), or with a shift of all windows."""
        w, extent = self.window, 2 * self.window - 1
        table = self.relative_position_bias_table.to(q.dtype).view(extent, extent, -1)
        # [y of a query, x, head, y of a key, x]: the table's row is their difference + w - 1
        bias = table.unfold(0, w, 1).unfold(1, w, 1).flip(3, 4)
        bias = bias.permute(2, 0, 1, 3, 4).reshape(1, -1, w * w, w * w)
        if not self.shift:
            return bias
        arguments = height, width, w, self.shift, q.device, q.dtype
        captured = _is_captured(q)
        mask = _shifted_mask(*arguments) if captured else _kept(_shifted_mask, *arguments)
        return bias + (mask if batch == 1 else mask.repeat(batch, 1, 1, 1))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, shift={self.shift}"


def _is_captured(x: Tensor) -> bool:
    """Whether tensors stand for others, as in a graph: what is made of them is not to be kept."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor


class StripeAttention(nn.Module):
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
        height, width = x.shape[2:]
        s, heads = self.stripe, self.heads // len(self.lepe)
        extents = ((height, width),) if s is None else ((height, s), (s, width))
        qkv = self.qkv(x.permute(0, 2, 3, 1)).unflatten(3, (3, len(self.lepe), heads, -1))
        mixed = [
            _in_stripes(qkv[..., i, :, :], extent, lepe)
            for i, (extent, lepe) in enumerate(zip(extents, self.lepe, strict=True))
        ]
        return self.proj(mixed[0] if s is None else torch.cat(mixed, 3)).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, stripe={self.stripe}"


def _in_stripes(qkv: Tensor, extent: tuple[int, int], lepe: nn.Module) -> Tensor:
    """Attention of (N, H, W, 3, heads, d) inside of stripes of an extent, (N, H, W, C)."""
    rows, columns = extent
    height, width, _, heads, size = qkv.shape[1:]
    down, right = -height % rows, -width % columns
    top, left = down // 2, right // 2
    if down or right:
        qkv = F.pad(qkv, (0,) * 6 + (left, right - left, top, down - top))
    batch, padded_height, padded_width = qkv.shape[:3]
    tiles = qkv.view(
        batch, padded_height // rows, rows, padded_width // columns, columns, 3, heads, size
    ).transpose(2, 3)
    tokens = tiles.reshape(-1, rows * columns, 3, heads, size)  # no copy where stripes are rows
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    mixed = _attention(q, k, v).transpose(1, 2).flatten(2)
    values = tokens[:, :, 2].reshape(-1, rows, columns, heads * size).permute(0, 3, 1, 2)
    mixed = mixed + lepe(values).permute(0, 2, 3, 1).flatten(1, 2)
    tiles = mixed.view(*tiles.shape[:5], heads * size).transpose(2, 3)
    image = tiles.reshape(batch, padded_height, padded_width, heads * size)
    return image[:, top : top + height, left : left + width]
