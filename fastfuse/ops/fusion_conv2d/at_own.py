"""The levels of a fusion that are convolved at their own resolution.

Output channels are processed a chunk at a time, so that the taps stay in the last-level cache
between the product that makes them and the tap sum that reads them, and so that they take little
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfuse.ops.fusion_conv2d.geometry import Constants, Geometry
from fastfuse.ops.fusion_conv2d.images import empty_image, matrix, tap_weights, write_taps
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = ["add", "gradients"]

CHUNK_CHANNELS = 64  # a chunk is a multiple


class _Taps:
    """Memory for the taps of one chunk of output channels after the other, for several levels."""

    def __init__(self, g: Geometry, like: Tensor, *, chunked: bool = True) -> None:
        self.batch = like.shape[0]
        self.g = g
        self.taps = g.kernel_size**2
        pixels = sum(g.sizes[i][0] * g.sizes[i][1] for i in g.plan.own) * self.batch
        per_channel = self.taps * pixels * like.element_size()
        chunks = -(-per_channel * g.out_channels // policy_of(like.device.type).taps_bytes)
        length = -(-g.out_channels // max(chunks, 1))
        length = -(-length // CHUNK_CHANNELS) * CHUNK_CHANNELS
        self.length = min(length, g.out_channels) if chunked else g.out_channels
        self.memory = empty((self.taps * pixels * self.length,), like)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.g.out_channels, self.length):
            yield slice(start, min(start + self.length, self.g.out_channels))

    def images(self, chunk: slice) -> dict[int, Tensor]:
        """By level, the taps of a chunk as a channels_last image."""
        images, start = {}, 0
        channels = self.taps * (chunk.stop - chunk.start)
        for i in self.g.plan.own:
            height, width = self.g.sizes[i]
            count = self.batch * height * width * channels
            image = self.memory[start : start + count].view(self.batch, height, width, channels)
            images[i] = image.permute(0, 3, 1, 2)
            start += count
        return images


def add(
    out: Tensor,
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    c: Constants,
    base_scale: Tensor | None,
    *,
    accumulate: bool,
) -> None:
    """out = (accumulate ? base_scale * out : 0) + bias + the levels' convolutions.

    The bias (C_out,) is in the accumulation dtype.
    """
    narrow = out.dtype not in (torch.float32, torch.float64)
    share = policy_of(out.device.type).exact_pixels if narrow else 0
    pixels = share * g.size[0] * g.size[1]
    in_parts = [i for i in g.plan.own if g.sizes[i][0] * g.sizes[i][1] <= pixels]
    scales = None
    if c.inverse_std is not None:
        base = c.inverse_std.new_ones(1) if base_scale is None else base_scale
        levels = [*g.plan.own, *in_parts]
        scales = torch.cat([base, *(c.inverse_std[i : i + 1] for i in levels)])
    memory = _Taps(g, out)
    for chunk in memory.chunks():
        images = memory.images(chunk)
        remainders = []
        for i, taps in images.items():
            products = tap_weights(weight, chunk, g.slice_of(i))
            if i in in_parts:
                exact = torch.mm(matrix(features[i]).float(), products.t().float())
                matrix(taps).copy_(exact)
                remainders.append(torch.empty_like(taps))
                matrix(remainders[-1]).copy_(exact - matrix(taps))
            else:
                torch.mm(matrix(features[i]), products.t(), out=matrix(taps))
        torch.ops.fastfuse.tap_sum_into(
            out[:, chunk],
            [*images.values(), *remainders],
            scales,
            None,
            None if bias is None else bias[chunk],
            accumulate,
            *g.tap_arguments,
        )


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
    """Gradients of the levels convolved at their own resolution, chunk by chunk of outputs."""
    # Gradients of features sum over all chunks: narrow dtypes would round each partial sum.
    exact = grad_output.dtype in (torch.float32, torch.float64)
    memory = _Taps(g, grad_output, chunked=exact or not wanted)
    for i in wanted:
        found[i] = empty_image(grad_output, grad_output.shape[0], g.channels[i], *g.sizes[i])
    for chunk in memory.chunks():
        for i, taps in memory.images(chunk).items():
            if i not in wanted and weight_gradient is None:
                continue
            torch.ops.fastfuse.tap_sum_backward_into(
                taps, grad_output[:, chunk], c.scale(i), *g.tap_arguments
            )
            if i in wanted:
                assert weight is not None
                products = tap_weights(weight, chunk, g.slice_of(i))
                x_gradient = matrix(found[i])
                if chunk.start == 0:
                    torch.mm(matrix(taps), products, out=x_gradient)
                else:
                    torch.addmm(x_gradient, matrix(taps), products, out=x_gradient)
            if weight_gradient is not None:
                products = torch.mm(matrix(taps).t(), matrix(features[i]))
                write_taps(weight_gradient, g.slice_of(i), chunk, products)
