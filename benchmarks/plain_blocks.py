"""Blocks of CEDNet's table 5 in plain PyTorch: ResNet's, Swin's and CSwin's.

Composed as their authors do, with keys of ``fastfuse.nn``: maps padded, rolled and cut into windows
by passes of their own, masks once a size, attention by PyTorch's scaled_dot_product_attention.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CSwinBlock", "Norm", "ResNetBlock", "SwinBlock", "depthwise"]

EPS = 1e-6
HEAD = 32  # channels of one
WINDOW, SHIFT = 7, 3


class Norm(nn.Module):
    """Layer norm of a pixel's channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, EPS)
        return y.permute(0, 3, 1, 2)


def depthwise(channels: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        channels, channels, 7, padding=3 * dilation, dilation=dilation, groups=channels
    )


class MLP(nn.Module):
    """x + MLP(LN(x)); its products as linear layers or as 1x1 convolutions."""

    def __init__(self, channels: int, mlp: str) -> None:
        super().__init__()
        self.mlp, self.norm = mlp, Norm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.mlp == "linear":
            return x + self.fc2(F.gelu(self.fc1(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        y = F.gelu(F.conv2d(y, self.fc1.weight[:, :, None, None], self.fc1.bias))
        return x + F.conv2d(y, self.fc2.weight[:, :, None, None], self.fc2.bias)


def cut(rows: Tensor, tall: int, wide: int) -> Tensor:
    """(N, H, W, C) -> (N windows, tall wide, C)."""
    n, h, w, c = rows.shape
    tiles = rows.view(n, h // tall, tall, w // wide, wide, c).transpose(2, 3)
    return tiles.reshape(-1, tall * wide, c)


def joined(tokens: Tensor, tall: int, wide: int, h: int, w: int) -> Tensor:
    """The inverse."""
    tiles = tokens.view(-1, h // tall, w // wide, tall, wide, tokens.shape[2])
    return tiles.transpose(2, 3).reshape(-1, h, w, tokens.shape[2])


def mask(h: int, w: int, tokens: Tensor) -> Tensor:
    """Of shifted windows, (windows, 1, tokens, tokens); kept, where tensors are what they seem."""
    make = _mask if type(tokens) is Tensor else _mask.__wrapped__
    return make(h, w, tokens.dtype)


@lru_cache(32)
def _mask(h: int, w: int, dtype: torch.dtype) -> Tensor:
    regions = torch.zeros(1, h, w, 1)
    slices = (slice(0, -WINDOW), slice(-WINDOW, -SHIFT), slice(-SHIFT, None))
    for i, rows in enumerate(slices):
        for j, columns in enumerate(slices):
            regions[:, rows, columns] = 3 * i + j
    tiles = cut(regions, WINDOW, WINDOW)[..., 0]
    apart = tiles[:, None] != tiles[:, :, None]
    return torch.zeros(apart.shape, dtype=dtype).masked_fill_(apart, -100.0)[:, None]


class WindowAttention(nn.Module):
    def __init__(self, channels: int, shift: int) -> None:
        super().__init__()
        self.heads, self.shift = channels // HEAD, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        table = 0.02 * torch.randn((2 * WINDOW - 1) ** 2, self.heads)
        self.relative_position_bias_table = nn.Parameter(table)
        axis = torch.arange(WINDOW)
        y, x = (t.flatten() for t in torch.meshgrid(axis, axis, indexing="ij"))
        index = (y[:, None] - y + WINDOW - 1) * (2 * WINDOW - 1) + x[:, None] - x + WINDOW - 1
        self.register_buffer("index", index.flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        height, width = rows.shape[1:3]
        rows = F.pad(rows, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        n, h, w, _ = rows.shape
        if self.shift:
            rows = torch.roll(rows, (-self.shift, -self.shift), (1, 2))
        tokens = cut(rows, WINDOW, WINDOW)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].view(WINDOW**2, WINDOW**2, -1)
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        if self.shift:
            bias = (bias + mask(h, w, q)).repeat(n, 1, 1, 1)
        tokens = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        rows = joined(self.proj(tokens), WINDOW, WINDOW, h, w)
        if self.shift:
            rows = torch.roll(rows, (self.shift, self.shift), (1, 2))
        return rows[:, :height, :width].permute(0, 3, 1, 2)


class SwinBlock(nn.Module):
    def __init__(self, channels: int, mlp: str, *, shift: int, long_range: bool) -> None:
        super().__init__()
        self.norm, self.attention = Norm(channels), WindowAttention(channels, shift)
        self.mlp = MLP(channels, mlp)
        self.dw2 = None
        if long_range:
            self.attention_norm, self.norm2 = Norm(channels), Norm(channels)
            self.dw2 = depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        if self.dw2 is None:
            return self.mlp(x + self.attention(z))
        z = z + F.gelu(self.attention_norm(self.attention(z)))
        z = z + F.gelu(self.norm2(self.dw2(z)))
        return self.mlp(x + z)


class StripeAttention(nn.Module):
    def __init__(self, channels: int, stripe: int | None) -> None:
        super().__init__()
        self.stripe, branches = stripe, 1 if stripe is None else 2
        self.qkv = nn.Linear(channels, 3 * channels)
        width = channels // branches
        self.lepe = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(branches)
        )
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        qkv = self.qkv(x.permute(0, 2, 3, 1)).chunk(3, 3)
        extents = [(height, self.stripe or width), (self.stripe or height, width)]
        mixed = [
            self._mixed([t.chunk(len(self.lepe), 3)[i] for t in qkv], *extents[i], lepe)
            for i, lepe in enumerate(self.lepe)
        ]
        return self.proj(torch.cat(mixed, 3)).permute(0, 3, 1, 2)

    def _mixed(self, qkv: list[Tensor], tall: int, wide: int, lepe: nn.Module) -> Tensor:
        height, width, c = qkv[0].shape[1:]
        down, right = -height % tall, -width % wide
        top, left = down // 2, right // 2
        h, w = height + down, width + right
        padding = (0, 0, left, right - left, top, down - top)
        tokens = [cut(F.pad(t, padding), tall, wide) for t in qkv]
        q, k, v = (t.unflatten(2, (-1, HEAD)).transpose(1, 2) for t in tokens)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = tokens[2].view(-1, tall, wide, c).permute(0, 3, 1, 2)
        mixed = mixed + lepe(image).permute(0, 2, 3, 1).reshape(mixed.shape)
        return joined(mixed, tall, wide, h, w)[:, top : top + height, left : left + width]


class CSwinBlock(nn.Module):
    def __init__(self, channels: int, mlp: str, *, stripe: int | None) -> None:
        super().__init__()
        self.norm, self.attention = Norm(channels), StripeAttention(channels, stripe)
        self.mlp = MLP(channels, mlp)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(self.norm(x)))


class ResNetBlock(nn.Module):
    def __init__(self, channels: int, *, long_range: bool) -> None:
        super().__init__()
        wide = 4 * channels
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dw = self.bn_dw = None
        if long_range:
            self.dw, self.bn_dw = depthwise(channels, 3), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        if self.dw is not None and self.bn_dw is not None:
            y = x + y
            y = y + self.bn_dw(self.dw(y)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        return (x + self.bn3(self.conv3(y))).relu_()
