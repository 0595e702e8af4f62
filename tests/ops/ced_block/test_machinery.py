"""ced_block and lr_ced_block in PyTorch's machinery."""

from __future__ import annotations

import pytest
import torch
from blocks import BLOCKS, Block, both_blocks, with_gradients
from inputs import both_layouts, images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend
from fastfuse.tolerances import relative_error, tolerance

both_ways = pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])


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
