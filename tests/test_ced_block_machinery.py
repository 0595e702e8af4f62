"""ced_block and lr_ced_block in PyTorch's machinery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import BLOCKS, Block, both_blocks, with_gradients
from inputs import alternating, both_layouts, images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend
from fastfuse.backends import BackendError
from fastfuse.tolerances import relative_error, tolerance

OPS = torch.ops.fastfuse
both_ways = pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])


def _op_inputs(block: Block) -> list[tuple[Any, tuple[Any, ...]]]:
    forward, keeping, backward = (
        getattr(OPS, block.name + suffix).default for suffix in ("", "_keeping", "_backward")
    )
    tensors = [t.requires_grad_() for t in block.inputs()]
    x, *frozen = block.inputs(channels_last=True, scaled=False)
    keep, grad = torch.tensor([0.0, 1.5]), torch.randn(2, 8, 5, 6)
    option = block.option()
    _, *kept = (t.detach() for t in keeping(*tensors, keep, *option, False))
    back = [t.detach() for t in tensors]
    return [
        (forward, (*tensors, keep, *option, False)),
        (forward, (x, *frozen, None, None, *option, True)),
        (keeping, (*tensors, None, *option, False)),
        (keeping, (x.requires_grad_(), *frozen, None, keep, *option, True)),
        (backward, (grad, *back, [], keep, *option, True, True, False)),
        (backward, (grad, *back, kept, keep, *option, True, True, True)),
        (backward, (grad, x.detach(), *frozen, None, [], None, *option, False, True, True)),
        (backward, (grad, x.detach(), *frozen, None, [], None, *option, True, False, False)),
    ]


@pytest.mark.parametrize(("case", "block"), alternating(range(8), BLOCKS.values()))
def test_opcheck(case: int, block: Block) -> None:
    op, args = _op_inputs(block)[case]
    torch.library.opcheck(op, args)


COMPILED = [
    ("cpu", "inductor", True, True),
    ("cpu", "aot_eager", True, False),
    ("cpu", "aot_eager", False, True),
    ("reference", "aot_eager", False, True),
]


@pytest.mark.parametrize(("how", "block"), alternating(COMPILED, BLOCKS.values()))
def test_compile(how: tuple[str, str, bool, bool], block: Block) -> None:
    """One graph, forward and backward, static and dynamic shapes."""
    name, compiler, dynamic, recompute = how
    torch._dynamo.reset()

    def step(x: Tensor, *parameters: Tensor, keep: Tensor) -> Tensor:
        return block.call(x.relu(), *parameters, keep, recompute=recompute).relu() * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    keep = torch.tensor([0.5, 2.0])
    for height in (5, 9) if dynamic else (5,):
        inputs = block.inputs((2, 8, height, 6), channels_last=True)
        (cotangent,) = images((2, 8, height, 6))
        with backend(name):
            eager, graph = (
                with_gradients(function, inputs, cotangent, keep=keep)
                for function in (step, compiled)
            )
        for a, b in zip(graph, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert graph[0].stride() == eager[0].stride()


@both_blocks
def test_export(block: Block) -> None:
    x, *parameters = block.inputs()

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, parameters: list[Tensor]) -> Tensor:
            return block.call(x, *parameters)

    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        Module(), (x, parameters), dynamic_shapes={"x": {0: batch}, "parameters": [None] * 13}
        if block.steps == 2 else {"x": {0: batch}, "parameters": [None] * 9},
    )  # fmt: skip
    assert any(f"fastfuse.{block.name}" in str(node.target) for node in program.graph.nodes)
    (x,) = images((5, 8, 5, 6))
    torch.testing.assert_close(program.module()(x, parameters), block.call(x, *parameters))


@both_blocks
@both_layouts
@both_ways
def test_autocast(any_backend: str, recompute: bool, channels_last: bool, block: Block) -> None:
    """float32 in, bfloat16 out, gradients in float32; with values of bfloat16's accuracy."""
    inputs = block.inputs(channels_last=channels_last)
    (cotangent,) = images((2, 8, 5, 6), dtype=torch.bfloat16)
    keep = torch.tensor([0.5, 2.0])

    def call(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block.call(*tensors, keep, recompute=recompute)

    results = with_gradients(call, inputs, cotangent)
    assert results[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in results[1:])
    doubles = [t.bfloat16().double() for t in inputs]
    expected = with_gradients(block.reference, doubles, cotangent.double(), keep=keep.double())
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) <= tolerance(torch.bfloat16, reduction=60, roundings=4)


@both_blocks
def test_autocast_of_mixed_dtypes(any_backend: str, block: Block) -> None:
    """Images that are narrow already, parameters that are not; float64 stays."""
    x, *parameters = block.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide, narrow = block.call(x, *parameters), block.call(x.bfloat16(), *parameters)
        double = block.call(x.double(), *[t.double() for t in parameters])
    assert torch.equal(wide, narrow)
    assert narrow.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, block.call(*[t.double() for t in (x, *parameters)]))


@both_blocks
@both_ways
def test_backward_of_float32_under_autocast(recompute: bool, block: Block) -> None:
    """What is computed once more has the dtypes it had: nothing inside is cast again."""
    leaves = [t.requires_grad_() for t in block.inputs()]
    output = block.call(*leaves, recompute=recompute)
    cotangent = torch.ones_like(output)
    expected = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, leaves, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@both_blocks
@both_ways
def test_flop_formula(recompute: bool, block: Block) -> None:
    """Products and convolutions, twice as much backward, recomputation aside: as in PyTorch."""
    inputs = block.inputs((2, 8, 5, 6), 32)
    once = 2 * 5 * 6 * (2 * 2 * 8 * 32 + block.steps * 2 * 49 * 8)
    with FlopCounterMode(display=False) as counter:
        block.call(*inputs, recompute=recompute)
    assert counter.get_total_flops() == once
    leaves = [t.requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        block.call(*leaves, recompute=recompute).sum().backward()
    assert counter.get_total_flops() == 3 * once


def test_flops_are_the_references() -> None:
    """CEDNet-B's largest block, without computing it."""

    def flops(name: str) -> int:
        block = BLOCKS["ced_block"]
        shapes = [t.shape for t in block.inputs((1, 128, 1, 1), 512)][1:]
        with backend(name), FakeTensorMode(), FlopCounterMode(display=False) as counter:
            block.call(torch.empty(1, 128, 64, 64), *[torch.empty(s) for s in shapes])
        return counter.get_total_flops()

    assert flops("cpu") == flops("reference")


@both_blocks
@both_ways
def test_meta_and_fake(recompute: bool, block: Block) -> None:
    on_meta = block.call(*[t.to("meta") for t in block.inputs()])
    assert on_meta.shape == (2, 8, 5, 6)
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(t).requires_grad_() for t in block.inputs(channels_last=True)]
        with backend("cpu"):
            output = block.call(*leaves, recompute=recompute)
        output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]


@both_blocks
def test_torch_func_transforms(block: Block) -> None:
    """They run on the reference; a fused backend asked for by name says why it cannot."""
    x, *parameters = block.inputs(dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return block.call(x, *parameters).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    stacked = torch.randn(3, *x.shape, dtype=torch.float64)
    mapped = torch.vmap(lambda x: block.call(x, *parameters))(stacked)
    torch.testing.assert_close(mapped[1], block.call(stacked[1], *parameters))
    message = f"{block.name}: .*torch.func transform"
    with backend("cpu"), pytest.raises(BackendError, match=message):
        torch.func.grad(loss)(x)


@both_blocks
def test_forward_mode_runs_on_the_reference(block: Block) -> None:
    x, *parameters = block.inputs((1, 3, 2, 3), 4, dtype=torch.float64)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        output = block.call(forward_ad.make_dual(x, tangent), *parameters)
        result = forward_ad.unpack_dual(output).tangent
        with backend("cpu"), pytest.raises(BackendError, match="forward-mode differentiation"):
            block.call(x, *parameters)
    step = 1e-6
    ahead, behind = (block.call(x + s * tangent, *parameters) for s in (step, -step))
    torch.testing.assert_close(result, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@both_blocks
def test_batched_gradients_are_refused(block: Block) -> None:
    leaves = [t.requires_grad_() for t in block.inputs()]
    output = block.call(*leaves)
    message = f"{block.name}: backward expects plain gradients, got batched ones"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(output, leaves, torch.randn(3, *output.shape), is_grads_batched=True)


@both_blocks
@both_ways
def test_inference_mode(recompute: bool, block: Block) -> None:
    leaves = [t.requires_grad_() for t in block.inputs()]
    expected = block.call(*leaves)
    with torch.inference_mode():
        assert torch.equal(block.call(*leaves, recompute=recompute), expected)
