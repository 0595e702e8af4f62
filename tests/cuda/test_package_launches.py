"""Launches of the package on tensors that kernels cannot take as they are (in test_launches.py: how
calls are run)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda.examples import integers, skip_without_nvcc
from cuda.launch import Launcher
from torch import Tensor

from fastfuse.ops.depthwise_conv2d import cuda as depthwise_conv2d
from fastfuse.ops.tap_sum import cuda as tap_sum
from fastfuse.ops.upsample_cross_entropy import cuda as upsample_cross_entropy


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    skip_without_nvcc()


def _image(*shape: int) -> Tensor:
    return integers(*shape).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def _default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_default_dtype")
def test_another_default_dtype() -> None:
    """What kernels sum and write in float32 has room for it."""
    x, grad, logits = _image(2, 8, 5, 6), _image(2, 8, 5, 6), integers(1, 3, 2, 2)
    target = torch.ones(1, 4, 4, dtype=torch.int64)
    with Launcher(seed=3) as launcher:
        _, grad_bias = depthwise_conv2d.backward_weight(grad, x, 3, 1)
        loss, _ = upsample_cross_entropy.forward(logits, target, None, -100, 0.0, False)
    assert len(launcher.launched) == 2
    assert torch.equal(grad_bias, grad.sum((0, 2, 3)))
    upsampled = F.interpolate(logits, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(loss, F.cross_entropy(upsampled, target, reduction="none"))


def _part(tensor: Tensor) -> Tensor:
    """The same, from the second element of another tensor on."""
    flat = torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.flatten()])
    return flat[1:].view(tensor.shape)


WAYS = pytest.mark.parametrize("way", [{"seed": 3}, {"arch": "sm_90a"}], ids=str)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_at_any_address(way: dict[str, Any], dtype: torch.dtype) -> None:
    x, taps = _image(1, 8, 5, 6).to(dtype), _image(1, 72, 4, 4).to(dtype)
    weight, bias = integers(8, 1, 3, 3, dtype=dtype), integers(8, dtype=dtype)
    offsets, vector = integers(72), integers(8)
    geometry = (8, 8, 3, 1, False, True)
    results = []
    for change in (torch.clone, _part):
        out = torch.empty(1, 8, 8, 8, dtype=dtype, memory_format=torch.channels_last)
        with Launcher(**way) as launcher:
            convolved = depthwise_conv2d.forward(
                x, change(weight), change(bias), None, 1, False, True
            )
            tap_sum.forward_into(
                out, [taps], None, change(offsets), change(vector), False, *geometry
            )
        assert len(launcher.launched) == 2
        results.append((convolved, out))
    for aligned, other in zip(*results, strict=True):
        assert torch.equal(aligned, other)


CPU = torch.device("cpu")


def test_images_too_large_for_tap_sum() -> None:
    """Offsets within an image are of 32 bits, along whichever axis they are far."""

    def covered(stride: tuple[int, ...]) -> bool:
        out = (1, 4, 8, 8), (256, 1, 32, 4), torch.float32
        taps = (1, 36, 4, 4), stride, torch.float32
        plan = tap_sum._forward_launch(CPU, out, (taps,), False, (8, 8, 3, 1, False, True))
        return plan is not None

    assert covered((576, 1, 144, 36))
    assert covered((2**27, 1, 36, 2**25))
    assert not covered((2**30, 1, 36, 2**28))
    assert not covered((2**30, 1, 2**28, 36))


def test_images_too_large_for_depthwise_conv2d() -> None:
    def covered(pixel: int, dilation: int, height: int = 9) -> bool:
        out = (2**14, 1, 2**10, 8)
        stride, dtypes = (2**40, 1, 2**35, pixel), (torch.float32, torch.float32)
        args = (2**10, 8, height, 2**15), (stride, out, out), 3, dilation, False
        return depthwise_conv2d._sizes(dtypes, *args) is not None

    assert covered(2**16, 2**9)
    assert not covered(2**16, 2**10)
    assert not covered(2**32 + 8, 1)
    assert not covered(8, 1, height=2**20)


def test_dilation_beyond_the_image() -> None:
    x, weight = _image(1, 8, 5, 6), integers(8, 1, 3, 3)
    with Launcher(seed=3):
        results = [
            depthwise_conv2d.forward(x, weight, None, None, dilation, False, True)
            for dilation in (6, 2**15, 2**31 - 1)
        ]
    assert all(
        torch.equal(result, x * weight[:, :, 1:2, 1:2].view(1, 8, 1, 1)) for result in results
    )
