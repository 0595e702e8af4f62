"""Batch norms that evaluate: a factor and an offset of each channel, in the weights before them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastfuse.backends import requested_backend
from fastfuse.nn.composition import Part, is_plain, is_watched
from fastfuse.nn.conv2d import Conv2d, convolve_with
from fastfuse.ops.batch_norm import BatchNorm, measure

__all__ = [
    "NormedSequential",
    "activated",
    "folded",
    "in_order",
    "normalized",
    "norms_of",
    "state_of",
    "uses_batch",
    "with_norm",
]

_CONV = Part((nn.Conv2d, Conv2d), ("weight", "bias"), maybe=("bias",))
_NORM = Part(
    (nn.BatchNorm2d,),
    ("weight", "bias", "running_mean", "running_var"),
    maybe=("weight", "bias"),
    conditions={"of running statistics": lambda norm, *tensors: not norm.training},
)

_ANY_NORM = Part((nn.BatchNorm2d,), ())
_RELU = Part((nn.ReLU,), ())


def normalized(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, in one step if nothing was done to the two."""
    tensors: list[Any] = []
    if not is_watched() and is_plain(x) and x.dim() == 4 and _CONV.read(conv, tensors) is None:
        stride: Any = conv.stride  # a number, if it was set so
        down, across = (stride, stride) if isinstance(stride, int) else stride
        pixels = x.shape[0] * x.shape[2] * x.shape[3] // (down * across)
        parameters = folded(norm, pixels, *tensors)
        if parameters is not None:
            return convolve_with(cast(nn.Conv2d, conv), x, *parameters)
    return norm(conv(x))


def folded(
    norm: nn.Module, pixels: int, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """A convolution's weight and bias with those of the batch norm behind it; None: it trains, or
    something was done to it, or they are rounded to less than float32, or there are more weights to
    read and write than ``pixels``, the outputs of each channel, or definitions are asked for."""
    if requested_backend() == "reference":
        return None
    if not torch.compiler.is_compiling() and pixels < weight[0].numel():
        return None
    tensors: list[Any] = []
    if _NORM.read(norm, tensors) is not None or len(tensors[2]) != len(weight):
        return None
    held = [t for t in (weight, bias, *tensors) if t is not None]
    if any(t.dtype != weight.dtype or t.device != weight.device for t in held) or (
        weight.dtype not in (torch.float32, torch.float64)
    ):
        return None
    return with_norm(weight, bias, tensors, cast(nn.BatchNorm2d, norm).eps)


def with_norm(
    weight: Tensor, bias: Tensor | None, norm: Sequence[Any], eps: float
) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias, scaled and shifted as a batch norm behind it does, of
    weight, bias (or None), mean and variance."""
    gain, shift, mean, variance = norm
    scale = torch.rsqrt(variance + eps)
    scale = scale if gain is None else scale * gain
    offset = (-mean if bias is None else bias - mean) * scale
    return weight * scale[:, None, None, None], offset if shift is None else offset + shift


def uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm is by the statistics of what it is called with."""
    return norm.training or norm.running_mean is None


def state_of(norm: nn.BatchNorm2d, x: Tensor, moments: Tensor | None = None) -> BatchNorm:
    """What a call of a norm with x applies, whose moments may be known; running statistics move as
    in the call."""
    of_batch = uses_batch(norm)
    mean, variance = norm.running_mean, norm.running_var
    if not of_batch:
        assert mean is not None
        assert variance is not None
        return BatchNorm(torch.stack([mean, variance]), norm.weight, norm.bias, norm.eps, False)
    if moments is None:
        moments = measure(x)
    if norm.training and norm.track_running_stats:
        counted, momentum = norm.num_batches_tracked, norm.momentum
        if counted is not None:
            counted.add_(1)
        if mean is not None and variance is not None:
            if momentum is None:
                momentum = 0.0 if counted is None else 1 / float(counted)
            count = x.numel() // x.shape[1]
            unbiased = momentum * count / (count - 1)
            with torch.no_grad():
                mean.mul_(1 - momentum).add_(moments[0], alpha=momentum)
                variance.mul_(1 - momentum).add_(moments[1], alpha=unbiased)
    return BatchNorm(moments, norm.weight, norm.bias, norm.eps, True)


def activated(norm: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(x)`` of a norm's result, over it where nobody else sees it."""
    watched = is_watched() or not is_plain(x)
    if not (watched or torch.compiler.is_compiling()):
        watched = bool(torch._C._len_torch_function_stack())
    if not watched and _ANY_NORM.read(norm, []) is None and _RELU.read(activation, []) is None:
        return x.relu_()
    return cast(Tensor, activation(x))


def norms_of(sequence: Sequence[nn.Module]) -> list[bool]:
    """Of each module, whether a batch norm follows a convolution."""
    return [
        isinstance(child, nn.Conv2d) and type(after) is nn.BatchNorm2d
        for child, after in pairwise([*sequence, None])
    ]


def in_order(sequence: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The modules of a sequence, each called with the result of the one before it; convolutions
    with their batch norms in one step, where that gives the same."""
    pairs = norms_of(sequence)
    for i, module in enumerate(sequence):
        if pairs[i]:
            x = normalized(module, sequence[i + 1], x)
        elif i and pairs[i - 1]:
            continue  # the norm
        elif i > 1 and pairs[i - 2]:
            x = activated(sequence[i - 1], module, x)
        else:
            x = module(x)
    return x


class NormedSequential(nn.Sequential):
    """An ``nn.Sequential``, :func:`in_order`."""

    def forward(self, input: Tensor) -> Tensor:
        return in_order(list(self), input)
