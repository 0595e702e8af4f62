"""fusion_conv2d on a CUDA device: PyTorch's products and convolutions, tap_sum's Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastfuse import fusion_conv2d
from fastfuse.backends import DTYPES
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.gpu

both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """PyTorch's float32 convolutions may round their inputs to TF32."""
    usual, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = usual


def upernet(
    dtype: torch.dtype, channels_last: bool, size: int = 128
) -> tuple[list[Tensor], Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    levels = [
        torch.randn(1, 256, size >> i, size >> i, device="cuda")
        .to(dtype)
        .contiguous(memory_format=memory_format)
        for i in range(4)
    ]
    weight = torch.randn(256, 1024, 3, 3, device="cuda") / 96
    return levels, weight.to(dtype).contiguous(memory_format=memory_format)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_cpu_and_itself(dtype: torch.dtype, channels_last: bool) -> None:
    levels, weight = upernet(dtype, channels_last, size=64)
    inputs = [x.requires_grad_() for x in (*levels, weight)]
    runs = []
    for _ in range(3):
        output = fusion_conv2d(levels, weight)
        runs.append((output, *torch.autograd.grad(output, inputs, torch.ones_like(output))))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
    copies = [x.detach().cpu().requires_grad_() for x in inputs]
    output = fusion_conv2d(copies[:-1], copies[-1])
    theirs = (output, *torch.autograd.grad(output, copies, torch.ones_like(output)))
    limit = tolerance(dtype, reduction=9 * 1024, roundings=2)
    for a, b in zip(runs[0], theirs, strict=True):
        assert relative_error(a.cpu(), b) <= limit


def test_compiles_and_runs_in_a_cuda_graph() -> None:
    torch._dynamo.reset()
    levels, weight = upernet(torch.bfloat16, True)
    std = torch.rand(4, device="cuda") + 0.5

    def step(levels: list[Tensor], weight: Tensor) -> Tensor:
        return fusion_conv2d(levels, weight, std=std)

    expected = step(levels, weight)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(levels, weight), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(levels, weight)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)
