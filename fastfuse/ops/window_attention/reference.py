"""The definition of window_attention, in plain PyTorch; what runs on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfuse.backends import is_differentiated_otherwise, requested_backend

__all__ = ["convolved_in_windows", "reference"]

_APART = -100.0  # added to logits of tokens of another region: e^-100 of float64 is nothing


def reference(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    local_weight: Tensor | None,
    local_bias: Tensor | None,
    heads: int,
    windows: Sequence[int],
    shift: int,
    centered: bool,
) -> Tensor:
    height, width, channels = qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    branches = len(windows) // 2
    if qkv_bias is not None:
        qkv_bias = qkv_bias.to(qkv.dtype)
        qkv = qkv + qkv_bias
    padding = None if centered else qkv_bias
    mixed = []
    for i in range(branches):
        extent = _Extent.of(height, width, windows[2 * i : 2 * i + 2], shift, centered)
        share = slice(i * channels // branches, (i + 1) * channels // branches)
        weight, offset = (None if t is None else t[..., share] for t in (local_weight, local_bias))
        of_branch = [_of_branch(t, share, branches) for t in (qkv, padding)]
        mixed.append(
            _mixed(of_branch[0], of_branch[1], bias, weight, offset, heads // branches, extent)
        )
    return mixed[0] if branches == 1 else torch.cat(mixed, 3)


def _of_branch(t: Tensor | None, share: slice, branches: int) -> Tensor | None:
    """Queries, keys and values of some of the channels."""
    if t is None or branches == 1:
        return t
    return t.unflatten(-1, (3, -1))[..., share].flatten(-2)


class _Extent(NamedTuple):
    """Windows over a map with padding on each side."""

    tall: int
    wide: int
    height: int
    width: int
    top: int
    left: int
    shift: int

    @staticmethod
    def of(height: int, width: int, window: Sequence[int], shift: int, centered: bool) -> _Extent:
        tall, wide = (a or b for a, b in zip(window, (height, width), strict=True))
        down, right = -height % tall, -width % wide
        top, left = (down // 2, right // 2) if centered else (0, 0)
        return _Extent(tall, wide, height + down, width + right, top, left, shift)

    def cut(self, rows: Tensor) -> Tensor:
        """(N, height, width, C) -> (N windows, tokens, C)."""
        rows = self.rolled(rows, -self.shift)
        n, (h, w) = rows.shape[0], (self.height // self.tall, self.width // self.wide)
        tiles = rows.view(n, h, self.tall, w, self.wide, rows.shape[3]).transpose(2, 3)
        return tiles.reshape(n * h * w, self.tall * self.wide, rows.shape[3])

    def join(self, tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
        """The inverse, without padding."""
        h, w = self.height // self.tall, self.width // self.wide
        tiles = tokens.reshape(batch, h, w, self.tall, self.wide, tokens.shape[2]).transpose(2, 3)
        rows = tiles.reshape(batch, self.height, self.width, tokens.shape[2])
        rows = self.rolled(rows, self.shift)
        return rows[:, self.top : self.top + height, self.left : self.left + width]

    @staticmethod
    def rolled(rows: Tensor, shift: int) -> Tensor:
        return rows.roll((shift, shift), (1, 2)) if shift else rows

    def convolved(self, tokens: Tensor, convolution: Callable[[Tensor], Tensor]) -> Tensor:
        """Of (windows, tokens, C), each window an image."""
        tiles = tokens.unflatten(1, (self.tall, self.wide)).permute(0, 3, 1, 2)
        return convolution(tiles).permute(0, 2, 3, 1).flatten(1, 2)

    def mask(self, like: Tensor) -> Tensor:
        """What shifted windows add to logits, (windows, 1, tokens, tokens): the last ones hold
        regions that do not touch in the image."""

        def regions(extent: int, size: int) -> Tensor:
            position = torch.arange(extent, device=like.device)
            return (position >= extent - size).long() + (position >= extent - self.shift).long()

        region = 3 * regions(self.height, self.tall)[:, None] + regions(self.width, self.wide)
        tiles = self._replace(shift=0).cut(region[None, :, :, None]).mT
        return (tiles[..., None] != tiles[..., None, :]).to(like.dtype) * _APART


def _padded(rows: Tensor, padding: Tensor | None, extent: _Extent) -> Tensor:
    batch, height, width, channels = rows.shape
    down, right = extent.height - height, extent.width - width
    if padding is None:
        top, left = extent.top, extent.left
        return F.pad(rows, (0, 0, left, right - left, top, down - top)) if down or right else rows
    if right:
        rows = torch.cat([rows, padding.expand(batch, height, right, channels)], 2)
    if down:
        rows = torch.cat([rows, padding.expand(batch, down, width + right, channels)], 1)
    return rows


def _mixed(
    qkv: Tensor | None,
    padding: Tensor | None,
    bias: Tensor | None,
    local_weight: Tensor | None,
    local_bias: Tensor | None,
    heads: int,
    extent: _Extent,
) -> Tensor:
    assert qkv is not None
    batch, height, width, channels = qkv.shape
    channels //= 3
    tokens = extent.cut(_padded(qkv, padding, extent))
    q, k, v = tokens.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if bias is not None:
        bias = bias.to(qkv.dtype)[None]
    if extent.shift:
        mask = extent.mask(q)
        mask = mask if batch == 1 else mask.repeat(batch, 1, 1, 1)
        bias = mask if bias is None else bias + mask
    mixed = _attention(q, k, v, bias).transpose(1, 2).flatten(2)
    if local_weight is not None:
        weight = local_weight.to(qkv.dtype).t().reshape(channels, 1, 3, 3)
        given = None if local_bias is None else local_bias.to(qkv.dtype)
        mixed = mixed + extent.convolved(
            tokens[:, :, 2 * channels :],
            lambda x: F.conv2d(x, weight, given, padding=1, groups=channels),
        )
    return extent.join(mixed, batch, height, width)


def convolved_in_windows(
    values: Tensor, window: Sequence[int], convolution: Callable[[Tensor], Tensor]
) -> Tensor:
    """Of (N, H, W, C), by what takes (windows, C, height, width)."""
    batch, height, width, _ = values.shape
    extent = _Extent.of(height, width, window, 0, True)
    tokens = extent.cut(_padded(values, None, extent))
    return extent.join(extent.convolved(tokens, convolution), batch, height, width)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's; by its definition where the reference runs, which has all derivatives."""
    if not torch.compiler.is_compiling() and (
        requested_backend() == "reference" or is_differentiated_otherwise()
    ):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, bias)
