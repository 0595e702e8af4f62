"""Images between contiguous and channels_last memory."""

from __future__ import annotations

import pytest
import torch
from inputs import both_layouts, every_dtype, images
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from fastfuse.ops.layout import (
    is_channels_last,
    memory_format,
    prefer_memory_format,
    to_memory_format,
)

SHAPES = [(2, 37, 9, 13), (1, 64, 8, 8), (3, 5, 1, 70), (1, 1, 4, 4), (2, 16, 1, 1), (0, 3, 2, 2),
          (1, 130, 65, 3)]  # fmt: skip


@pytest.mark.walks_memory
@both_layouts
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_arrives(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    (x,) = images(shape, dtype=dtype, channels_last=not channels_last)
    if dtype == torch.bfloat16 and x.numel():
        x.view(torch.int16)[0, 0, 0, 0] = 1  # a subnormal, which arithmetic might lose
        x.view(torch.int16)[-1, -1, -1, -1] = 0x7FA1  # a signalling NaN
    y = to_memory_format(x, channels_last)
    assert y.is_contiguous(memory_format=memory_format(channels_last))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(y.contiguous().view(bits), x.contiguous().view(bits))


def test_an_image_in_the_layout_is_itself() -> None:
    (x,) = images((2, 3, 4, 5))
    assert to_memory_format(x, False) is x
    sliced = x[:, 1:, ::2]
    assert torch.equal(to_memory_format(sliced, True), sliced)
    assert is_channels_last([to_memory_format(sliced, True)])


@pytest.mark.walks_memory
def test_other_strides_are_refused() -> None:
    with pytest.raises(RuntimeError, match="copy_layout: image must be dense"):
        torch.ops.fastfuse.copy_layout(torch.randn(2, 3, 4, 5)[:, ::2], True)


@both_layouts
def test_conversion_in_modules(channels_last: bool) -> None:
    """With derivatives of every order, within PyTorch's machinery, and in torch.func."""
    (x,) = images((2, 3, 4, 5), dtype=torch.float64, channels_last=not channels_last)
    x.requires_grad_()
    opcheck(torch.ops.fastfuse.copy_layout.default, (x, channels_last))
    assert gradcheck(prefer_memory_format, (x, channels_last))
    assert gradgradcheck(prefer_memory_format, (x, channels_last))
    tangent = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    prefer = lambda v: prefer_memory_format(v, channels_last)  # noqa: E731
    _, result = torch.func.jvp(prefer, (x.detach(),), (tangent,))
    assert torch.equal(result, tangent)
