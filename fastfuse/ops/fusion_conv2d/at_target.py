"""The levels of a fusion that are convolved at the target's resolution."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastfuse.ops.fusion_conv2d import winograd
from fastfuse.ops.fusion_conv2d.geometry import Constants, Geometry
from fastfuse.ops.fusion_conv2d.images import (
    centered,
    empty_image,
    matrix,
    to_channels_last,
    write_taps,
)
from fastfuse.ops.product import multiply_into

__all__ = ["convolve", "gradients"]


class _Deterministic:
    """A context in which cuDNN's convolutions give the same bits every time.

    The setting is the process's, and threads may be inside together: the first to enter keeps what
    it was, the last to leave restores it.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.usual = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.usual = torch.backends.cudnn.deterministic
                torch.backends.cudnn.deterministic = True
            self.inside += 1

    def __exit__(self, *exc_info: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch.backends.cudnn.deterministic = self.usual


_DETERMINISTIC = _Deterministic()


def _deterministic(device: torch.device) -> AbstractContextManager[None]:
    return _DETERMINISTIC if device.type == "cuda" else nullcontext()


def _scaled(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """Multiplied in the accumulation dtype, which is that of ``scale``, and rounded once."""
    return tensor if scale is None else (tensor * scale).to(tensor.dtype)


def _inputs(features: Sequence[Tensor], g: Geometry, c: Constants) -> list[Tensor]:
    """What to convolve at the target's resolution: equalized, or less the means."""
    levels = list(g.plan.target)
    if not g.equalizes_first:
        return [centered(features[i], c.center(i)) for i in levels]
    fused = torch.ops.fastfuse.upsample_equalize_concat(
        [features[i] for i in levels],
        *g.size,
        *c.of_levels(levels),
        g.align_corners,
        True,
    )
    return [fused]


def _weights(weight: Tensor, g: Geometry, levels: Sequence[int]) -> Tensor:
    if len(levels) == len(g.channels):
        return weight
    pieces = [weight[:, g.slice_of(i)] for i in levels]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _taps(weight: Tensor, g: Geometry, c: Constants, levels: Sequence[int]) -> Tensor:
    """The levels' weights as (k * k, C_out, C_in), over their std unless the inputs are."""
    weights = _weights(weight, g, levels)
    taps = weights.permute(2, 3, 0, 1).reshape(-1, g.out_channels, weights.shape[1])
    if c.inverse_std is None or g.equalizes_first:
        return taps
    return taps * _per_channel(g, c, levels)


def _per_channel(g: Geometry, c: Constants, levels: Sequence[int]) -> Tensor:
    assert c.inverse_std is not None
    return torch.cat([c.inverse_std[i].expand(g.channels[i]) for i in levels])


def convolve(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor | None, g: Geometry, c: Constants
) -> tuple[Tensor, Tensor | None]:
    """The convolution at the target's resolution, in the dtype of the weight; what it still has to
    be multiplied by, if anything. The bias is added unless there is such a factor."""
    levels, batch = g.plan.target, features[0].shape[0]
    if g.winograd:
        out = empty_image(weight, batch, g.out_channels, *g.out_size)
        taps = winograd.transform_weight(_taps(weight, g, c, levels))
        winograd.convolve(out, _inputs(features, g, c), taps, bias, g.padding)
        return out, None
    scale = None if g.equalizes_first else c.scale(levels[0])
    bias = bias if scale is None else None
    weights = _weights(weight, g, levels)
    if g.is_product:
        out = empty_image(weight, batch, g.out_channels, *g.size)
        if g.equalizes_first:
            (x,), center = _inputs(features, g, c), None
        else:
            x, center = features[levels[0]], c.center(levels[0])
        multiply_into(matrix(out), matrix(x), weights[:, :, 0, 0], bias, center)
        return out, scale
    (x,) = _inputs(features, g, c)
    with _deterministic(x.device):
        # Of one channel it may come contiguous.
        out = to_channels_last(
            torch.conv2d(x.to(weight.dtype), to_channels_last(weights), bias, padding=g.padding)
        )
    return out, scale


def gradients(
    grad_output: Tensor,
    features: Sequence[Tensor],
    weight: Tensor | None,
    g: Geometry,
    c: Constants,
    wanted: Sequence[int],
    found: dict[int, Tensor],
    weight_gradient: Tensor | None,
) -> None:
    """Gradients of the levels convolved at the target's resolution, some or the weight's."""
    levels = list(g.plan.target)
    batch, channels = grad_output.shape[0], sum(g.channels[i] for i in levels)
    equalized = g.equalizes_first
    inputs = [] if weight_gradient is None else _inputs(features, g, c)

    if g.winograd:
        if weight_gradient is not None:
            products = winograd.weight_gradient(grad_output, inputs, g.padding)
            if c.inverse_std is not None and not equalized:
                products = products * _per_channel(g, c, levels)
            pieces = products.split([g.channels[i] for i in levels], 2)
            for i, piece in zip(levels, pieces, strict=True):
                write_taps(weight_gradient, g.slice_of(i), slice(None), piece)
        groups = [levels] if equalized else [[i] for i in wanted]
        for group in groups if wanted else []:
            assert weight is not None
            x_gradient = empty_image(grad_output, batch, sum(g.channels[i] for i in group), *g.size)
            taps = _taps(weight, g, c, group)
            winograd.input_gradient(x_gradient, grad_output, taps, g.padding)
            if not equalized:
                found[group[0]] = x_gradient
    else:
        scale = None if equalized else c.scale(levels[0])
        # Where a tensor is not needed only its shape counts.
        if inputs:
            x = inputs[0].to(grad_output.dtype)
        else:
            x = grad_output.new_empty(1).expand(batch, channels, *g.size)
        if wanted:
            assert weight is not None
            weights = to_channels_last(_weights(weight, g, levels))
        else:
            shape = (g.out_channels, channels, g.kernel_size, g.kernel_size)
            weights = grad_output.new_empty(1).expand(shape)
        with _deterministic(grad_output.device):
            x_gradient, w_gradient, _ = torch.ops.aten.convolution_backward(
                grad_output, x, weights, None, [1, 1], [g.padding] * 2, [1, 1], False, [0, 0], 1,
                [bool(wanted), weight_gradient is not None, False],
            )  # fmt: skip
        if weight_gradient is not None:
            pieces = _scaled(w_gradient, scale).split([g.channels[i] for i in levels], dim=1)
            for i, piece in zip(levels, pieces, strict=True):
                weight_gradient[:, g.slice_of(i)] = piece
        if wanted and not equalized:
            found[levels[0]] = _scaled(x_gradient, scale)

    if wanted and equalized:
        offsets = [sum(g.channels[j] for j in levels if j < i) for i in wanted]
        pieces = torch.ops.fastfuse.upsample_equalize_concat_backward(
            x_gradient, offsets, [g.channels[i] for i in wanted],
            [g.sizes[i][0] for i in wanted], [g.sizes[i][1] for i in wanted],
            c.of_levels(wanted)[1], g.align_corners, True,
        )  # fmt: skip
        found.update(zip(wanted, pieces, strict=True))
