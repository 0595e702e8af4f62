"""tap_sum's Triton kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfuse.backends import DTYPES
from fastfuse.ops.tap_sum.samples import exact
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.gpu

both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

SIZE = (128, 128)


def upernet(dtype: torch.dtype, channels_last: bool, ratio: int = 2) -> Tensor:
    """The taps of a 3x3 convolution to 512 channels."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return (
        torch.randn(1, 9 * 512, SIZE[0] // ratio, SIZE[1] // ratio, device="cuda")
        .to(dtype)
        .contiguous(memory_format=memory_format)
    )


@both_layouts
@every_dtype
def test_into_slices_of_the_channels(dtype: torch.dtype, channels_last: bool) -> None:
    """All levels in one launch, rounded once, and a scaled gradient."""
    wide = torch.promote_types(dtype, torch.float32)
    levels = [upernet(dtype, channels_last, ratio)[:, : 9 * 64] for ratio in (2, 4, 8)]
    whole = torch.randn(1, 192, *SIZE, device="cuda").to(dtype)
    if channels_last:
        whole = whole.contiguous(memory_format=torch.channels_last)
    before, out = whole.clone(), whole[:, 64:128]
    scales, offsets, bias = (torch.randn(n, dtype=wide, device="cuda") for n in (4, 9 * 64, 64))
    geometry = (*SIZE, 3, 1, False)
    torch.ops.fastfuse.tap_sum_into(
        out, levels, scales, offsets, bias, True, *geometry, channels_last
    )
    expected = scales[0].double() * before[:, 64:128].double() + bias.double()[:, None, None]
    for level, scale in zip(levels, scales[1:].double(), strict=True):
        expected += scale * exact(level, None, SIZE, 3, 1, False, dtype)
    nothing = torch.zeros(1, 9 * 64, 1, 1, device="cuda")
    expected += exact(nothing, offsets, SIZE, 3, 1, False, dtype)
    assert relative_error(out, expected) <= tolerance(dtype)
    assert torch.equal(whole[:, :64], before[:, :64])
    assert torch.equal(whole[:, 128:], before[:, 128:])

    gradient = torch.zeros_like(levels[1])
    grad_output = before[:, 64:128]
    torch.ops.fastfuse.tap_sum_backward_into(
        gradient, grad_output, scales[:1], *geometry, channels_last
    )
    taps = levels[1].double().requires_grad_()
    exact(taps, None, SIZE, 3, 1, False, dtype).backward(grad_output.double())
    assert taps.grad is not None
    error = relative_error(gradient, scales[0].double() * taps.grad)
    assert error <= tolerance(dtype, reduction=64)
