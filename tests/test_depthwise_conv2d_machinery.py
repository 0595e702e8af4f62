"""depthwise_conv2d in PyTorch's machinery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, depthwise_conv2d
from fastfuse.backends import BackendError

OPS = torch.ops.fastfuse


def inputs(dtype: torch.dtype = torch.float32, channels: int = 6, k: int = 5) -> list[Tensor]:
    shapes = ((2, channels, 9, 8), (channels, 1, k, k), (channels,))
    return [torch.randn(s).to(dtype) for s in shapes]


def _op_inputs() -> list[tuple[Any, tuple[Any, ...]]]:
    forward = OPS.depthwise_conv2d.default
    backward = OPS.depthwise_conv2d_backward_weight.default
    x, weight, bias = (t.requires_grad_() for t in inputs())
    last = x.detach().contiguous(memory_format=torch.channels_last)
    addend = torch.randn_like(x).requires_grad_()
    return [
        (forward, (x, weight, bias, None, 1, False, False)),
        (forward, (last, weight, None, None, 2, False, True)),
        (forward, (x, weight, bias, addend, 2, True, True)),
        (forward, (last, weight.detach(), None, last, 1, True, False)),
        (backward, (addend, x, 5, 2)),
        (backward, (addend.detach(), last, 3, 1)),
    ]


@pytest.mark.parametrize("case", range(6))
def test_opcheck(case: int) -> None:
    op, args = _op_inputs()[case]
    torch.library.opcheck(op, args)


def _step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return depthwise_conv2d(x.relu(), weight, bias, dilation=2).relu() * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(any_backend: str, dynamic: bool) -> None:
    """One graph, forward and backward, static and dynamic shapes."""
    torch._dynamo.reset()
    compiler = "inductor" if any_backend == "cpu" and dynamic else "aot_eager"
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for height in (12, 20) if dynamic else (12,):
        _, weight, bias = inputs()
        x = torch.randn(2, 6, height, height + 4).contiguous(memory_format=torch.channels_last)
        results = []
        for function in (_step, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            output = function(*leaves)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-3)
            assert graph.stride() == eager.stride()


def test_compile_with_a_backend_inside() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with backend("cpu"):
            return depthwise_conv2d(x, weight, bias)

    tensors = inputs()
    torch.testing.assert_close(step(*tensors), depthwise_conv2d(*tensors))


def test_export() -> None:
    class Convolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 1, 7, 7))

        def forward(self, x: Tensor) -> Tensor:
            return depthwise_conv2d(x, self.weight, dilation=3)

    convolution = Convolution()
    dims = {0: torch.export.Dim("batch", min=1, max=8), 3: torch.export.Dim("width", min=4, max=99)}
    program = torch.export.export(
        convolution, tuple(images((2, 6, 8, 8))), dynamic_shapes={"x": dims}
    )
    assert any("fastfuse.depthwise_conv2d" in str(node.target) for node in program.graph.nodes)
    (x,) = images((5, 6, 8, 23))
    torch.testing.assert_close(program.module()(x), convolution(x))


def test_autocast_casts_everything(any_backend: str) -> None:
    x, weight, bias = leaves = [t.requires_grad_() for t in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = depthwise_conv2d(x, weight, bias)
        mixed = depthwise_conv2d(x.bfloat16(), weight, bias.bfloat16())
        without_bias = depthwise_conv2d(x, weight)
        double = depthwise_conv2d(*(t.double() for t in leaves))
    assert output.dtype == mixed.dtype == without_bias.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    with torch.no_grad():
        expected = depthwise_conv2d(*(t.bfloat16() for t in leaves))
    assert torch.equal(output, expected)
    assert torch.equal(mixed, expected)
    for gradient in torch.autograd.grad(output.float().sum(), leaves):
        assert gradient.dtype == torch.float32


def test_backward_of_float32_under_autocast() -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    output = depthwise_conv2d(*leaves)
    expected = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_flop_formula() -> None:
    x, weight, bias = inputs()
    once = (
        2 * 25 * 2 * 6 * 9 * 8
    )  # a multiply-add for each tap of each value, as if none is outside
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight, bias, dilation=2)
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight.requires_grad_(), bias.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 2 * once
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x.requires_grad_(), weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * once


def test_meta_and_fake() -> None:
    on_meta = depthwise_conv2d(*(t.to("meta") for t in inputs()), dilation=2)
    assert on_meta.shape == (2, 6, 9, 8)
    with FakeTensorMode() as mode:
        x, weight, bias = (mode.from_tensor(t).requires_grad_() for t in inputs())
        last = x.contiguous(memory_format=torch.channels_last)
        with backend("cpu"):
            output = depthwise_conv2d(last, weight, bias)
        output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert [t.grad.shape for t in (x, weight, bias)] == [t.shape for t in (x, weight, bias)]


def test_torch_func_transforms() -> None:
    """They run on the reference; a fused backend asked for by name says why it cannot."""
    x, weight, bias = inputs(torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, bias, dilation=2).square().sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    stacked = torch.randn(3, *x.shape, dtype=torch.float64)
    mapped = torch.vmap(lambda x: depthwise_conv2d(x, weight, bias))(stacked)
    torch.testing.assert_close(mapped[1], depthwise_conv2d(stacked[1], weight, bias))
    with backend("cpu"), pytest.raises(BackendError, match=r"depthwise_conv2d: .*torch.func trans"):
        torch.func.grad(loss)(weight)


def test_forward_mode_runs_on_the_reference() -> None:
    x, weight, bias = inputs(torch.float64)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        output = depthwise_conv2d(forward_ad.make_dual(x, tangent), weight, bias)
        result = forward_ad.unpack_dual(output).tangent
        with backend("cpu"), pytest.raises(BackendError, match="forward-mode differentiation"):
            depthwise_conv2d(x, weight)
    torch.testing.assert_close(result, depthwise_conv2d(tangent, weight))


def test_batched_gradients() -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float64)]
    output = depthwise_conv2d(*leaves)
    cotangents = torch.randn(3, *output.shape, dtype=torch.float64)
    batched = torch.autograd.grad(output, leaves, cotangents, True, is_grads_batched=True)
    for i, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(output, leaves, cotangent, True)
        for mine, one in zip(batched, expected, strict=True):
            torch.testing.assert_close(mine[i], one)


def test_inference_mode() -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    expected = depthwise_conv2d(*leaves)
    with torch.inference_mode():
        assert torch.equal(depthwise_conv2d(*leaves), expected)


def test_a_changed_input_is_noticed() -> None:
    """x is kept for backward: PyTorch refuses to go back through what was overwritten."""
    x, weight, _ = inputs()
    output = depthwise_conv2d(x, weight.requires_grad_())
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
