"""upsample_add in PyTorch's machinery: compile, export, autocast, transforms."""

from __future__ import annotations

import pytest
import torch
from inputs import images
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, upsample_add
from fastfuse.backends import BackendError


def _pair(**options: object) -> list[Tensor]:
    return images((2, 5, 4, 6), (2, 5, 8, 9), **options)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool) -> None:
    pair = [t.requires_grad_(i == 0 or channels_last) for i, t in enumerate(_pair())]
    args = (*pair, channels_last, channels_last)
    torch.library.opcheck(torch.ops.fastfuse.upsample_add.default, args)


def test_compile() -> None:
    """One graph, forward and backward, of dynamic shapes; it follows the backend."""
    torch._dynamo.reset()

    def step(x: Tensor, skip: Tensor) -> Tensor:
        return upsample_add(x, skip).relu() * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for height in (12, 20):
        results = []
        pair = images((2, 20, height // 2, 8), (2, 20, height, 16))
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in pair]
            output = function(*leaves)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)
    with backend("triton"), pytest.raises(Exception, match="backend 'triton' cannot run"):
        compiled(*_pair())


def test_export() -> None:
    class TopDown(torch.nn.Module):
        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return upsample_add(x, skip)

    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        TopDown(), tuple(_pair()), dynamic_shapes={"x": {0: batch}, "skip": {0: batch}}
    )
    assert any("upsample_add" in str(node.target) for node in program.graph.nodes)
    x, skip = images((5, 5, 4, 6), (5, 5, 8, 9))
    torch.testing.assert_close(program.module()(x, skip), upsample_add(x, skip))


def test_autocast(any_backend: str) -> None:
    x, skip = (t.requires_grad_() for t in _pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = upsample_add(x, skip)
        mixed = upsample_add(x.bfloat16(), skip)
        wide = upsample_add(x.double(), skip.double())
    assert output.dtype == mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(output, upsample_add(x.bfloat16(), skip.bfloat16()))
    output.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, skip))


def test_flop_formula() -> None:
    x, skip = images((2, 6, 4, 4), (2, 6, 8, 8))
    # x: 4 rows of 8 values, y: 8 rows of 8 values, a multiply-add per weight, 2 weights; and a sum
    interpolation = 2 * 6 * 4 * (4 * 8 + 8 * 8)
    with FlopCounterMode(display=False) as counter:
        upsample_add(x, skip)
    assert counter.get_total_flops() == interpolation + 2 * 6 * 64
    with FlopCounterMode(display=False) as counter:
        upsample_add(x.requires_grad_(), skip).sum().backward()
    assert counter.get_total_flops() == 2 * interpolation + 2 * 6 * 64


def test_trace_and_meta() -> None:
    pair = [t.requires_grad_() for t in _pair()]
    with pytest.warns():  # torch.jit is deprecated
        traced = torch.jit.trace(upsample_add, tuple(pair))
    torch.testing.assert_close(traced(*pair), upsample_add(*pair))
    on_meta = upsample_add(*(t.detach().to("meta") for t in pair))
    assert on_meta.shape == pair[1].shape


def test_torch_func_transforms() -> None:
    """They run on the reference; a fused backend asked for by name says why it cannot."""
    x, skip = _pair()

    def loss(x: Tensor) -> Tensor:
        return upsample_add(x, skip).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    mapped = torch.vmap(upsample_add)(torch.stack([x, 2 * x]), torch.stack([skip, skip]))
    torch.testing.assert_close(mapped[1], upsample_add(2 * x, skip))
    with backend("cpu"), pytest.raises(BackendError, match=r"inside a torch.func transform"):
        torch.func.grad(loss)(x)


def test_forward_mode_runs_on_the_reference() -> None:
    """Fused kernels have no forward-mode formula; a tangent must never vanish silently."""
    (x, skip), (tangent, _) = _pair(dtype=torch.float64), _pair(dtype=torch.float64)
    with forward_ad.dual_level():
        output = upsample_add(forward_ad.make_dual(x, tangent), skip)
        result = forward_ad.unpack_dual(output).tangent
        with backend("cpu"), pytest.raises(BackendError, match="forward-mode differentiation"):
            upsample_add(x, skip)
    torch.testing.assert_close(result, upsample_add(tangent, torch.zeros_like(skip)))


def test_batched_gradients_say_what_to_do() -> None:
    pair = [t.requires_grad_() for t in _pair()]
    output = upsample_add(*pair)
    with pytest.raises(RuntimeError, match=r"upsample_add: .* plain gradients, got batched ones"):
        torch.autograd.grad(output, pair, torch.randn(3, *output.shape), is_grads_batched=True)


def test_inference_mode() -> None:
    pair = _pair()
    expected = upsample_add(*pair)
    with torch.inference_mode():
        assert torch.equal(upsample_add(*pair), expected)
