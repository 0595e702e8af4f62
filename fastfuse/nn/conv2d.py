"""nn.Conv2d, on this package's kernels where they are faster."""

from __future__ import annotations

from torch import Tensor, nn

from fastfuse.backends import DTYPES, requested_backend
from fastfuse.nn.composition import is_plain
from fastfuse.ops.autocast import cast_dtype, without_autocast
from fastfuse.ops.depthwise_conv2d import depthwise_conv2d
from fastfuse.ops.fusion_conv2d import convolves_single, fusion_conv2d
from fastfuse.ops.policy import policy_of

__all__ = ["Conv2d", "convolve", "convolve_with", "dense_padding", "depthwise_dilation"]

_CONV_FORWARD = nn.Conv2d._conv_forward  # as it is when this package is imported


class Conv2d(nn.Conv2d):
    """An ``nn.Conv2d`` in all but speed: the same arguments, initialization, keys and results.

    A static rule, by what is convolved, chooses what runs:

    - depthwise with an odd kernel, stride 1 and "same" zero padding:
      :func:`fastfuse.depthwise_conv2d`;
    - dense 3x3, stride 1: :func:`fastfuse.fusion_conv2d` with one level where that has something
      faster than PyTorch: Winograd's algorithm, on CPUs, for channels and pixels enough;
    - anything else: PyTorch's convolution, in float32 where the processor has no instructions for
      products of the dtype, and rounded once.

    Winograd's algorithm rounds differently, and an infinity among the inputs makes NaNs where a
    direct convolution has infinities.

    >>> import torch, fastfuse
    >>> fastfuse.nn.Conv2d(64, 64, 3, padding=1)(torch.randn(1, 64, 16, 16)).shape
    torch.Size([1, 64, 16, 16])
    """

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a :class:`Conv2d` of the same attributes gives."""
    return convolve_with(conv, x, conv.weight, conv.bias)


def convolve_with(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same with another weight and bias."""
    if not _is_image(conv, x, weight):
        return conv._conv_forward(x, weight, bias)
    dilation = depthwise_dilation(conv, weight)
    if dilation is not None:
        return depthwise_conv2d(x, weight, bias, dilation=dilation)
    dtype = cast_dtype(x)
    if any(cast_dtype(t) != dtype for t in (weight, bias) if t is not None):
        return conv._conv_forward(x, weight, bias)  # PyTorch's error, whatever the size
    padding = dense_padding(conv, weight)
    if padding is not None and convolves_single(x, weight, padding):
        return fusion_conv2d([x], weight, bias, padding=padding)
    product_dtype = policy_of(x.device.type).product_dtype(dtype)
    if product_dtype == dtype or requested_backend() == "reference":
        return conv._conv_forward(x, weight, bias)
    with without_autocast(x.device.type):
        bias = None if bias is None else bias.to(dtype).to(product_dtype)
        weight = weight.to(dtype).to(product_dtype)
        return conv._conv_forward(x.to(dtype).to(product_dtype), weight, bias).to(dtype)


def _is_image(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> bool:
    """What the package's ops take, and not what only traces a graph (torch.fx)."""
    return (
        is_plain(x)
        and is_plain(weight)
        and x.dim() == weight.dim() == 4
        and x.shape[1] == weight.shape[1] * conv.groups
        and x.dtype in DTYPES
        and getattr(conv._conv_forward, "__func__", None) is _CONV_FORWARD
    )


def depthwise_dilation(conv: nn.Conv2d, weight: Tensor) -> int | None:
    """Of a convolution that :func:`fastfuse.depthwise_conv2d` is: depthwise, of the image's size.

    The weight may be another than the convolution's: parametrizations compute it.
    """
    if weight.dim() != 4:  # gathered elsewhere
        return None
    out_channels, per_group, k, k_x = weight.shape
    if per_group != 1 or out_channels != conv.groups:
        return None
    dilation, padding = _dilation_and_padding(conv, k, k_x)
    return dilation if padding == dilation * (k // 2) else None


def dense_padding(conv: nn.Conv2d, weight: Tensor) -> int | None:
    """Of a convolution that :func:`fastfuse.fusion_conv2d` is: of all channels, not dilated."""
    if conv.groups != 1 or weight.dim() != 4:
        return None
    dilation, padding = _dilation_and_padding(conv, *weight.shape[2:])
    return padding if dilation == 1 else None


def _dilation_and_padding(conv: nn.Conv2d, k: int, k_x: int) -> tuple[int, int | None]:
    """Of both axes; no padding where this is no convolution of the package's kind: square and odd,
    with stride 1 and one number of zeros all around."""
    dilation = _of_both_axes(conv.dilation)
    if (
        k != k_x
        or k % 2 == 0
        or _of_both_axes(conv.stride) != 1
        or dilation is None
        or conv.padding_mode != "zeros"
    ):
        return 1, None
    if isinstance(conv.padding, str):
        return dilation, dilation * (k // 2) if conv.padding == "same" else 0
    return dilation, _of_both_axes(conv.padding)


def _of_both_axes(value: int | tuple[int, ...]) -> int | None:
    """A convolution's attribute, a pair that may be overwritten by an int or a single value; None
    if the axes differ."""
    if isinstance(value, int):
        return value
    return value[0] if value[0] == value[-1] else None
