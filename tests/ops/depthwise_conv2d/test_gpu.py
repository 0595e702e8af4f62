"""depthwise_conv2d's Triton kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from inputs import both_layouts, every_dtype
from torch import Tensor

from fastfuse import depthwise_conv2d
from fastfuse.ops.depthwise_conv2d.reference import reference
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.gpu


def cednet(
    dtype: torch.dtype, channels_last: bool, shape: tuple[int, ...] = (2, 96, 64, 64), k: int = 7
) -> list[Tensor]:
    """An image, a weight and a bias."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, weight, bias = (
        torch.randn(s, device="cuda").to(dtype)
        for s in (shape, (shape[1], 1, k, k), (shape[1],))
    )  # fmt: skip
    return [x.contiguous(memory_format=memory_format), weight, bias]


@both_layouts
@every_dtype
@pytest.mark.parametrize("flip", [False, True])
def test_flip_and_addend(flip: bool, dtype: torch.dtype, channels_last: bool) -> None:
    """Turned by 180 degrees and added to something, of any strides; rounded once."""
    for shape, k, dilation in (((2, 19, 9, 70), 7, 1), ((1, 33, 8, 7), 5, 2), ((1, 3, 4, 5), 9, 1)):
        x, weight, bias = cednet(dtype, channels_last, shape, k)
        larger = torch.randn(shape[0], shape[1] + 1, *shape[2:], device="cuda").to(dtype)
        turned = weight.flip(2, 3) if flip else weight
        exact = reference(x.double(), turned.double(), bias.double(), dilation)
        for addend in (larger[:, 1:], x, larger[:1, :1, :1].expand(shape)):
            result = torch.ops.fastfuse.depthwise_conv2d(
                x, weight, bias, addend, dilation, flip, channels_last
            )
            assert relative_error(result, exact + addend.double()) <= tolerance(dtype)


@both_layouts
def test_empty_inputs(channels_last: bool) -> None:
    for shape in ((0, 5, 4, 4), (2, 0, 4, 4)):
        leaves = [t.requires_grad_() for t in cednet(torch.float32, channels_last, shape, 3)]
        output = depthwise_conv2d(*leaves)
        assert output.shape == shape
        for gradient in torch.autograd.grad(output.sum(), leaves):
            assert not gradient.any()
