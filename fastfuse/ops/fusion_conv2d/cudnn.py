"""Convolutions of channels_last images on CUDA devices, by settings of the call.

PyTorch's convolution takes precision and determinism from the process, and of the two precisions
there the other one than its matrix products. Here cuDNN is told with each call: always one
algorithm that gives the same bits every time, TF32 where matrix products have it
(``torch.backends.cuda.matmul.fp32_precision``), and algorithms timed where the user wants them to
be (``torch.backends.cudnn.benchmark``). Of the weight's gradient cuDNN's deterministic algorithms
are the slow ones: it is a sum of matrix products.

Where cuDNN is missing or disabled PyTorch's convolution is a matrix product of patches, which has
the precision of matrix products and the same bits every time: nothing is to be told then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.ops.layout import as_matrix
from fastfuse.ops.matmul import wide_dtype, wide_product
from fastfuse.ops.memory import empty

__all__ = ["allows_tf32", "convolve", "input_gradient", "is_enabled", "weight_gradient"]


def is_enabled() -> bool:
    """Whether PyTorch has cuDNN and the user has not turned it off."""
    return torch.backends.cudnn.is_available() and bool(torch.backends.cudnn.enabled)


def allows_tf32() -> bool:
    """Whether float32 is rounded to TF32 in matrix products. (Asking by ``allow_tf32`` raises where
    it was set by ``fp32_precision``, and is deprecated.)"""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _options(padding: int) -> tuple[list[int], list[int], list[int], int]:
    """padding, stride, dilation, groups"""
    return [padding, padding], [1, 1], [1, 1], 1


def _settings() -> tuple[bool, bool, bool]:
    """benchmark, deterministic, allow_tf32"""
    return bool(torch.backends.cudnn.benchmark), True, allows_tf32()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """The convolution, of one dtype, but for the bias, which may be wider."""
    if is_enabled() and x.numel():
        out: Tensor = torch.ops.aten.cudnn_convolution(x, weight, *_options(padding), *_settings())
    else:
        out = torch.conv2d(x, weight, None, padding=padding)
    return out if bias is None else out.add_(bias[:, None, None])


def input_gradient(grad_output: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The gradient of the convolution's input: for a 1x1 kernel a product with the weight."""
    kernel_size = weight.shape[2]
    batch, _, *size = grad_output.shape
    height, width = (extent + kernel_size - 1 - 2 * padding for extent in size)
    shape = (batch, weight.shape[1], height, width)
    if kernel_size == 1 and padding == 0:
        gradient = empty(shape, grad_output, torch.channels_last)
        torch.mm(as_matrix(grad_output), weight[:, :, 0, 0], out=as_matrix(gradient))
        return gradient
    _, stride, dilation, groups = _options(padding)
    if not is_enabled() or not grad_output.numel():
        x = grad_output.new_empty(1).expand(shape)  # only its shape counts
        found: Tensor = torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, stride, [padding, padding], dilation, False, [0, 0],
            groups, [True, False, False],
        )[0]  # fmt: skip
        return found
    gradient = torch.ops.aten.cudnn_convolution_transpose(
        grad_output, weight, [padding, padding], [0, 0], stride, dilation, groups, *_settings()
    )
    return gradient


def weight_gradient(grad_output: Tensor, x: Tensor, kernel_size: int, padding: int) -> Tensor:
    """The gradient of the weight, (k * k, C_out, C_in), as wide as products are.

    Both images are laid out on one grid, a little wider and higher than they are, with zeros
    beside them. There a tap's shift is a number of pixels, over the ends of rows too, so that its
    gradient is one product of two ranges of pixels; no patch is copied. The zeros to the right of a
    row serve as those to the left of the next, those below an image as those above the next. An
    infinity meets them: it makes NaNs of taps that would not have read it.
    """
    batch, channels, height, width = x.shape
    _, out_channels, out_height, out_width = grad_output.shape
    rows = max(height + padding, out_height)
    columns = max(width + padding, out_width)
    gradients = _pixels(grad_output, rows, columns, 0)
    pixels = _pixels(x, rows, columns, padding * (columns + 1))
    count = ((batch - 1) * rows + out_height - 1) * columns + out_width if batch else 0
    memory = x.new_empty(0, dtype=wide_dtype(x))
    taps = empty((kernel_size**2, out_channels, channels), memory)
    transposed = gradients[:count].t()
    for tap in range(kernel_size**2):
        start = tap // kernel_size * columns + tap % kernel_size
        wide_product(transposed, pixels[start : start + count], taps[tap])
    return taps


def _pixels(image: Tensor, rows: int, columns: int, before: int) -> Tensor:
    """The pixels of a grid with an image in the corner of each of its images, (pixels, C), and some
    of zeros before them; as it is where it has all of the grid."""
    batch, channels, height, width = image.shape
    if (height, width, before) == (rows, columns, 0):
        return as_matrix(image)
    pixels = image.new_zeros(before + batch * rows * columns, channels)
    grid = pixels[before:].view(batch, rows, columns, channels)
    grid[:, :height, :width].copy_(image.permute(0, 2, 3, 1))
    return pixels
