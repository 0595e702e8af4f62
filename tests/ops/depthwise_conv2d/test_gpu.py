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
@pytest.mark.parametrize(("k", "dilation"), [(7, 1), (7, 3), (3, 12), (9, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_cpu_and_itself(
    dtype: torch.dtype, k: int, dilation: int, channels_last: bool
) -> None:
    """CEDNet's shapes: within tolerance of the CPU kernels, and the same bits every time."""
    leaves = [t.requires_grad_() for t in cednet(dtype, channels_last, k=k)]
    cotangent = torch.randn_like(leaves[0])
    runs = []
    for _ in range(3):
        output = depthwise_conv2d(*leaves, dilation=dilation)
        runs.append((output, *torch.autograd.grad(output, leaves, cotangent)))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
    copies = [t.detach().cpu().requires_grad_() for t in leaves]
    output = depthwise_conv2d(*copies, dilation=dilation)
    theirs = (output, *torch.autograd.grad(output, copies, cotangent.cpu()))
    pixels = leaves[0].numel() // leaves[0].shape[1]
    for a, b, reduction in zip(runs[0], theirs, (1, 1, pixels, pixels), strict=True):
        assert relative_error(a.cpu(), b) <= 2 * tolerance(dtype, reduction=reduction)


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


def test_compiles_and_runs_in_a_cuda_graph() -> None:
    torch._dynamo.reset()
    x, weight, bias = cednet(torch.bfloat16, True)

    def step(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, bias, dilation=3)

    expected = step(x)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_any_strides() -> None:
    whole, weight, bias = cednet(torch.float32, True)
    for x in (
        whole[:, 3:93:2, 5:60, 7:40],
        whole[:, :45].transpose(2, 3),
        whole[:, :1].expand(-1, 45, -1, -1),
    ):
        for w in (weight[:45], weight[:1].expand(45, -1, -1, -1), weight[:45].mT):
            result = depthwise_conv2d(x, w, bias[:90:2])
            dense = depthwise_conv2d(x.contiguous(), w.contiguous(), bias[:90:2].clone())
            assert relative_error(result, dense) <= tolerance(torch.float32)
