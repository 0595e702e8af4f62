"""Schema, shapes, derivatives and FLOPs of tap_sum.

The op is linear in taps and offsets. Its gradient for the taps is an op of its own, the adjoint,
whose gradient is the forward op: derivatives of every order come from these two. The ``_into`` ops
write to memory that is there, for fusion_conv2d; nothing is recorded of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import Derivative, Op, kernels_of
from fastfuse.ops.layout import is_channels_last, memory_format

__all__ = ["flops", "forward"]


def _forward_fake(
    taps: Tensor,
    offsets: Tensor | None,
    height: int,
    width: int,
    kernel_size: int,
    padding: int,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    margin = 2 * padding - (kernel_size - 1)
    shape = (taps.shape[0], taps.shape[1] // kernel_size**2, height + margin, width + margin)
    return torch.empty(
        shape, dtype=taps.dtype, device=taps.device, memory_format=memory_format(channels_last)
    )


def _backward_fake(
    grad_output: Tensor,
    in_height: int,
    in_width: int,
    height: int,
    width: int,
    kernel_size: int,
    padding: int,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    batch, channels = grad_output.shape[:2]
    return torch.empty(
        (batch, kernel_size**2 * channels, in_height, in_width),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format(channels_last),
    )


def _inside(tap: int, padding: int, size: int, out_size: int) -> tuple[int, int]:
    """The output positions [first, end) at which a tap falls inside the upsampled map."""
    return min(max(padding - tap, 0), out_size), max(min(size + padding - tap, out_size), 0)


def _sums_inside(
    x: Tensor, dim: int, size: int, kernel_size: int, padding: int, dtype: torch.dtype
) -> list[Tensor]:
    """For every tap along an axis the sum over ``dim``, which goes, of where it falls inside.

    The middle, which all taps share, is summed once; nothing is subtracted.
    """
    out_size = x.shape[dim]
    ranges = [_inside(tap, padding, size, out_size) for tap in range(kernel_size)]
    first, end = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if first >= end:
        return [x.narrow(dim, a, max(b - a, 0)).sum(dim, dtype=dtype) for a, b in ranges]
    middle = x.narrow(dim, first, end - first).sum(dim, dtype=dtype)
    sums = []
    for a, b in ranges:
        total = middle
        if a < first:
            total = total + x.narrow(dim, a, first - a).sum(dim, dtype=dtype)
        if end < b:
            total = total + x.narrow(dim, end, b - end).sum(dim, dtype=dtype)
        sums.append(total)
    return sums


def _offsets_gradient(
    grad_output: Tensor, height: int, width: int, kernel_size: int, padding: int
) -> Tensor:
    """The gradient of the offsets, (k * k * C,), in the accumulation dtype.

    Every offset is added wherever its tap falls inside: its gradient is the sum over there.
    """
    accumulation = accumulation_dtype(grad_output.dtype)
    columns = _sums_inside(grad_output, 3, width, kernel_size, padding, accumulation)
    by_kx = torch.stack([c.sum(0) for c in columns])  # (kx, C, H)
    by_ky = _sums_inside(by_kx, 2, height, kernel_size, padding, accumulation)
    return torch.stack(by_ky).flatten()  # (ky, kx, C)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    taps, offsets, *geometry, _ = inputs
    ctx.in_size, ctx.geometry = taps.shape[2:], geometry
    ctx.offsets_dtype = None if offsets is None else offsets.dtype


def _gradients(ctx: Any, grad_output: Tensor) -> Sequence[Any]:
    taps_gradient = offsets_gradient = None
    if ctx.needs[0]:
        taps_gradient = backward[ctx.backend](
            grad_output, *ctx.in_size, *ctx.geometry, is_channels_last([grad_output])
        )
    if ctx.needs[1]:
        offsets_gradient = _offsets_gradient(grad_output, *ctx.geometry[:4]).to(ctx.offsets_dtype)
    return taps_gradient, offsets_gradient, *[None] * 6


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, *ctx.geometry, _ = inputs


def _gradients_of_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    taps = forward[ctx.backend](grad, None, *ctx.geometry, is_channels_last([grad]))
    return taps, *[None] * 8


def flops(
    channels: int, source: Sequence[int], target: Sequence[int], kernel_size: int, padding: int
) -> int:
    """Along y, then along x: a multiply-add (2 FLOPs) for each of a tap's two neighbours."""
    out_height, out_width = (extent + 2 * padding - (kernel_size - 1) for extent in target)
    along_y = kernel_size**2 * out_height * source[1]
    along_x = kernel_size * out_height * out_width
    neighbours = [1 if a == b else 2 for a, b in zip(source, target, strict=True)]
    return 2 * channels * (neighbours[0] * along_y + neighbours[1] * along_x)


def _forward_flops(
    taps_shape: torch.Size,
    offsets: Any,
    height: int,
    width: int,
    kernel_size: int,
    padding: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    batch, channels, *source = taps_shape
    one = flops(channels // kernel_size**2, source, (height, width), kernel_size, padding)
    return batch * one


def _backward_flops(
    grad_shape: torch.Size,
    in_height: int,
    in_width: int,
    height: int,
    width: int,
    kernel_size: int,
    padding: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    batch, channels = grad_shape[:2]
    source, target = (in_height, in_width), (height, width)
    return batch * flops(channels, source, target, kernel_size, padding)


_SIZES = "SymInt height, SymInt width, int kernel_size, int padding, bool align_corners"


forward = Op(
    f"tap_sum(Tensor taps, Tensor? offsets, {_SIZES}, bool channels_last) -> Tensor",
    kernels=kernels_of("tap_sum", "forward"),
    fake=_forward_fake,
    derivative=Derivative(_save, _gradients),
    flops=_forward_flops,
)
# The gradient of taps (N, k * k * C, in_height, in_width).
backward = Op(
    f"tap_sum_backward(Tensor grad_output, SymInt in_height, SymInt in_width, {_SIZES}, "
    "bool channels_last) -> Tensor",
    kernels=kernels_of("tap_sum", "backward"),
    fake=_backward_fake,
    derivative=Derivative(_save_backward, _gradients_of_backward),
    flops=_backward_flops,
)
# out = (accumulate ? scales[0] * out : 0) + bias + sum_i scales[1 + i] * tap_sum(taps[i]) with the
# offsets, which are not scaled, counted once; scales, offsets and bias in the accumulation dtype,
# None for 1, 0 and 0.
Op(
    "tap_sum_into(Tensor(a!) out, Tensor[] taps, Tensor? scales, Tensor? offsets, Tensor? bias, "
    f"bool accumulate, {_SIZES}, bool channels_last) -> ()",
    kernels=kernels_of("tap_sum", "forward_into"),
)
# grad_taps = scale * tap_sum_backward(grad_output); scale of shape (1,).
Op(
    f"tap_sum_backward_into(Tensor(a!) grad_taps, Tensor grad_output, Tensor? scale, {_SIZES}, "
    "bool channels_last) -> ()",
    kernels=kernels_of("tap_sum", "backward_into"),
)
