"""upsample_equalize_concat's Triton kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfuse import upsample_equalize_concat
from fastfuse.backends import DTYPES
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.gpu

both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def upernet(dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(1, 512, 128 >> i, 128 >> i)
        .to("cuda", dtype)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
        for i in range(4)
    ]


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_cpu_and_itself(dtype: torch.dtype, channels_last: bool) -> None:
    """UPerNet's shapes: within tolerance of the CPU kernels, and the same bits every time."""
    features = upernet(dtype, channels_last)
    std = [0.5, 1.0, 1.5, 2.0]
    runs = []
    for _ in range(3):
        output = upsample_equalize_concat(features, std=std)
        runs.append([output, *torch.autograd.grad(output, features, torch.ones_like(output))])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
    copies = [f.detach().cpu().requires_grad_() for f in features]
    output = upsample_equalize_concat(copies, std=std)
    expected = [output, *torch.autograd.grad(output, copies, torch.ones_like(output))]
    for mine, theirs in zip(runs[0], expected, strict=True):
        assert relative_error(mine.cpu(), theirs) <= 2 * tolerance(dtype, reduction=64)


def test_compiles_and_runs_in_a_cuda_graph() -> None:
    torch._dynamo.reset()
    features = [f.detach() for f in upernet(torch.bfloat16, True)]
    mean, std = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda") * 2

    def step(features: list[Tensor]) -> Tensor:
        return upsample_equalize_concat(features, mean=mean, std=std)

    expected = step(features)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(features), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(features)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_any_strides() -> None:
    (a, b, *_) = (f.detach() for f in upernet(torch.float32, True))
    features = [a[:, 3:50:2, 5:90, 7:40], b[:, :20].transpose(2, 3)]
    result = upsample_equalize_concat(features)
    dense = upsample_equalize_concat([f.contiguous() for f in features])
    assert relative_error(result, dense) <= tolerance(torch.float32)
