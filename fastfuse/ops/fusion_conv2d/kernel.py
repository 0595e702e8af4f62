"""fusion_conv2d and its gradients, from matrix products, convolutions and tap sums.

Everything inside is channels_last: there an image is a matrix (pixels, channels), and the taps of
a level are one product with its weights. Levels are processed a chunk of output channels at a time,
so that the taps stay in the last-level cache between the product that makes them and the tap sum
that reads them, and so that they take little memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfuse import _extension
from fastfuse.ops.fusion_conv2d.plan import Plan, make_plan
from fastfuse.ops.layout import memory_format
from fastfuse.ops.tap_sum.autograd import offsets_gradient

__all__ = ["backward", "forward"]

# Bytes of the taps of a chunk: on CPUs about what the last-level cache holds.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
CHUNK_CHANNELS = 64  # a chunk is a multiple


@dataclass(frozen=True)
class Geometry:
    """Everything about a fusion but its tensors."""

    channels: tuple[int, ...]  # per level
    sizes: tuple[tuple[int, int], ...]
    out_channels: int
    size: tuple[int, int]
    kernel_size: int
    padding: int
    align_corners: bool
    plan: Plan

    @property
    def out_size(self) -> tuple[int, int]:
        margin = 2 * self.padding - (self.kernel_size - 1)
        return self.size[0] + margin, self.size[1] + margin

    @property
    def tap_arguments(self) -> tuple[int, int, int, int, bool, bool]:
        """What every tap_sum op ends with; channels_last."""
        return (*self.size, self.kernel_size, self.padding, self.align_corners, True)

    @property
    def is_product(self) -> bool:
        """Whether the convolution at the target's resolution is one matrix product."""
        return self.kernel_size == 1 and self.padding == 0

    def slice_of(self, level: int) -> slice:
        start = sum(self.channels[:level])
        return slice(start, start + self.channels[level])


def geometry(
    channels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    out_channels: int,
    size: tuple[int, int],
    kernel_size: int,
    padding: int,
    align_corners: bool,
) -> Geometry:
    plan = make_plan(channels, sizes, out_channels, size, kernel_size, False)
    return Geometry(
        tuple(channels), tuple(sizes), out_channels, size, kernel_size, padding, align_corners, plan
    )


@dataclass(frozen=True)
class Constants:
    """mean and 1 / std, one value per level in the accumulation dtype, None for 0 and 1."""

    mean: Tensor | None
    inverse_std: Tensor | None

    @classmethod
    def of(cls, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Constants:
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            None if mean is None else mean.to(wide),
            None if std is None else std.to(torch.float64).reciprocal().to(wide),
        )

    def scale(self, level: int) -> Tensor | None:
        """1 / std of one level, of shape (1,)."""
        return None if self.inverse_std is None else self.inverse_std[level : level + 1]

    def shift(self, level: int) -> Tensor:
        """mean / std of one level, which must have a mean."""
        assert self.mean is not None
        mean = self.mean[level]
        return mean if self.inverse_std is None else mean * self.inverse_std[level]


def _scaled(tensor: Tensor, scale: Tensor | None) -> Tensor:
    return tensor if scale is None else tensor * scale.to(tensor.dtype)


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _matrix(image: Tensor) -> Tensor:
    """(pixels, channels) of a channels_last image, a view."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _empty_image(like: Tensor, *shape: int) -> Tensor:
    image = torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
    _advise_huge_pages(image)
    return image


def _advise_huge_pages(tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and _extension.module is not None:
        _extension.module.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def _tap_weights(weight: Tensor, outputs: slice, inputs: slice) -> Tensor:
    """The weights of a chunk of outputs as one product, (k * k * outputs, inputs), tap-major."""
    chunk = weight[outputs, inputs].permute(2, 3, 0, 1)
    return chunk.reshape(-1, chunk.shape[3])


class _Taps:
    """Memory for the taps of one chunk of output channels after the other, for several levels."""

    def __init__(self, g: Geometry, like: Tensor, *, chunked: bool = True) -> None:
        self.batch = like.shape[0]
        self.g = g
        self.taps = g.kernel_size**2
        pixels = sum(g.sizes[i][0] * g.sizes[i][1] for i in g.plan.own) * self.batch
        per_channel = self.taps * pixels * like.element_size()
        chunks = -(-per_channel * g.out_channels // CHUNK_BYTES[like.device.type])
        length = -(-g.out_channels // max(chunks, 1))
        length = -(-length // CHUNK_CHANNELS) * CHUNK_CHANNELS
        self.length = min(length, g.out_channels) if chunked else g.out_channels
        self.memory = torch.empty(
            self.taps * pixels * self.length, dtype=like.dtype, device=like.device
        )
        _advise_huge_pages(self.memory)

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


def _offsets(weight: Tensor, g: Geometry, constants: Constants, levels: Sequence[int]) -> Tensor:
    """What the levels' means take from every tap, (k, k, out_channels)."""
    assert constants.mean is not None
    total = torch.zeros((), dtype=constants.mean.dtype, device=weight.device)
    for i in levels:
        sums = weight[:, g.slice_of(i)].sum(1, dtype=constants.mean.dtype)
        total = total - constants.shift(i) * sums
    return total.permute(1, 2, 0)


def _at_target(features: Sequence[Tensor], g: Geometry, c: Constants) -> tuple[Tensor, bool]:
    """The image to convolve at the target's resolution, and whether it is equalized already."""
    levels = g.plan.target
    if len(levels) == 1 and g.sizes[levels[0]] == g.size:
        return features[levels[0]], False
    index = list(levels)
    mean = None if c.mean is None else c.mean[index]
    std = None if c.inverse_std is None else c.inverse_std[index].reciprocal()
    fused = torch.ops.fastfuse.upsample_equalize_concat(
        [features[i] for i in levels], *g.size, mean, std, g.align_corners, True
    )
    return fused, True


def _weights_at_target(weight: Tensor, g: Geometry) -> Tensor:
    levels = g.plan.target
    if len(levels) == len(g.channels):
        return weight
    pieces = [weight[:, g.slice_of(i)] for i in levels]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    if not g.is_product:
        return torch.conv2d(x, _channels_last(weight), bias, padding=g.padding)
    out = _empty_image(x, x.shape[0], g.out_channels, *g.out_size)
    products = weight[:, :, 0, 0].t()
    if bias is None:
        torch.mm(_matrix(x), products, out=_matrix(out))
    else:
        torch.addmm(bias, _matrix(x), products, out=_matrix(out))
    return out


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
    g = geometry(
        [f.shape[1] for f in features],
        [(f.shape[2], f.shape[3]) for f in features],
        weight.shape[0],
        (height, width),
        weight.shape[2],
        padding,
        align_corners,
    )
    c = Constants.of(mean, std, weight.dtype)
    features = [_channels_last(f) for f in features]
    wide = torch.promote_types(weight.dtype, torch.float32)

    shifted, base_scale = list(g.plan.own), None  # levels whose mean the taps' offsets take off
    out = None
    if g.plan.target:
        x, equalized = _at_target(features, g, c)
        if not equalized:
            shifted += g.plan.target
            base_scale = c.scale(g.plan.target[0])
        sums_follow = bool(g.plan.own) or base_scale is not None or (c.mean is not None and shifted)
        out = _convolve(x, _weights_at_target(weight, g), None if sums_follow else bias, g)
        if not sums_follow:
            return out.contiguous(memory_format=memory_format(channels_last))

    accumulate = out is not None
    if out is None:
        out = _empty_image(features[0], features[0].shape[0], g.out_channels, *g.out_size)
    scales = None
    if c.inverse_std is not None:
        base = c.inverse_std.new_ones(1) if base_scale is None else base_scale
        scales = torch.cat([base, c.inverse_std[list(g.plan.own)]])
    offsets = None if c.mean is None or not shifted else _offsets(weight, g, c, shifted)
    bias = None if bias is None else bias.to(wide)
    memory = _Taps(g, out)
    for chunk in memory.chunks():
        images = memory.images(chunk)
        for i, taps in images.items():
            products = _tap_weights(weight, chunk, g.slice_of(i))
            torch.mm(_matrix(features[i]), products.t(), out=_matrix(taps))
        torch.ops.fastfuse.tap_sum_into(
            out[:, chunk],
            list(images.values()),
            scales,
            None if offsets is None else offsets[:, :, chunk].flatten(),
            None if bias is None else bias[chunk],
            accumulate,
            *g.tap_arguments,
        )
    return out.contiguous(memory_format=memory_format(channels_last))


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
        channels,
        list(zip(heights, widths, strict=True)),
        grad_output.shape[1],
        (height, width),
        kernel_size,
        padding,
        align_corners,
    )
    c = Constants.of(mean, std, grad_output.dtype)
    grad_output = _channels_last(grad_output)
    features = [_channels_last(f) for f in features]
    levels = [i for i, want in enumerate(wanted) if want]
    gradients: dict[int, Tensor] = {}
    weight_gradient = None
    if features:
        weight_gradient = torch.empty(
            (g.out_channels, sum(channels), kernel_size, kernel_size),
            dtype=grad_output.dtype,
            device=grad_output.device,
            memory_format=memory_format(weight_channels_last),
        )
        _advise_huge_pages(weight_gradient)

    shifted = list(g.plan.own)
    work = (grad_output, features, weight, g, c)
    if g.plan.target:
        at_target = [i for i in levels if i in g.plan.target]
        if not _gradients_at_target(*work, at_target, gradients, weight_gradient):
            shifted += g.plan.target
    at_own = [i for i in levels if i in g.plan.own]
    if at_own or (g.plan.own and weight_gradient is not None):
        _gradients_at_own(*work, at_own, gradients, weight_gradient)
    if weight_gradient is not None and c.mean is not None and shifted:
        sums = offsets_gradient(grad_output, height, width, kernel_size, padding)
        sums = sums.view(kernel_size, kernel_size, -1).permute(2, 0, 1)[:, None]
        for i in shifted:
            level = weight_gradient[:, g.slice_of(i)]
            level.copy_(level - c.shift(i) * sums)

    layout = memory_format(channels_last)
    result = [gradients[i].contiguous(memory_format=layout) for i in levels]
    return result if weight_gradient is None else [*result, weight_gradient]


def _gradients_at_target(
    grad_output: Tensor,
    features: Sequence[Tensor],
    weight: Tensor | None,
    g: Geometry,
    c: Constants,
    wanted: Sequence[int],
    gradients: dict[int, Tensor],
    weight_gradient: Tensor | None,
) -> bool:
    """Gradients of the levels convolved at the target's resolution; whether they were equalized."""
    levels = g.plan.target
    single = len(levels) == 1 and g.sizes[levels[0]] == g.size
    if not wanted and weight_gradient is None:
        return not single
    scale = c.scale(levels[0]) if single else None
    channels = sum(g.channels[i] for i in levels)
    x = None if weight_gradient is None else _at_target(features, g, c)[0]
    if x is None:  # only its shape counts
        x = grad_output.new_empty(1).expand(grad_output.shape[0], channels, *g.size)
    if weight is not None:
        weights = _channels_last(_weights_at_target(weight, g))
    else:
        shape = (g.out_channels, channels, g.kernel_size, g.kernel_size)
        weights = grad_output.new_empty(1).expand(shape)
    x_gradient, w_gradient, _ = torch.ops.aten.convolution_backward(
        grad_output, x, weights, None, [1, 1], [g.padding] * 2, [1, 1], False, [0, 0], 1,
        [bool(wanted), weight_gradient is not None, False],
    )  # fmt: skip
    if weight_gradient is not None:
        w_gradient = _scaled(w_gradient, scale)
        pieces = w_gradient.split([g.channels[i] for i in levels], dim=1)
        for i, piece in zip(levels, pieces, strict=True):
            weight_gradient[:, g.slice_of(i)] = piece
    if single and wanted:
        gradients[levels[0]] = _scaled(x_gradient, scale)
    elif wanted:
        offsets = [sum(g.channels[j] for j in levels if j < i) for i in wanted]
        std = None if c.inverse_std is None else c.inverse_std[list(wanted)].reciprocal()
        pieces = torch.ops.fastfuse.upsample_equalize_concat_backward(
            x_gradient, offsets, [g.channels[i] for i in wanted],
            [g.sizes[i][0] for i in wanted], [g.sizes[i][1] for i in wanted],
            std, g.align_corners, True,
        )  # fmt: skip
        gradients.update(zip(wanted, pieces, strict=True))
    return not single


def _gradients_at_own(
    grad_output: Tensor,
    features: Sequence[Tensor],
    weight: Tensor | None,
    g: Geometry,
    c: Constants,
    wanted: Sequence[int],
    gradients: dict[int, Tensor],
    weight_gradient: Tensor | None,
) -> None:
    """Gradients of the levels convolved at their own resolution, chunk by chunk of outputs."""
    k = g.kernel_size
    # Gradients of features sum over all chunks: narrow dtypes would round each partial sum.
    exact = grad_output.dtype in (torch.float32, torch.float64)
    memory = _Taps(g, grad_output, chunked=exact or not wanted)
    for i in wanted:
        gradients[i] = _empty_image(grad_output, grad_output.shape[0], g.channels[i], *g.sizes[i])
    for chunk in memory.chunks():
        for i, taps in memory.images(chunk).items():
            if i not in wanted and weight_gradient is None:
                continue
            torch.ops.fastfuse.tap_sum_backward_into(
                taps, grad_output[:, chunk], c.scale(i), *g.tap_arguments
            )
            if i in wanted:
                assert weight is not None
                products = _tap_weights(weight, chunk, g.slice_of(i))
                x_gradient = _matrix(gradients[i])
                if chunk.start == 0:
                    torch.mm(_matrix(taps), products, out=x_gradient)
                else:
                    torch.addmm(x_gradient, _matrix(taps), products, out=x_gradient)
            if weight_gradient is not None:
                products = torch.mm(_matrix(taps).t(), _matrix(features[i]))
                level = weight_gradient[chunk, g.slice_of(i)].permute(2, 3, 0, 1)
                level.copy_(products.view(k, k, -1, g.channels[i]))
