"""fusion_conv2d and its gradients, from matrix products, convolutions and tap sums.

Everything inside is channels_last: there an image is a matrix (pixels, channels), and the taps of
a level are one product with its weights. Where the device does not multiply the dtype of the
images, weights, taps and sums are float32, and results are rounded once.

Upsampling keeps constants: a mean comes off before it as well as after. It does so before the
products, in which nothing large is left to cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.ops.fusion_conv2d import at_own, at_target
from fastfuse.ops.fusion_conv2d.geometry import Constants, Geometry, geometry, geometry_of
from fastfuse.ops.fusion_conv2d.images import centered, empty_image
from fastfuse.ops.layout import in_layout, memory_format
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = ["backward", "forward"]


def _images(
    features: Sequence[Tensor], g: Geometry, c: Constants, dtype: torch.dtype
) -> list[Tensor]:
    """The features as channels_last images; those convolved at their own resolution less their mean
    and in the dtype of the products, for they are read once for every chunk of outputs."""
    images = [in_layout(f, True) for f in features]
    return [
        centered(image.to(dtype), c.center(i)) if i in g.plan.own else image
        for i, image in enumerate(images)
    ]


def _result(image: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A channels_last image rounded to a dtype, in a memory format."""
    if image.dtype != dtype:
        image = empty(image.shape, image.new_empty(0, dtype=dtype), torch.channels_last).copy_(
            image
        )
    return in_layout(image, channels_last)


def forward(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    mean: Tensor | None,
    std: Tensor | None,
    padding: int,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    g = geometry_of(features, weight, (height, width), padding, align_corners)
    dtype = weight.dtype
    c = Constants.of(mean, std, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    work = policy_of(weight.device.type).multiplies(dtype)
    weight, bias = weight.to(work), None if bias is None else bias.to(work)
    features = _images(features, g, c, work)

    out = base_scale = None
    if g.plan.target:
        out, base_scale = at_target.convolve(features, weight, bias, g, c)
        bias = bias if base_scale is not None else None
        if not g.plan.own and base_scale is None:
            return _result(out, dtype, channels_last)

    accumulate = out is not None
    if out is None:
        out = empty_image(weight, features[0].shape[0], g.out_channels, *g.out_size)
    at_own.add(
        out,
        features,
        weight,
        None if bias is None else bias.to(wide),
        g,
        c,
        base_scale,
        accumulate=accumulate,
    )
    return _result(out, dtype, channels_last)


def backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    weight: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    channels: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    height: int,
    width: int,
    kernel_size: int,
    padding: int,
    align_corners: bool,
    wanted: Sequence[bool],
    channels_last: bool,
    weight_channels_last: bool,
) -> list[Tensor]:
    g = geometry(
        grad_output,
        channels,
        list(zip(heights, widths, strict=True)),
        grad_output.shape[1],
        (height, width),
        kernel_size,
        padding,
        align_corners,
    )
    dtype = grad_output.dtype
    c = Constants.of(mean, std, dtype)
    work = policy_of(grad_output.device.type).multiplies(dtype)
    grad_output = in_layout(grad_output, True).to(work)
    weight = None if weight is None else weight.to(work)
    features = _images(features, g, c, work)
    levels = [i for i, want in enumerate(wanted) if want]
    batch = grad_output.shape[0]
    gradients = {  # the others are found below
        i: empty_image(grad_output, batch, 0, *g.sizes[i]) for i in levels if g.channels[i] == 0
    }
    weight_gradient = None
    if features:
        shape = (g.out_channels, sum(channels), kernel_size, kernel_size)
        weight_gradient = empty(shape, grad_output, memory_format(weight_channels_last))

    given = (grad_output, features, weight, g, c)
    of_target = [i for i in levels if i in g.plan.target]
    if of_target or (g.plan.target and weight_gradient is not None):
        at_target.gradients(*given, of_target, gradients, weight_gradient)
    of_own = [i for i in levels if i in g.plan.own]
    if of_own or (g.plan.own and weight_gradient is not None):
        at_own.gradients(*given, of_own, gradients, weight_gradient)

    result = [_result(gradients[i], dtype, channels_last) for i in levels]
    return result if weight_gradient is None else [*result, weight_gradient.to(dtype)]
