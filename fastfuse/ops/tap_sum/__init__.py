"""Sum the taps of a convolution after upsampling, instead of convolving what was upsampled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastfuse.backends import select
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import (
    check_convolved_size,
    check_feature_map,
    check_kernel_size,
    check_padding,
    check_size,
    check_tensor,
    check_vector,
)
from fastfuse.ops.define import Operation
from fastfuse.ops.layout import is_channels_last
from fastfuse.ops.tap_sum.autograd import forward
from fastfuse.ops.tap_sum.reference import reference
from fastfuse.ops.tap_sum.samples import samples

__all__ = ["OPERATION", "tap_sum"]

NAME = "tap_sum"


def tap_sum(
    taps: Tensor,
    size: Sequence[int],
    *,
    kernel_size: int,
    offsets: Tensor | None = None,
    padding: int | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Upsample every tap of a convolution and sum them, each shifted to where it belongs.

    ``out(p) = sum_k [p + k inside] (UP(taps[k]) + offsets[k])(p + k)``, where k runs over the
    kernel's positions, counted from -padding, and "inside" means inside the upsampled map. With
    ``taps[k] = W[k] x`` for a convolution's weight W that is conv2d(UP(x), W) exactly, zero
    padding included, for the price of a convolution of x: convolution and upsampling are both
    linear. No upsampled tap is ever stored.

    Args:
        taps: (N, k * k * C, h, w), tap-major: channel (ky * k + kx) * C + c; float64, float32,
            bfloat16 or float16 (accumulation in float32, or float64 for float64), any strides.
        size: (H, W) of the upsampled map in pixels; any ratio, up or down.
        kernel_size: k, odd.
        offsets: (k * k * C,), added to a tap only where it falls inside; in the taps' dtype.
        padding: zeros around the upsampled map, on each side; None: k // 2.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        (N, C, H + 2 * padding - (k - 1), W + 2 * padding - (k - 1)) in the taps' dtype and memory
        format (contiguous or channels_last). Under autocast taps and offsets are cast to its dtype.

    Raises:
        TypeError: taps is not a tensor, or a number is not an int.
        ValueError: shapes, dtypes, devices or numbers that do not fit.
        BackendError: a backend was asked for by name and cannot run.

    Derivatives of every order for taps and offsets; the same bits from run to run, and on CPUs for
    any number of threads.

    >>> import torch, fastfuse
    >>> x, weight = torch.randn(1, 8, 16, 16), torch.randn(4, 8, 3, 3)
    >>> products = weight.permute(2, 3, 0, 1).reshape(9 * 4, 8, 1, 1)  # one 1x1 product per tap
    >>> taps = torch.nn.functional.conv2d(x, products)
    >>> fastfuse.tap_sum(taps, (32, 32), kernel_size=3).shape
    torch.Size([1, 4, 32, 32])
    """
    check_feature_map(NAME, "taps", taps)
    kernel_size = check_kernel_size(NAME, kernel_size)
    padding = check_padding(NAME, padding, kernel_size)
    if taps.shape[1] % kernel_size**2:
        raise ValueError(
            f"{NAME}: taps must have k * k * C = {kernel_size**2} * C channels, tap-major; "
            f"got {taps.shape[1]}"
        )
    if offsets is not None:
        check_tensor(NAME, "offsets", offsets)
        taps, offsets = cast_for_autocast([taps, offsets])
        check_vector(NAME, "offsets", offsets, taps.shape[1], "one value per channel of taps", taps)
    else:
        (taps,) = cast_for_autocast([taps])
    height, width = check_size(NAME, size, like=taps)
    check_convolved_size(NAME, (height, width), kernel_size, padding)
    return OPERATION.run(
        select(OPERATION, taps), taps.device.type,
        taps, offsets, height, width, kernel_size, padding, align_corners, is_channels_last([taps]),
    )  # fmt: skip


OPERATION = Operation(
    forward,
    lambda taps, offsets, height, width, *rest: reference(taps, offsets, (height, width), *rest),
    samples,
    takes_size=True,
)
