"""What stands for this package's ops in a model of PyTorch's own: modules that hold constants.

They are written for runtimes that compile a graph for CPUs. Bilinear sampling is linear and
separable: along an axis it is a product with a constant matrix, and shifting, padding with zeros
and summing a convolution's taps is part of that matrix. Runtimes fold what depends on parameters
alone, such as weights in another order, when they load a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.nn.batch_norm import with_norm
from fastfuse.ops.bilinear import axis_table, interpolate

__all__ = ["AdaptivePooling", "Fusion", "TapSum", "pays_winograd"]

TILE = 4  # outputs of Winograd's F(4x4, 3x3) on each side
# Fewer channels: a product is so small that the transforms, which are memory's, outweigh it.
WINOGRAD_CHANNELS = 128
Size = Sequence[int]


def pays_winograd(weight: Size, padding: int) -> bool:
    """Of a dense convolution, stride and dilation 1."""
    return tuple(weight[2:]) == (3, 3) and padding == 1 and min(weight[:2]) >= WINOGRAD_CHANNELS


def sampling(size: int, target: int, kernel: int, padding: int, align_corners: bool) -> Tensor:
    """(taps, out, size): for each tap of a kernel, the matrix that brings ``size`` positions to
    ``target``, pads them with zeros and reads them where the tap does."""
    lower, upper, weight = axis_table(size, target, align_corners=align_corners)
    matrix, rows = torch.zeros(target, size, dtype=torch.float64), torch.arange(target)
    matrix[rows, lower] += 1 - weight
    matrix[rows, upper] += weight
    padded = F.pad(matrix, (0, 0, padding, padding))
    return padded.unfold(0, target + 2 * padding - kernel + 1, 1).transpose(1, 2)


class TapSum(nn.Module):
    """Levels' taps (N, k, h, w * k, C), ky before h and kx after w, to their sum (N, H, W, C).

    Rows first: (H, k * h) times (k * h, w * k * C); then columns, (W, w * k) times (w * k, C).
    Levels whose columns are few share the last product, so that its result is written once.
    """

    def __init__(
        self, sizes: Sequence[Size], target: Size, kernel: int, padding: int, align_corners: bool,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel, self.out = kernel, [s + 2 * padding - kernel + 1 for s in target]
        self.shared = [i for i, (_, w) in enumerate(sizes) if w * kernel < target[1]]
        self.groups = [[i] for i in range(len(sizes)) if i not in self.shared]
        if self.shared:
            self.groups.append(self.shared)
        columns = []
        for i, (h, w) in enumerate(sizes):
            rows = sampling(h, target[0], kernel, padding, align_corners)
            self.constant(f"rows{i}", rows.transpose(0, 1).flatten(1), dtype)
            column = sampling(w, target[1], kernel, padding, align_corners)
            columns.append(column.permute(1, 2, 0).flatten(1))
        for g, group in enumerate(self.groups):
            self.constant(f"columns{g}", torch.cat([columns[i] for i in group], 1), dtype)

    def constant(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        self.register_buffer(name, value.to(dtype).contiguous(), persistent=False)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        total: Any = None
        upsampled = []
        for i, level in enumerate(taps):
            n, k, h, columns, channels = level.shape
            rows = torch.matmul(self.get_buffer(f"rows{i}"), level.reshape(n, k * h, -1))
            upsampled.append(rows.reshape(n, self.out[0], columns, channels))
        for g, group in enumerate(self.groups):
            level = upsampled[group[0]]
            if len(group) > 1:
                level = torch.cat([upsampled[i] for i in group], 2)
            level = torch.matmul(self.get_buffer(f"columns{g}"), level)
            total = level if total is None else total + level
        return total


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Of data, weights and outputs, for the points 0, a, -a, b, -b and infinity: Toom and Cook's
    product of polynomials, transposed."""
    points = [0, 0.625, -0.625, 1.5, -1.5]
    values = torch.tensor([[float(p**i) for i in range(6)] for p in points] + [[0.0] * 6]).double()
    weight, output = values[:, :3].clone(), values[:, :TILE].clone()
    weight[5, 2] = output[5, TILE - 1] = values[5, 5] = 1
    return torch.linalg.inv(values).t(), weight, output.t()


class Winograd(nn.Module):
    """3x3 convolution of (N, H, W, C) with padding 1, by F(4x4, 3x3), as products alone.

    Tiles are transformed by products with banded matrices, a column of their elements at a time,
    in an order that makes the 36 products a batch as they come.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor
    outputs: Tensor

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.tiles = size, [-(-s // TILE) for s in size]
        data, weight, output = transforms()
        for name, value in (
            ("rows", self.banded(data, 0).flatten(0, 1)),
            ("columns", self.banded(data, 1)),
            ("weights", torch.kron(weight, weight)),
            ("outputs", torch.kron(output, output)),
        ):
            self.register_buffer(name, value.to(dtype).contiguous(), persistent=False)

    def banded(self, data: Tensor, axis: int) -> Tensor:
        """(elements, tiles, size)."""
        count = self.tiles[axis]
        padded = torch.zeros(len(data), count, TILE * count + 2, dtype=data.dtype)
        for i in range(count):
            padded[:, i, TILE * i : TILE * i + data.shape[1]] = data
        return padded[..., 1 : 1 + self.size[axis]]

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        out, (th, tw), count = weight.shape[0], self.tiles, TILE + 2
        weights = torch.matmul(self.weights, weight.permute(3, 2, 1, 0).reshape(9, -1))
        weights = weights.reshape(count, count, channels, out)
        y = torch.matmul(self.rows, x.reshape(n, height, width * channels))
        y = y.reshape(n, count * th, width, channels)
        products = []
        for columns, taps in zip(self.columns.unbind(0), weights.unbind(0), strict=True):
            tiles = torch.matmul(columns, y).reshape(n, count, th * tw, channels)
            products.append(torch.matmul(tiles, taps).reshape(n, count, th * tw * out))
        z = torch.matmul(self.outputs, torch.cat(products, 1))
        z = z.reshape(n, TILE, TILE, th, tw, out).permute(0, 3, 2, 4, 1, 5)
        return z.reshape(n, TILE * th, TILE * tw, out)[:, :height, :width]


class Fusion(nn.Module):
    """fusion_conv2d, and a convolution of an image alone: each level in the way of fewest
    products."""

    def __init__(
        self, shapes: Sequence[Size], weight: Size, size: Size, padding: int, align_corners: bool,
        dtype: torch.dtype, winograd: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.padding, self.align_corners = (size[0], size[1]), padding, align_corners
        self.channels = [s[1] for s in shapes]
        out, _, k, _ = weight

        def is_coarse(shape: Size) -> bool:
            _, c, h, w = shape
            own = h * w * k * k * c + size[0] * k * h * k * w + prod(size) * k * w
            return own < prod(size) * k * k * c and tuple(shape[2:]) != self.size

        self.coarse = [i for i, s in enumerate(shapes) if is_coarse(s)]
        self.fine = [i for i in range(len(shapes)) if i not in self.coarse]
        fine = (out, sum(self.channels[i] for i in self.fine), k, k)
        if self.coarse:
            sizes = [shapes[i][2:] for i in self.coarse]
            self.sum = TapSum(sizes, size, k, padding, align_corners, dtype)
        self.winograd = None
        if self.fine and winograd and pays_winograd(fine, padding):
            self.winograd = Winograd(size, dtype)

    def forward(
        self, features: Sequence[Tensor], weight: Tensor, bias: Any, mean: Any, std: Any,
        norm: Any = None,
    ) -> Tensor:  # fmt: skip
        if norm is not None:  # a sum of products is not scaled for free
            weight, bias = with_norm(weight, bias, norm[:4], norm[4])
        weights, levels = weight.split(self.channels, 1), list(features)
        for i, level in enumerate(levels):
            if mean is not None:
                level = level - mean[i]
            levels[i] = level if std is None else level / std[i]
        total: Any = None
        if self.coarse:
            taps = [taps_of(levels[i], weights[i]) for i in self.coarse]
            total = self.sum(taps)
        if not self.fine:
            return (total if bias is None else total + bias).permute(0, 3, 1, 2)
        fine = [
            interpolate(levels[i], self.size, align_corners=self.align_corners)
            if levels[i].shape[2:] != self.size
            else levels[i]
            for i in self.fine
        ]
        image = fine[0] if len(fine) == 1 else torch.cat(fine, 1)
        kernels = [weights[i] for i in self.fine]
        kernel = kernels[0] if len(kernels) == 1 else torch.cat(kernels, 1)
        if self.winograd is None:
            direct = F.conv2d(image, kernel, bias, padding=self.padding)
            return direct if total is None else direct + total.permute(0, 3, 1, 2)
        direct = self.winograd(image.permute(0, 2, 3, 1), kernel)
        direct = direct if bias is None else direct + bias
        return (direct if total is None else direct + total).permute(0, 3, 1, 2)


def taps_of(level: Tensor, weight: Tensor) -> Tensor:
    """(N, k, h, w * k, C_out) of (N, C, h, w)."""
    n, c, h, w = level.shape
    out, _, k, _ = weight.shape
    pixels = level.permute(0, 2, 3, 1).reshape(n, 1, h * w, c)
    taps = torch.matmul(pixels, weight.permute(2, 1, 3, 0).reshape(k, c, k * out))
    return taps.reshape(n, k, h, w * k, out)


class AdaptivePooling(nn.Module):
    """Adaptive average pooling of images of one size."""

    rows: Tensor
    columns: Tensor

    def __init__(self, size: Size, target: Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.window = [s // t for s, t in zip(size, target, strict=True)]
        self.divides = all(s % t == 0 for s, t in zip(size, target, strict=True))
        if not self.divides:
            for name, s, t in zip(("rows", "columns"), size, target, strict=True):
                matrix = F.adaptive_avg_pool1d(torch.eye(s, dtype=torch.float64), t)
                value = matrix.t() if name == "rows" else matrix
                self.register_buffer(name, value.to(dtype).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.divides:
            return F.avg_pool2d(x, self.window)
        return torch.matmul(torch.matmul(self.rows, x), self.columns)
