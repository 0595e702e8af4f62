"""Bring multi-level features to one size and one scale and concatenate them, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastfuse.backends import select
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import check_constants, check_features, check_size, feature_list
from fastfuse.ops.define import Operation
from fastfuse.ops.layout import is_channels_last
from fastfuse.ops.upsample_equalize_concat.autograd import forward
from fastfuse.ops.upsample_equalize_concat.reference import reference
from fastfuse.ops.upsample_equalize_concat.samples import samples

__all__ = ["OPERATION", "upsample_equalize_concat"]

NAME = "upsample_equalize_concat"


def upsample_equalize_concat(
    features: Sequence[Tensor],
    *,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Upsample the levels to one size, equalize their scales and concatenate their channels.

    ``out[:, o_i : o_i + C_i] = (UP(features[i]) - mean[i]) / std[i]`` with ``o_i`` the sum of the
    channels before level i and UP bilinear interpolation as in ``torch.nn.functional.interpolate``
    (any ratio, up or down; the identity where sizes agree). The upsampled levels are never stored.

    Args:
        features: levels (N, C_i, H_i, W_i) of one N, device and dtype (float64, float32, bfloat16
            or float16; accumulation in float32, or float64 for float64), any strides.
        size: (H, W) of the result in pixels; None: the largest height and the largest width among
            the levels.
        mean, std: constants, one per level: floats or a 1-D floating-point tensor on the features'
            device; None means 0 and 1. No gradient flows to them.
        align_corners: as in ``interpolate``.

    Returns:
        (N, sum C_i, H, W), in the features' dtype and in the memory format (contiguous or
        channels_last) of the first feature whose strides tell: one pixel or one channel is both.
        Under autocast features are cast to its dtype, mean and std are not.

    Raises:
        TypeError: features is not a sequence of tensors, or a constant is not a number.
        ValueError: shapes, dtypes, devices, size or constants that do not fit.
        BackendError: a backend was asked for by name and cannot run.

    Derivatives of every order for features; on CPUs and GPUs the same bits from run to run, and on
    CPUs for any number of threads. Source: *Scale Equalization for Multi-Level Feature Fusion*,
    the scale equalizer (x - mu) / sigma between upsampling and concatenation.

    >>> import torch, fastfuse
    >>> p2, p3 = torch.randn(1, 8, 32, 32), torch.randn(1, 8, 16, 16)
    >>> fastfuse.upsample_equalize_concat([p2, p3], mean=[0.4, 0.4], std=[0.6, 0.5]).shape
    torch.Size([1, 16, 32, 32])
    """
    features = cast_for_autocast(feature_list(NAME, features))
    check_features(NAME, features)
    height, width = check_size(NAME, size, features)
    mean = check_constants(NAME, "mean", mean, features)
    std = check_constants(NAME, "std", std, features, positive=True)
    return OPERATION.run(
        select(OPERATION, features[0]), features[0].device.type,
        features, height, width, mean, std, align_corners, is_channels_last(features),
    )  # fmt: skip


OPERATION = Operation(
    forward,
    lambda features, height, width, *rest: reference(features, (height, width), *rest),
    samples,
    takes_size=True,
)
