"""upsample_add's Triton kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from inputs import both_layouts, images
from torch import Tensor

from fastfuse import upsample_add
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.gpu


def _pair(dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    pair = images((1, 512, 64, 64), (1, 512, 128, 128), dtype=dtype, channels_last=channels_last)
    return [t.cuda().requires_grad_() for t in pair]


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_cpu_and_itself(dtype: torch.dtype, channels_last: bool) -> None:
    """Within tolerance of the CPU kernels, and the same bits every time."""
    pair = _pair(dtype, channels_last)
    runs = []
    for _ in range(3):
        output = upsample_add(*pair)
        runs.append([output, *torch.autograd.grad(output, pair, torch.ones_like(output))])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
    copies = [t.detach().cpu().requires_grad_() for t in pair]
    output = upsample_add(*copies)
    expected = [output, *torch.autograd.grad(output, copies, torch.ones_like(output))]
    for mine, theirs in zip(runs[0], expected, strict=True):
        assert relative_error(mine.cpu(), theirs) <= 2 * tolerance(dtype, reduction=16)


def test_compiles_and_runs_in_a_cuda_graph() -> None:
    torch._dynamo.reset()
    x, skip = (t.detach() for t in _pair(torch.bfloat16, True))
    expected = upsample_add(x, skip)
    torch.testing.assert_close(torch.compile(upsample_add, fullgraph=True)(x, skip), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = upsample_add(x, skip)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_any_strides() -> None:
    x, skip = (t.detach() for t in _pair(torch.float32, True))
    for a, b in (
        (x[:, 3:50:2, 5:60, 7:40], skip[:, 400:424, :, ::2].transpose(2, 3)),
        (x[:, :20], skip[:, :20, 3:67, 5:69]),  # of the same size
    ):
        dense = upsample_add(a.contiguous(), b.contiguous())
        assert relative_error(upsample_add(a, b), dense) <= tolerance(torch.float32)
