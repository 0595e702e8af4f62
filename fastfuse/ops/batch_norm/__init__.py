"""Batch norms, the ReLUs behind them and what follows these, for training: the insides of modules.

A chain of convolutions, batch norms and ReLUs keeps, for backward, what each convolution gave and
what each ReLU gave. Here a ReLU's result is made again from the convolution's wherever it is
needed, a few rows at a time: it is the input of the 1x1 convolution behind it, and of that one's
weight gradient. What is kept halves, and so do the passes over memory.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastfuse.ops.batch_norm.autograd import batch_moments, norm_relu, norm_relu_conv
from fastfuse.ops.pointwise.parameters import to_accumulation

__all__ = ["BatchNorm", "measure", "normalized_relu", "normalized_relu_conv"]


class BatchNorm(NamedTuple):
    """Of a map's channels.

    Attributes:
        moments: (2, C), mean and biased variance, in the accumulation dtype.
        weight, bias: (C,) or None.
        of_batch: whether the moments are the map's, and change with it.
    """

    moments: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    of_batch: bool


def measure(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (2, C), the mean and biased variance of each channel, in the accumulation
    dtype, without derivatives: those of a norm have its moments in them."""
    return batch_moments["cpu"](x.detach())


def normalized_relu(
    x: Tensor, norm: BatchNorm, skip: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """``ReLU(skip + keep * BN(x))``: x, skip (N, C, H, W), keep (N,) -> (N, C, H, W),
    channels_last, all of one dtype, float32 or float64."""
    return norm_relu["cpu"](x, skip, *_vectors(norm), keep, norm.eps, norm.of_batch)


def normalized_relu_conv(
    x: Tensor, norm: BatchNorm | None, weight: Tensor, *, measured: bool
) -> tuple[Tensor, Tensor]:
    """The 1x1 convolution of ``ReLU(BN(x))``, or of x itself, by weight (C_out, C, 1, 1) ->
    (N, C_out, H, W), channels_last, and its moments if ``measured``, else an empty tensor."""
    if norm is None:
        return norm_relu_conv["cpu"](x, weight, None, None, None, 0.0, False, measured)
    return norm_relu_conv["cpu"](x, weight, *_vectors(norm), norm.eps, norm.of_batch, measured)


def _vectors(norm: BatchNorm) -> list[Tensor | None]:
    """Moments, weight and bias as the ops take them."""
    return [to_accumulation(vector) for vector in norm[:3]]
