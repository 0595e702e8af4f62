"""Mean and variance of a branch as it is concatenated, without upsampling it.

Upsampling is separable and linear: a channel X (h, w) becomes UP(X) = U_y X U_x^T, and the weights
of every row of U_y and U_x sum to 1. With a = U^T 1 / size (how much each source position is read)
and the Gram matrix G = U^T U / size of each axis::

    mean(UP(X))   = a_y^T X a_x
    mean(UP(X)^2) = sum(X * (G_y X G_x)) = sum((L_y^T X L_x)^2),   G = L L^T

A row of U reads two neighbours at most, so that G is tridiagonal and its Cholesky factor L has two
diagonals: a stencil of two positions along each axis, at the branch's own resolution. X - m goes in
for X, where m is the mean of the image's UP(X): UP(X - m) = UP(X) - m, since the weights sum to 1.
The second line then is the variance, a sum of squares in which nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastfuse.ops.bilinear import axis_table, interpolate_exactly
from fastfuse.ops.policy import policy_of

__all__ = ["Moments", "image_moments"]


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed variance of images that weigh 1 each, whatever their size.

    >>> a, b = Moments.of_image(1.0, 0.5), Moments.of_image(3.0, 0.5)
    >>> (a + b).count, (a + b).mean, (a + b).variance
    (2, 2.0, 1.5)
    """

    count: int = 0
    mean: float = 0.0
    total: float = 0.0  # of the images' variances about `mean`

    @classmethod
    def of_image(cls, mean: float, variance: float) -> Moments:
        return cls(1, mean, variance)

    def __add__(self, other: Moments) -> Moments:
        """Of both, by Chan's update: only differences of means are squared, nothing cancels."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        difference = other.mean - self.mean
        return Moments(
            count,
            self.mean + difference * (other.count / count),
            self.total + other.total + difference**2 * (self.count * other.count / count),
        )

    @property
    def variance(self) -> float:
        """Mean over the images of the mean of (x - mean)²."""
        return self.total / self.count


def image_moments(
    x: Tensor, size: Sequence[int] | None = None, *, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and variance of every image of UP(x), over channels and positions.

    Args:
        x: (N, C, h, w), any floating-point dtype; coordinates of UP are those of its dtype.
        size: (H, W) of UP(x); None is the size of ``x``.

    Returns:
        Two float64 tensors of shape (N,), on the device of ``x``.

    >>> mean, variance = image_moments(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    >>> mean.item(), variance.item()  # of 0, 1, 3, 4
    (2.0, 2.5)
    """
    x = x.detach()
    if x.device.type == "mps":  # which has no float64
        x = x.cpu()
    height, width = x.shape[2:] if size is None else size
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.shape[1]
    if height * width < x.shape[2] * x.shape[3]:  # fewer positions than UP reads: build it
        x = torch.cat([_built(part, (height, width), align_corners) for part in _chunks(x)], 1)
    rows = _axis(x.shape[2], height, align_corners, dtype, x.device)
    columns = _axis(x.shape[3], width, align_corners, dtype, x.device)
    positions = rows.read[:, None] * columns.read
    mean = x.new_zeros(x.shape[0], dtype=torch.float64)
    for part in _chunks(x):
        mean += (part.double().sum(1) * positions).sum((1, 2))
    mean /= channels
    variance = torch.zeros_like(mean)
    for part in _chunks(x):
        centred = part.double() - mean[:, None, None, None]
        centred = columns.factor(centred, 3)
        centred = rows.factor(centred, 2)
        variance += centred.square_().sum((1, 2, 3))
    return mean, variance * (rows.scale * columns.scale / channels)


def _built(part: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    coordinates = torch.float64 if part.dtype == torch.float64 else torch.float32
    return interpolate_exactly(part, size, align_corners=align_corners, coordinates=coordinates)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """A few channels at a time."""
    elements = max(x[:, 0].numel(), 1)
    channels = policy_of(x.device.type).moments_values // elements
    yield from x.split(max(channels, 1), 1)


@dataclass(frozen=True)
class _Axis:
    """One axis: ``read`` = U^T 1 / size, and the two diagonals of the Gram matrix's factor."""

    read: Tensor
    diagonal: Tensor | None
    below: Tensor | None
    scale: float = 1.0  # of the sum of squares, where there is nothing to factor

    def factor(self, x: Tensor, dim: int) -> Tensor:
        """L^T x along ``dim``: position i becomes L[i, i] x[i] + L[i + 1, i] x[i + 1].

        Where UP is the identity, ``scale`` has it all.
        """
        if self.diagonal is None or self.below is None:
            return x
        shape = [-1 if d == dim else 1 for d in range(4)]
        result = x * self.diagonal.reshape(shape)
        length = x.shape[dim] - 1
        next_one = x.narrow(dim, 1, length)
        result.narrow(dim, 0, length).addcmul_(next_one, self.below.reshape(shape))
        return result


@lru_cache(maxsize=256)
def _axis(
    in_size: int, out_size: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> _Axis:
    if in_size == out_size:
        read = torch.full((in_size,), 1 / in_size, dtype=torch.float64, device=device)
        return _Axis(read, None, None, scale=1 / in_size)
    lower, upper, weight = axis_table(in_size, out_size, align_corners=align_corners, dtype=dtype)
    u = torch.zeros(out_size, in_size, dtype=torch.float64, device="cpu")
    target = torch.arange(out_size, device="cpu")
    u[target, lower] += 1 - weight
    u[target, upper] += weight
    gram = u.T @ u / out_size
    diagonal, below = [], [0.0]
    for i in range(in_size):
        # A pivot of 0 belongs to a position that is never read, or never but with the one before.
        pivot = max(gram[i, i].item() - below[-1] ** 2, 0.0) ** 0.5
        diagonal.append(pivot)
        below.append(gram[i, i + 1].item() / pivot if pivot and i + 1 < in_size else 0.0)
    return _Axis(
        u.mean(0).to(device),
        torch.tensor(diagonal, dtype=torch.float64, device=device),
        torch.tensor(below[1:in_size], dtype=torch.float64, device=device),
    )
