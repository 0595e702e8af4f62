"""upsample_equalize_concat in PyTorch's machinery: compile, export, autocast, transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import images, pyramid
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, upsample_equalize_concat
from fastfuse.backends import BackendError


def _op_inputs() -> list[tuple[Tensor, tuple[Any, ...]]]:
    forward = torch.ops.fastfuse.upsample_equalize_concat.default
    backward = torch.ops.fastfuse.upsample_equalize_concat_backward.default
    features = [f.requires_grad_() for f in pyramid()]
    std = torch.tensor([0.5, 2.0, 3.0])
    grad = torch.randn(2, 42, 12, 16, requires_grad=True)
    shapes = ([0, 20, 37], [20, 17, 5], [12, 6, 3], [16, 8, 4])
    last = [f.detach().contiguous(memory_format=torch.channels_last) for f in features]
    return [
        (forward, (features, 12, 16, None, std, False, False)),
        (forward, (last, 9, 20, std, std, True, True)),
        (backward, (grad, *shapes, std, False, False)),
        (backward, (grad, *(s[1:] for s in shapes), None, True, True)),
    ]


@pytest.mark.parametrize("case", range(4))
def test_opcheck(case: int) -> None:
    op, args = _op_inputs()[case]
    torch.library.opcheck(op, args)


def _step(features: list[Tensor], mean: Tensor, std: Tensor) -> Tensor:
    return upsample_equalize_concat(features, mean=mean, std=std).relu() * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(any_backend: str, dynamic: bool) -> None:
    """One graph, forward and backward, static and dynamic shapes."""
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic)
    mean, std = torch.randn(3), torch.rand(3) + 0.5
    for height in (12, 20) if dynamic else (12,):
        features = images((2, 20, height, 16), (2, 17, height // 2, 8), (2, 5, 3, 4))
        results = []
        for function in (_step, compiled):
            leaves = [f.clone().requires_grad_() for f in features]
            output = function(leaves, mean, std)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)


def test_compile_with_floats_and_a_backend_inside() -> None:
    @torch.compile(fullgraph=True)
    def step(features: list[Tensor]) -> Tensor:
        with backend("cpu"):
            return upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])

    features = pyramid()
    expected = upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    torch.testing.assert_close(step(features), expected)


def test_compiled_code_follows_the_backend() -> None:
    compiled = torch.compile(lambda f: upsample_equalize_concat(f), fullgraph=True)
    features = pyramid()
    with backend("cpu"):
        fused = compiled(features)
    with backend("reference"):
        plain = compiled(features)
    torch.testing.assert_close(fused, plain)
    with backend("triton"), pytest.raises(Exception, match="backend 'triton' cannot run"):
        compiled(features)


def test_export() -> None:
    class Neck(torch.nn.Module):
        def forward(self, p2: Tensor, p3: Tensor) -> Tensor:
            return upsample_equalize_concat([p2, p3], std=[0.5, 2.0])

    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4))
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        Neck(), (p2, p3), dynamic_shapes={"p2": {0: batch}, "p3": {0: batch}}
    )
    assert any("upsample_equalize_concat" in str(node.target) for node in program.graph.nodes)
    p2, p3 = images((5, 4, 8, 8), (5, 6, 4, 4))
    torch.testing.assert_close(program.module()(p2, p3), Neck()(p2, p3))


def test_autocast_casts_features_only(any_backend: str) -> None:
    """bfloat16 in and out; mean and std keep their digits."""
    features = [f.requires_grad_() for f in pyramid()]
    mean = torch.tensor([1.00390625, 0.0, 0.0])  # 1 + 2^-8: 1 in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = upsample_equalize_concat(features, mean=mean)
        mixed = upsample_equalize_concat([features[0], features[1].bfloat16()])
        wide = upsample_equalize_concat([features[0].double()])
    assert output.dtype == torch.bfloat16
    assert mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    halves = [f.detach().bfloat16() for f in features]
    with torch.no_grad():
        assert torch.equal(output, upsample_equalize_concat(halves, mean=mean))
    output.float().sum().backward()
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in features)


def test_flop_formula() -> None:
    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4))
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2, p3])
    # x: 4 rows of 8 values, y: 8 rows of 8 values, a multiply-add per weight, 2 weights
    assert counter.get_total_flops() == 2 * 6 * 4 * (4 * 8 + 8 * 8)
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2.requires_grad_(), p3], std=[1.0, 2.0]).sum().backward()
    forward = 2 * (4 * 2 * 64 + 6 * (2 * 16 + 4 * 96))
    assert counter.get_total_flops() == forward + 2 * 4 * 2 * 64


def test_trace_and_meta() -> None:
    features = [f.requires_grad_() for f in pyramid()]
    with pytest.warns():  # torch.jit is deprecated, and shapes become constants
        traced = torch.jit.trace(lambda *f: upsample_equalize_concat(f), tuple(features))
    torch.testing.assert_close(traced(*features), upsample_equalize_concat(features))
    on_meta = upsample_equalize_concat([f.detach().to("meta") for f in features], size=(7, 9))
    assert on_meta.shape == (2, 42, 7, 9)


def test_torch_func_transforms() -> None:
    """They run on the reference; a fused backend asked for by name says why it cannot."""
    (x,) = images((2, 3, 4, 4))

    def loss(x: Tensor) -> Tensor:
        return upsample_equalize_concat([x], size=(8, 8)).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    stacked = torch.randn(3, 2, 3, 4, 4)
    mapped = torch.vmap(lambda x: upsample_equalize_concat([x], size=(8, 8)))(stacked)
    torch.testing.assert_close(mapped[1], upsample_equalize_concat([stacked[1]], size=(8, 8)))
    with backend("cpu"), pytest.raises(BackendError, match=r"inside a torch.func transform"):
        torch.func.grad(loss)(x)


def test_forward_mode_runs_on_the_reference() -> None:
    """Fused kernels have no forward-mode formula; a tangent must never vanish silently."""
    x, tangent = images((2, 3, 4, 4), (2, 3, 4, 4), dtype=torch.float64)
    with forward_ad.dual_level():
        output = upsample_equalize_concat([forward_ad.make_dual(x, tangent)], size=(8, 8))
        result = forward_ad.unpack_dual(output).tangent
        with backend("cpu"), pytest.raises(BackendError, match="forward-mode differentiation"):
            upsample_equalize_concat([x], size=(8, 8))
    torch.testing.assert_close(result, upsample_equalize_concat([tangent], size=(8, 8)))


def test_batched_gradients_say_what_to_do() -> None:
    features = [f.requires_grad_() for f in pyramid()]
    output = upsample_equalize_concat(features)
    with pytest.raises(RuntimeError, match="expects plain gradients, got batched ones"):
        torch.autograd.grad(output, features, torch.randn(3, *output.shape), is_grads_batched=True)


def test_compile_with_dynamic_sizes_and_floats() -> None:
    """The target's size and the constants may be inputs of the graph."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x: Tensor, like: Tensor, scale: float) -> Tensor:
        return upsample_equalize_concat([x], size=like.shape[2:], std=[scale])

    for height, scale in ((8, 0.5), (12, 0.25), (20, 2.0)):
        x, like = images((2, 3, 4, 6), (2, 1, height, 9))
        expected = upsample_equalize_concat([x], size=(height, 9), std=[scale])
        torch.testing.assert_close(step(x, like, scale), expected)


def test_inference_mode_and_checkpointing() -> None:
    features = [f.requires_grad_() for f in pyramid()]
    expected = upsample_equalize_concat(features, std=[1.0, 2.0, 3.0])
    with torch.inference_mode():
        assert torch.equal(upsample_equalize_concat(features, std=[1.0, 2.0, 3.0]), expected)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        upsample_equalize_concat(features, std=[1.0, 2.0, 3.0])
    assert sum(t.numel() for t in kept) == 3  # std; no feature is kept for backward
