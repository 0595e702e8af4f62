"""Upsample a map to the size of a finer one and add the two, in one pass."""

from __future__ import annotations

from torch import Tensor

from fastfuse.backends import select
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import check_feature_map, check_same_kind, check_tensor
from fastfuse.ops.define import Operation
from fastfuse.ops.layout import is_channels_last
from fastfuse.ops.upsample_add.autograd import forward
from fastfuse.ops.upsample_add.reference import reference
from fastfuse.ops.upsample_add.samples import samples

__all__ = ["OPERATION", "upsample_add"]

NAME = "upsample_add"


def upsample_add(x: Tensor, skip: Tensor, *, align_corners: bool = False) -> Tensor:
    """Upsample ``x`` to the size of ``skip`` and add: ``skip + UP(x)``.

    UP is bilinear interpolation as in ``torch.nn.functional.interpolate`` (any ratio, up or down;
    the identity where sizes agree). The upsampled map is never stored.

    Args:
        x: the coarse map (N, C, h, w), float64, float32, bfloat16 or float16 (accumulation in
            float32, or float64 for float64), any strides.
        skip: the fine map (N, C, H, W), in x's dtype and on its device, any strides.
        align_corners: as in ``interpolate``.

    Returns:
        (N, C, H, W) in x's dtype and memory format (contiguous or channels_last; skip's, where x is
        one pixel or one channel, which is both), rounded once, in memory of its own. Under autocast
        x and skip are cast to its dtype.

    Raises:
        TypeError: x or skip is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit.
        BackendError: a backend was asked for by name and cannot run.

    Derivatives of every order for x and skip; on CPUs and GPUs the same bits from run to run, and
    on CPUs for any number of threads. Source: the top-down path of FPN and UPerNet, and the
    decoders of CEDNet.

    >>> import torch, fastfuse
    >>> coarse, fine = torch.randn(1, 8, 16, 16), torch.randn(1, 8, 32, 32)
    >>> fastfuse.upsample_add(coarse, fine).shape
    torch.Size([1, 8, 32, 32])
    """
    check_tensor(NAME, "x", x)
    check_tensor(NAME, "skip", skip)
    x, skip = cast_for_autocast([x, skip])
    check_feature_map(NAME, "x", x)
    check_feature_map(NAME, "skip", skip)
    check_same_kind(NAME, "skip", skip, x)
    if skip.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{NAME}: skip must have the input's batch size and channels, N, C = "
            f"{x.shape[0]}, {x.shape[1]}; got {skip.shape[0]}, {skip.shape[1]}"
        )
    backend, channels_last = select(OPERATION, x), is_channels_last([x, skip])
    return OPERATION.run(backend, x.device.type, x, skip, align_corners, channels_last)


OPERATION = Operation(forward, reference, samples)
