"""Defining an op: a kernel for each backend, one derivative, and backward where forward ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
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


class Counted(Tensor):
    """A class of tensors of a user's, who sees what is called."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_a_kernel_is_called_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the dispatcher was called")

    monkeypatch.setattr(scaled_sum["cpu"], "target", refuse)
    images, scale = inputs()
    scaled_sum["cpu"](images, scale, [1, 2]).sum().backward()
    with torch.no_grad():
        scaled_sum["cpu"](images, None, (1, 2))
    negative = torch.conj(torch.ones(2, 3, dtype=torch.complex128)).imag
    for converted in (
        (images, scale, [np.int64(1)]),
        (images, scale, np.array([1])),
        ([negative], scale, []),
        ([images[0], torch._efficientzerotensor(2, 3)], scale, []),
    ):
        with pytest.raises(AssertionError, match="the dispatcher"):
            scaled_sum["cpu"](*converted)


@pytest.mark.parametrize("grad", [True, False])
def test_who_watches_ops_sees_them(grad: bool) -> None:
    images, scale = inputs()
    with torch.set_grad_enabled(grad):
        with Seen() as seen:
            scaled_sum["cpu"](images, scale, [])
        assert "test_scaled_sum" in seen.names
        with torch.profiler.profile() as profile:
            scaled_sum["cpu"](images, scale, [])
        assert "fastfuse::test_scaled_sum" in {event.name for event in profile.events()}
        with torch.device("cpu"):  # a mode of functions
            scaled_sum["cpu"](images, scale, [])
        Counted.seen = 0
        own = [image.detach().as_subclass(Counted) for image in images]
        assert isinstance(scaled_sum["cpu"](own, scale.detach(), []), Counted)
        assert Counted.seen


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
