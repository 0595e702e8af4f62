"""The convolution of upsampled, concatenated levels, each at its own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import cpu_refusal, is_tracing, requested_backend, select
from fastfuse.ops.autocast import cast_dtype, cast_for_autocast, vector_for_autocast
from fastfuse.ops.checks import (
    check_constants,
    check_convolved_size,
    check_count,
    check_features,
    check_padding,
    check_same_kind,
    check_size,
    check_tensor,
    check_vector,
    feature_list,
)
from fastfuse.ops.define import Operation
from fastfuse.ops.fusion_conv2d import winograd
from fastfuse.ops.fusion_conv2d.autograd import forward
from fastfuse.ops.fusion_conv2d.kernel import described
from fastfuse.ops.fusion_conv2d.reference import reference
from fastfuse.ops.fusion_conv2d.samples import samples
from fastfuse.ops.fusion_conv2d.shape import FusionShape
from fastfuse.ops.layout import is_channels_last
from fastfuse.ops.policy import policy_of

__all__ = ["OPERATION", "convolves_single", "fusion_conv2d"]

NAME = "fusion_conv2d"


def fusion_conv2d(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    padding: int | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Convolve levels as if upsampled, equalized and concatenated, each at its own resolution.

    Equals ``conv2d(upsample_equalize_concat(features, size=size, mean=mean, std=std), weight, bias,
    padding=padding)``, borders included. Convolution and upsampling are both linear: a level is
    convolved at its own resolution, a product per tap of the kernel, and the taps are upsampled,
    shifted and summed. The work shrinks by the square of a level's ratio, and neither upsampled
    levels nor their concatenation are built. Only levels for which that would be more work, such
    as those larger than the target, are brought to its size first: a static rule decides.

    Args:
        features: levels (N, C_i, H_i, W_i) of one N, device and dtype (float64, float32, bfloat16
            or float16), any strides, of any sizes, larger ones than the target too.
        weight: (C_out, sum C_i, k, k), k odd, in the features' dtype.
        bias: (C_out,), in the features' dtype or float32 beside narrower ones, or None.
        size: (H, W) the levels are brought to, in pixels; None: the largest height and the largest
            width among them.
        mean, std: constants, one per level: floats or a 1-D floating-point tensor on the features'
            device; None means 0 and 1. No gradient flows to them.
        padding: zeros around the equalized levels, on each side; None: k // 2.
        align_corners: of the upsampling, as in ``interpolate``.

    Returns:
        (N, C_out, H + 2 * padding - (k - 1), W + 2 * padding - (k - 1)) in the features' dtype and
        in the memory format of the first feature whose strides tell. Under autocast features and
        weight are cast to its dtype; bias, mean and std are not.

    Raises:
        TypeError: features is not a sequence of tensors, or an argument has a wrong type.
        ValueError: shapes, dtypes, devices, size or constants that do not fit.
        BackendError: a backend was asked for by name and cannot run.

    Derivatives of every order for features, weight and bias. The same bits from run to run at a
    fixed number of threads. Source: the fusion of *Scale Equalization for Multi-Level Feature
    Fusion*; docs/fusion_conv2d.md derives the identity.

    >>> import torch, fastfuse
    >>> levels = [torch.randn(1, 8, 32 >> i, 32 >> i) for i in range(3)]
    >>> weight = torch.randn(16, 24, 3, 3)
    >>> fastfuse.fusion_conv2d(levels, weight, std=[0.6, 0.5, 0.4]).shape
    torch.Size([1, 16, 32, 32])
    """
    features = feature_list(NAME, features)
    _check_weight(weight)
    if bias is not None:
        check_tensor(NAME, "bias", bias)
    weight, *features = cast_for_autocast([weight, *features])
    check_features(NAME, features)
    _check_channels(features, weight)
    check_same_kind(NAME, "weight", weight, features[0])
    if bias is not None:
        bias, meaning = vector_for_autocast(bias, features[0]), "one value per output channel"
        check_vector(NAME, "bias", bias, weight.shape[0], meaning, features[0], wide=True)
    padding = check_padding(NAME, padding, weight.shape[2])
    height, width = check_size(NAME, size, features)
    check_convolved_size(NAME, (height, width), weight.shape[2], padding)
    mean = check_constants(NAME, "mean", mean, features)
    std = check_constants(NAME, "std", std, features, positive=True)
    return OPERATION.run(
        _backend(features[0], weight, height, width), features[0].device.type,
        features, weight, bias, height, width, mean, std, padding, align_corners,
        is_channels_last(features),
    )  # fmt: skip


def _reference(
    features: Sequence[Tensor], weight: Tensor, bias: Any, height: int, width: int, *rest: Any
) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return reference(features, weight, bias, (height, width), *rest)


def _backend(first: Tensor, weight: Tensor, height: int, width: int) -> str:
    chosen = select(OPERATION, first)
    if chosen == "cpu" and requested_backend() == "auto" and not torch.compiler.is_compiling():
        macs = weight.numel() * first.shape[0] * height * width
        return "reference" if macs < policy_of("cpu").little_macs else chosen
    return chosen


def _routes(image: Tensor) -> dict[str, str]:
    """Of the fusion of a pyramid, 3x3, and of an image alone, each to as many channels."""
    batch, channels, height, width = image.shape
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(4)]
    found = {}
    for count, name in (
        (4, "3x3 of 4 levels, each half as large"),
        (1, "3x3 of an image alone, as nn.Conv2d"),
    ):
        levels = [image.new_empty(batch, channels, *size) for size in sizes[:count]]
        weight = image.new_empty(channels, count * channels, 3, 3)
        backend = _backend(image, weight, height, width)
        if backend == "reference":
            little = select(OPERATION, image) != backend
            found[name] = "reference, for so little work" if little else backend
        elif count == 1 and not convolves_single(image, weight, 1):  # what nn.Conv2d asks
            dtype = str(policy_of(image.device.type).product_dtype(image.dtype))
            found[name] = f"PyTorch's convolution in {dtype.removeprefix('torch.')}"
        else:
            shape = FusionShape.of(levels, weight, height, width, 1, False)
            found[name] = f"{backend}; {described(shape, image)}"
    return found


def convolves_single(x: Tensor, weight: Tensor, padding: int) -> bool:
    """Whether one image and nothing else is convolved faster by this op than by PyTorch.

    A static rule: on CPUs, where Winograd's algorithm runs and saves more products than its
    transforms cost (docs/fusion_conv2d.md has the measurement).
    """
    if weight.shape[2] != 3 or cpu_refusal(x) is not None or is_tracing():
        return False
    out_channels, channels = weight.shape[:2]
    margin = 2 * padding - 2
    pixels = x.shape[0] * (x.shape[2] + margin) * (x.shape[3] + margin)
    applies = winograd.applies("cpu", cast_dtype(x), channels, out_channels, pixels, 3, padding)
    if torch.compiler.is_compiling():  # a size that is not known must not become a condition
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(applies)
    return applies


def _check_weight(weight: Tensor) -> None:
    check_tensor(NAME, "weight", weight)
    shape = tuple(weight.shape)
    if weight.dim() != 4:
        raise ValueError(
            f"{NAME}: weight must have 4 dimensions (C_out, sum C_i, k, k); got shape {shape}"
        )
    if shape[0] == 0:
        raise ValueError(f"{NAME}: weight must have at least 1 output channel; got shape {shape}")
    if shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"{NAME}: weight must have a square kernel of odd size; got shape {shape}")
    taps = shape[0] * shape[2] ** 2
    check_count(NAME, "weight", "taps, of all output channels,", taps, weight.device)


def _check_channels(features: Sequence[Tensor], weight: Tensor) -> None:
    channels = [f.shape[1] for f in features]
    if weight.shape[1] != sum(channels):
        listed = " + ".join(str(c) for c in channels)
        raise ValueError(
            f"{NAME}: weight must have as many input channels as the levels have together, "
            f"{sum(channels)} ({listed}); got {weight.shape[1]}"
        )


OPERATION = Operation(
    forward, _reference, samples, keeps_vectors=True, takes_size=True, routes=_routes
)
