"""Depthwise convolution: every channel with its own kernel, dilated or not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.backends import requested_backend, select, wants_gradients
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import (
    check_depthwise_weight,
    check_dilation,
    check_feature_map,
    check_tensor,
    check_vector,
)
from fastfuse.ops.define import Operation
from fastfuse.ops.depthwise_conv2d.autograd import forward
from fastfuse.ops.depthwise_conv2d.reference import reference
from fastfuse.ops.depthwise_conv2d.samples import samples
from fastfuse.ops.layout import is_channels_last
from fastfuse.ops.policy import policy_of

__all__ = ["OPERATION", "depthwise_conv2d"]

NAME = "depthwise_conv2d"
LIBRARY = "oneDNN"  # by way of the reference


def _library_is_faster(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> bool:
    """By the policy's rule, for calls without derivatives: docs/depthwise_conv2d.md."""
    if requested_backend() != "auto" or x.device.type != "cpu" or dilation > 1:
        return False
    if wants_gradients((x, weight, bias)):
        return False
    policy = policy_of("cpu")
    asked = weight.shape[2], is_channels_last([x]), x.numel(), x.dtype
    faster = x.dtype in policy.native and policy.library_depthwise(*asked)
    if torch.compiler.is_compiling():  # a size that is not known must not become a condition
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(faster)
    return faster


def _backend(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> str:
    chosen = select(OPERATION, x)
    faster = chosen == "cpu" and _library_is_faster(x, weight, bias, dilation)
    return LIBRARY if faster else chosen


def _routes(image: Tensor) -> dict[str, str]:
    found = {}
    for k, dilation in ((3, 1), (7, 1), (7, 3)):
        weight = image.new_empty(image.shape[1], 1, k, k)
        name = f"{k}x{k}, dilation {dilation}"
        found[name] = _backend(image, weight.requires_grad_(), None, dilation)
        found[f"{name}, without derivatives"] = _backend(image, weight.detach(), None, dilation)
    return found


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1
) -> Tensor:
    """Convolve every channel with its own k x k kernel, stride 1, zero padding to the same size.

    The same as ``conv2d(x, weight, bias, padding=dilation * (k // 2), dilation=dilation,
    groups=C)``.

    Args:
        x: (N, C, H, W), float64, float32, bfloat16 or float16 (accumulation in float32, or float64
            for float64), any strides; at least 1 pixel, the kernel may reach beyond the image.
        weight: (C, 1, k, k), k odd, in x's dtype; 3, 5 and 7 have kernels of their own.
        bias: (C,), in x's dtype.
        dilation: distance of neighbouring taps in pixels, at least 1.

    Returns:
        (N, C, H, W) in x's dtype and memory format (contiguous or channels_last). Under autocast
        x, weight and bias are cast to its dtype.

    Raises:
        TypeError: x, weight or bias is not a tensor, or dilation not an int.
        ValueError: shapes, dtypes, devices or numbers that do not fit.
        BackendError: a backend was asked for by name and cannot run.

    Derivatives of every order for x, weight and bias; the same bits from run to run, and on CPUs
    for any number of threads. Used in CEDNet's blocks (CEDNet, section 3.3) and ConvNeXt's.

    >>> import torch, fastfuse
    >>> x, weight = torch.randn(1, 8, 16, 16), torch.randn(8, 1, 7, 7)
    >>> fastfuse.depthwise_conv2d(x, weight, dilation=3).shape
    torch.Size([1, 8, 16, 16])
    """
    check_feature_map(NAME, "x", x)
    check_dilation(NAME, dilation)
    check_tensor(NAME, "weight", weight)
    if bias is not None:
        check_tensor(NAME, "bias", bias)
        x, weight, bias = cast_for_autocast([x, weight, bias])
    else:
        x, weight = cast_for_autocast([x, weight])
    check_depthwise_weight(NAME, "weight", weight, x)
    if bias is not None:
        check_vector(NAME, "bias", bias, x.shape[1], "one value per channel", x)
    backend = _backend(x, weight, bias, dilation)
    return OPERATION.run(
        "reference" if backend == LIBRARY else backend, x.device.type,
        x, weight, bias, None, dilation, False, is_channels_last([x]),
    )  # fmt: skip


OPERATION = Operation(
    forward,
    lambda x, weight, bias, addend, dilation, flip: reference(x, weight, bias, dilation),
    samples,
    routes=_routes,
)
