"""The levels of a fusion that are convolved at their own resolution.

Output channels are processed a chunk at a time, so that the taps stay in the last-level cache
between the product that makes them and the tap sum that reads them, and so that they take little
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfuse.ops.define import steps_of
from fastfuse.ops.fusion_conv2d.shape import FusionShape, Gradients
from fastfuse.ops.fusion_conv2d.strategy import Scaled, Strategy
from fastfuse.ops.layout import as_image, as_matrix
from fastfuse.ops.matmul import wide_dtype, wide_product
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = ["OwnResolution"]

CHUNK_CHANNELS = 64  # a chunk is a multiple


class OwnResolution(Strategy):
    """A product per tap of the kernel, and the taps upsampled, shifted and summed."""

    def forward(
        self,
        features: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        onto: Scaled | None,
    ) -> Tensor:
        """The levels' convolutions, the bias, and what they come ``onto``, whose memory it takes.

        The bias (C_out,) is in the accumulation dtype.
        """
        shape = self.shape
        out = empty(shape.out_shape, weight, torch.channels_last) if onto is None else onto.value
        exact = self._exact(out)
        wide = wide_dtype(out) != out.dtype
        in_parts = [] if wide else exact
        scales = self._scales(onto, in_parts)
        memory = _Taps(shape, self.levels, out)
        for chunk in memory.chunks():
            taps_of_levels = memory.by_level(chunk)
            remainders = []
            for i, taps in taps_of_levels.items():
                x, products = as_matrix(features[i]), _tap_weights(weight, chunk, shape.slice_of(i))
                if i not in exact:
                    torch.mm(x, products.t(), out=as_matrix(taps))
                elif wide:
                    taps_of_levels[i] = as_image(wide_product(x, products.t()), taps.shape)
                else:
                    sums = torch.mm(x.float(), products.t().float())
                    as_matrix(taps).copy_(sums)
                    remainders.append(torch.empty_like(taps))
                    as_matrix(remainders[-1]).copy_(sums - as_matrix(taps))
            steps_of(out.device.type).tap_sum_into(
                out[:, chunk],
                [*taps_of_levels.values(), *remainders],
                scales,
                None,
                None if bias is None else bias[chunk],
                onto is not None,
                *shape.tap_arguments,
            )
        return out

    def _scales(self, onto: Scaled | None, in_parts: Sequence[int]) -> Tensor | None:
        """1 / std of what is there and of every level: a slice of them where they are in order."""
        inverse_std = self.equalization.inverse_std
        if inverse_std is None:
            return None
        levels = [*self.levels, *in_parts]
        if onto is not None:
            base = onto.level
        else:  # nothing is there, and its factor not read
            base = levels[0] - 1 if levels and levels[0] > 0 else None
        if base is None:
            first = inverse_std.new_ones(1)
        else:
            end = base + 1 + len(levels)
            if levels == list(range(base + 1, end)):
                return inverse_std[base:end]
            first = inverse_std[base : base + 1]
        return torch.cat([first, *(inverse_std[i : i + 1] for i in levels)])

    def _exact(self, out: Tensor) -> list[int]:
        """Small levels, whose taps count many times: in narrow dtypes these are kept in float32
        where the library gives them so, else what rounding takes from them is summed too."""
        if out.dtype in (torch.float32, torch.float64):
            return []
        height, width = self.shape.size
        pixels = policy_of(out.device.type).exact_pixels * height * width
        sizes = self.shape.sizes
        return [i for i in self.levels if sizes[i][0] * sizes[i][1] <= pixels]

    def backward(
        self,
        grad_output: Tensor,
        features: Sequence[Tensor],
        weight: Tensor | None,
        gradients: Gradients,
    ) -> None:
        shape, wanted = self.shape, gradients.wanted_of(self.levels)
        # Gradients of features sum over all chunks: narrow dtypes would round each partial sum.
        exact = grad_output.dtype in (torch.float32, torch.float64)
        memory = _Taps(shape, self.levels, grad_output, chunked=exact or not wanted)
        for i in wanted:
            gradients.found[i] = empty(shape.level_shape(i), grad_output, torch.channels_last)
        for chunk in memory.chunks():
            for i, taps in memory.by_level(chunk).items():
                if i not in wanted and gradients.weight is None:
                    continue
                steps_of(taps.device.type).tap_sum_backward_into(
                    taps, grad_output[:, chunk], self.equalization.scale(i), *shape.tap_arguments
                )
                if i in wanted:
                    assert weight is not None
                    products = _tap_weights(weight, chunk, shape.slice_of(i))
                    x_gradient = as_matrix(gradients.found[i])
                    if chunk.start == 0:
                        torch.mm(as_matrix(taps), products, out=x_gradient)
                    else:
                        torch.addmm(x_gradient, as_matrix(taps), products, out=x_gradient)
                if gradients.weight is not None:
                    products = wide_product(as_matrix(taps).t(), as_matrix(features[i]))
                    gradients.write_weight(i, chunk, products)

    def described(self, products: str, sums: str) -> str:
        return f"at its own resolution in {products}"


def _tap_weights(weight: Tensor, outputs: slice, inputs: slice) -> Tensor:
    """The weights of a chunk of outputs as one product, (k * k * outputs, inputs), tap-major."""
    chunk = weight[outputs, inputs].permute(2, 3, 0, 1)
    return chunk.reshape(-1, chunk.shape[3])


class _Taps:
    """Memory for the taps of one chunk of output channels after the other, for several levels."""

    def __init__(
        self, shape: FusionShape, levels: Sequence[int], like: Tensor, *, chunked: bool = True
    ) -> None:
        self.shape, self.levels = shape, levels
        self.taps = shape.kernel_size**2
        pixels = sum(shape.sizes[i][0] * shape.sizes[i][1] for i in levels) * shape.batch
        per_channel = self.taps * pixels * like.element_size()
        chunks = -(-per_channel * shape.out_channels // policy_of(like.device.type).taps_bytes)
        length = -(-shape.out_channels // max(chunks, 1))
        length = -(-length // CHUNK_CHANNELS) * CHUNK_CHANNELS
        self.length = min(length, shape.out_channels) if chunked else shape.out_channels
        self.memory = empty((self.taps * pixels * self.length,), like)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.shape.out_channels, self.length):
            yield slice(start, min(start + self.length, self.shape.out_channels))

    def by_level(self, chunk: slice) -> dict[int, Tensor]:
        """The taps of a chunk, (N, k * k * outputs, h, w) in channels_last."""
        found, start = {}, 0
        channels, batch = self.taps * (chunk.stop - chunk.start), self.shape.batch
        for i in self.levels:
            height, width = self.shape.sizes[i]
            count = batch * height * width * channels
            taps = self.memory[start : start + count].view(batch, height, width, channels)
            found[i] = taps.permute(0, 3, 1, 2)
            start += count
        return found
