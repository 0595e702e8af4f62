"""The levels of a fusion that are convolved at the target's resolution: by PyTorch's convolution or
product, or by Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import steps_of
from fastfuse.ops.fusion_conv2d import cudnn, winograd
from fastfuse.ops.fusion_conv2d.shape import Gradients
from fastfuse.ops.fusion_conv2d.strategy import Scaled, Strategy
from fastfuse.ops.layout import as_matrix, to_memory_format
from fastfuse.ops.matmul import matmul_into
from fastfuse.ops.memory import empty

__all__ = ["CudnnConvolution", "LibraryConvolution", "TargetResolution", "WinogradConvolution"]


class TargetResolution(Strategy):
    """Levels brought to the target's size, if they are of another, and convolved as one."""

    takes_several = False  # inputs of one size, without their concatenation

    @property
    def equalizes_first(self) -> bool:
        """Whether inputs are upsampled, equalized and concatenated before: levels of other sizes,
        or several where the convolution takes one."""
        resized = any(self.shape.sizes[i] != self.shape.size for i in self.levels)
        return resized or (len(self.levels) > 1 and not self.takes_several)

    def forward(self, features: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Scaled:
        """The levels' convolution in the dtype of the weight; with the bias, of that or a wider
        dtype, unless it is still to be scaled."""
        raise NotImplementedError

    def _inputs(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What is convolved: equalized, or less the means."""
        if not self.equalizes_first:
            return [self.equalization.centered(features[i], i) for i in self.levels]
        fused = steps_of(features[0].device.type).upsample_equalize_concat(
            [features[i] for i in self.levels],
            *self.shape.size,
            *self.equalization.mean_and_std(self.levels),
            self.shape.align_corners,
            True,
        )
        return [fused]

    def _weights(self, weight: Tensor, levels: Sequence[int]) -> Tensor:
        if len(levels) == len(self.shape.channels):
            return weight
        pieces = [weight[:, self.shape.slice_of(i)] for i in levels]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _split(self, gradient: Tensor, axis: int) -> Sequence[Tensor]:
        """Along the inputs of all levels, by level."""
        return gradient.split([self.shape.channels[i] for i in self.levels], axis)

    def _to_levels(self, gradient: Tensor, gradients: Gradients) -> None:
        """The gradient of upsampled, equalized, concatenated levels goes to those that want it."""
        wanted, shape = gradients.wanted_of(self.levels), self.shape
        pieces = steps_of(gradient.device.type).upsample_equalize_concat_backward(
            gradient,
            [sum(shape.channels[j] for j in self.levels if j < i) for i in wanted],
            [shape.channels[i] for i in wanted],
            [shape.sizes[i][0] for i in wanted],
            [shape.sizes[i][1] for i in wanted],
            self.equalization.mean_and_std(wanted)[1],
            shape.align_corners,
            True,
        )
        gradients.found.update(zip(wanted, pieces, strict=True))


# ---- the library --------------------------------------------------------------------------------


class LibraryConvolution(TargetResolution):
    """PyTorch's convolution, or one product where the kernel is 1x1."""

    @property
    def is_product(self) -> bool:
        return self.shape.kernel_size == 1 and self.shape.padding == 0

    @property
    def _scaled_level(self) -> int | None:
        """The level whose 1 / std is left to do: the one there is then."""
        equalized = self.equalizes_first or self.equalization.inverse_std is None
        return None if equalized else self.levels[0]

    def forward(self, features: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Scaled:
        shape, level = self.shape, self._scaled_level
        bias = bias if level is None else None
        weights = self._weights(weight, self.levels)
        if self.is_product:
            out = empty(shape.out_shape, weight, torch.channels_last)
            if self.equalizes_first:
                (x,), center = self._inputs(features), None
            else:
                x, center = features[self.levels[0]], self.equalization.center(self.levels[0])
            bias = None if bias is None else bias.to(weight.dtype)
            matmul_into(as_matrix(out), as_matrix(x), weights[:, :, 0, 0], bias, center)
            return Scaled(out, level)
        (x,) = self._inputs(features)
        out = self._convolve(x.to(weight.dtype), to_memory_format(weights, True), bias)
        return Scaled(to_memory_format(out, True), level)  # of one channel it may come contiguous

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(weight.dtype)
        return torch.conv2d(x, weight, bias, padding=self.shape.padding)

    def backward(
        self,
        grad_output: Tensor,
        features: Sequence[Tensor],
        weight: Tensor | None,
        gradients: Gradients,
    ) -> None:
        level, wanted = self._scaled_level, gradients.wanted_of(self.levels)
        scale = None if level is None else self.equalization.scale(level)
        x = weights = None
        if gradients.weight is not None:
            x = self._inputs(features)[0].to(grad_output.dtype)
        if wanted:
            assert weight is not None
            weights = to_memory_format(self._weights(weight, self.levels), True)
        x_gradient, taps = self._gradients(grad_output, x, weights)
        if taps is not None:
            pieces = self._split(self._multiplied(taps, scale), -1)
            for i, piece in zip(self.levels, pieces, strict=True):
                gradients.write_weight(i, slice(None), piece)
        if x_gradient is None:
            return
        if self.equalizes_first:
            self._to_levels(x_gradient, gradients)
        else:
            gradients.found[self.levels[0]] = self._multiplied(x_gradient, scale)

    def _multiplied(self, fresh: Tensor, scale: Tensor | None) -> Tensor:
        """In the accumulation dtype, which is that of ``scale``, and rounded once."""
        return fresh if scale is None else (fresh * scale).to(fresh.dtype)

    def _gradients(
        self, grad_output: Tensor, x: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the input, if there is a weight, and of the weight, if there is an input: the latter
        tap-major, (..., C_out, C_in)."""
        shape = self.shape
        channels = sum(shape.channels[i] for i in self.levels)
        wanted = [weight is not None, x is not None, False]
        # Where a tensor is not needed only its shape counts.
        if x is None:
            x = grad_output.new_empty(1).expand(shape.batch, channels, *shape.size)
        if weight is None:
            kernel = shape.kernel_size, shape.kernel_size
            weight = grad_output.new_empty(1).expand(shape.out_channels, channels, *kernel)
        x_gradient, w_gradient, _ = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, [1, 1], [shape.padding] * 2, [1, 1], False, [0, 0],
            1, wanted,
        )  # fmt: skip
        return x_gradient, None if w_gradient is None else w_gradient.permute(2, 3, 0, 1)

    def described(self, products: str, sums: str) -> str:
        return (
            f"by torch.mm in {products}"
            if self.is_product
            else f"by the library's convolution in {products}"
        )


class CudnnConvolution(LibraryConvolution):
    """By settings of the call, and with the weight's gradient from products."""

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cudnn.convolve(x, weight, bias, self.shape.padding)

    def _multiplied(self, fresh: Tensor, scale: Tensor | None) -> Tensor:
        """In one pass: there PyTorch's kernels take tensors of two dtypes."""
        return fresh if scale is None else fresh.mul_(scale)

    def _gradients(
        self, grad_output: Tensor, x: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        kernel_size, padding = self.shape.kernel_size, self.shape.padding
        x_gradient = taps = None
        if x is not None:
            taps = cudnn.weight_gradient(grad_output, x, kernel_size, padding)
        if weight is not None:
            x_gradient = cudnn.input_gradient(grad_output, weight, padding)
            x_gradient = to_memory_format(x_gradient, True)
        return x_gradient, taps


# ---- Winograd's algorithm -----------------------------------------------------------------------


class WinogradConvolution(TargetResolution):
    """F(4x4, 3x3), of several inputs without their concatenation; scales go into the weight."""

    takes_several = True

    def forward(self, features: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Scaled:
        shape = self.shape
        out = empty(shape.out_shape, weight, torch.channels_last)
        taps = self._taps(weight, self.levels)
        winograd.convolve(out, self._inputs(features), taps, bias, shape.padding)
        return Scaled(out, None)

    def backward(
        self,
        grad_output: Tensor,
        features: Sequence[Tensor],
        weight: Tensor | None,
        gradients: Gradients,
    ) -> None:
        equalized = self.equalizes_first
        if gradients.weight is not None:
            self._weight_gradient(grad_output, self._inputs(features), gradients)
        wanted = gradients.wanted_of(self.levels)
        if not wanted:
            return
        assert weight is not None
        if equalized:
            self._to_levels(self._input_gradient(grad_output, weight, self.levels), gradients)
            return
        for i in wanted:
            gradients.found[i] = self._input_gradient(grad_output, weight, [i])

    def _weight_gradient(
        self, grad_output: Tensor, inputs: Sequence[Tensor], gradients: Gradients
    ) -> None:
        shape, memory = self.shape, gradients.weight
        assert memory is not None
        scaled = self.equalization.inverse_std is not None and not self.equalizes_first
        dtype = accumulation_dtype(memory.dtype)
        if len(self.levels) == len(shape.channels) and memory.dtype == dtype and not scaled:
            taps = memory.permute(2, 3, 0, 1).flatten(0, 1)  # a view
            winograd.weight_gradient(taps, grad_output, inputs, shape.padding)
            return
        channels = sum(shape.channels[i] for i in self.levels)
        taps = memory.new_empty((9, shape.out_channels, channels), dtype=dtype)
        winograd.weight_gradient(taps, grad_output, inputs, shape.padding)
        if scaled:
            taps *= self._per_channel(self.levels)
        for i, piece in zip(self.levels, self._split(taps, 2), strict=True):
            gradients.write_weight(i, slice(None), piece)

    def _input_gradient(self, grad_output: Tensor, weight: Tensor, levels: Sequence[int]) -> Tensor:
        shape = self.shape
        channels = sum(shape.channels[i] for i in levels)
        size = (shape.batch, channels, *shape.size)
        gradient = empty(size, grad_output, torch.channels_last)
        winograd.input_gradient(gradient, grad_output, self._taps(weight, levels), shape.padding)
        return gradient

    def _taps(self, weight: Tensor, levels: Sequence[int]) -> Tensor:
        """The levels' weights as (k * k, C_out, C_in), over their std unless the inputs are."""
        weights = self._weights(weight, levels)
        taps = weights.permute(2, 3, 0, 1).reshape(-1, self.shape.out_channels, weights.shape[1])
        if self.equalization.inverse_std is None or self.equalizes_first:
            return taps
        return taps * self._per_channel(levels)

    def _per_channel(self, levels: Sequence[int]) -> Tensor:
        inverse_std = self.equalization.inverse_std
        assert inverse_std is not None
        return torch.cat([inverse_std[i].expand(self.shape.channels[i]) for i in levels])

    def described(self, products: str, sums: str) -> str:
        return f"by Winograd's F(4x4, 3x3) in {sums}"  # float32 for all narrower
