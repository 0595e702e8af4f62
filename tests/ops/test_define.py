"""Defining an op: a kernel for each backend, one derivative, and backward where forward ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backends
from fastfuse.ops.define import Derivative, Op

calls: list[str] = []


def kernel(backend: str) -> Any:
    def run(images: Sequence[Tensor], scale: Tensor | None, sizes: Sequence[int]) -> Tensor:
        calls.append(backend)
        return sum(images, torch.zeros(())) * (1 if scale is None else scale)

    return run


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, scale, _ = inputs
    ctx.save_for_backward(scale, *images)


def gradients(ctx: Any, grad: Tensor) -> Sequence[Any]:
    scale, *images = ctx.saved_tensors
    of_images, of_scale = ctx.needs[:2]
    scaled = scaled_sum[ctx.backend]([grad], scale, [])
    unscaled = scaled_sum[ctx.backend](images, None, []) if of_scale else None
    return (
        [scaled if need else None for need in of_images],
        None if unscaled is None else (unscaled * grad).sum(),
        None,
    )


@pytest.fixture(scope="module", autouse=True)
def op() -> Any:
    """With a second backend for CPUs."""
    global scaled_sum
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.DISPATCH_KEYS, "second", "CPU")
        scaled_sum = Op(
            "test_scaled_sum(Tensor[] images, Tensor? scale, int[] sizes) -> Tensor",
            kernels={"cpu": kernel("cpu"), "second": kernel("second")},
            fake=lambda images, scale, sizes: torch.empty_like(images[0]),
            derivative=Derivative(save, gradients),
            flops=lambda images, scale, sizes, **_: 7 * len(images),
        )
    return scaled_sum


def inputs() -> tuple[list[Tensor], Tensor]:
    images = [torch.randn(2, 3, dtype=torch.float64, requires_grad=i != 1) for i in range(3)]
    return images, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", ["cpu", "second"])
def test_backward_runs_where_forward_did(backend: str) -> None:
    images, scale = inputs()
    calls.clear()
    output = scaled_sum[backend](images, scale, [1, 2])
    assert output.grad_fn.name() == "TestScaledSumBackward"
    output.sum().backward()
    assert set(calls) == {backend}
    assert images[1].grad is None
    assert torch.equal(images[0].grad, torch.full((2, 3), 2.0, dtype=torch.float64))
    assert torch.allclose(scale.grad, sum(images).sum())


@pytest.mark.parametrize("backend", ["cpu", "second"])
def test_contracts(backend: str) -> None:
    images, scale = inputs()
    overload = scaled_sum[backend].target
    assert overload._overloadname == ("default" if backend == "cpu" else backend)
    torch.library.opcheck(overload, (images, scale, [1, 2]))
    differentiable = [images[0], images[2], scale]

    def call(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return scaled_sum[backend]([a, images[1], b], scale, [])

    assert torch.autograd.gradcheck(call, differentiable)
    assert torch.autograd.gradgradcheck(call, differentiable)
    with FlopCounterMode(display=False) as counter:
        call(*differentiable)
    assert counter.get_total_flops() == 21


def test_a_graph_names_the_backend() -> None:
    found: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    images, scale = inputs()
    for backend in ("cpu", "second"):
        compiled = torch.compile(
            lambda *t, b=backend: scaled_sum[b](list(t), scale, []), backend=record, fullgraph=True
        )
        assert torch.equal(compiled(*images), scaled_sum[backend](images, scale, []))
    assert found == ["fastfuse.test_scaled_sum.default", "fastfuse.test_scaled_sum.second"]


def test_nothing_is_recorded_of_what_needs_no_gradient() -> None:
    images = [torch.randn(2, 3)]
    assert scaled_sum["cpu"](images, None, []).grad_fn is None
    with torch.no_grad():
        assert scaled_sum["cpu"](inputs()[0], None, []).grad_fn is None


def test_batched_gradients_are_named() -> None:
    images, scale = inputs()
    output = scaled_sum["cpu"](images, scale, [])
    with pytest.raises(RuntimeError, match=r"^test_scaled_sum: backward expects plain gradients"):
        torch.autograd.grad(output, images[0], torch.ones(4, 2, 3).double(), is_grads_batched=True)


def test_an_op_without_kernels() -> None:
    op = Op("test_nothing(Tensor x) -> Tensor", kernels={}, flops=lambda x, **_: 1)
    assert (op.name, op.backends) == ("test_nothing", ())
