"""Launches of the package on tensors that kernels cannot take as they are (in test_launches.py: how
calls are run)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cuda.examples import integers, skip_without_nvcc
from cuda.launch import Launcher
from torch import Tensor

from fastfuse.ops.depthwise_conv2d import cuda as depthwise_conv2d
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
