"""ced_block and lr_ced_block on a CUDA device: PyTorch's products, Triton kernels around them."""

from __future__ import annotations

import pytest
import torch
from blocks import Block, both_blocks, with_gradients
from inputs import both_layouts
from torch import Tensor

from fastfuse import backend
from fastfuse.ops.pointwise import mlp
from fastfuse.ops.policy import policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.gpu

both_ways = pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])

SHAPE, HIDDEN = (2, 96, 40, 40), 384


def on_gpu(
    block: Block, shape: tuple[int, ...] = SHAPE, hidden: int = HIDDEN, **how: object
) -> list[Tensor]:
    return [t.to("cuda") for t in block.inputs(shape, hidden, **how)]


@both_blocks
@both_layouts
@both_ways
def test_gradcheck(recompute: bool, channels_last: bool, block: Block) -> None:
    with backend("triton"):
        for sample in block.samples(
            device="cuda", dtype=torch.float64, channels_last=channels_last, small=True
        ):
            inputs = tuple(x.requires_grad_() for x in sample.inputs)

            def call(*tensors: Tensor, sample=sample) -> Tensor:
                return sample.call(*tensors, recompute=recompute)

            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@both_blocks
@both_layouts
@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_cpu_and_itself(
    dtype: torch.dtype, recompute: bool, channels_last: bool, block: Block
) -> None:
    """CEDNet's widths: within tolerance of the CPU, and the same bits every time."""
    inputs = on_gpu(block, dtype=dtype, channels_last=channels_last)
    cotangent, keep = torch.randn_like(inputs[0]), torch.tensor([0.5, 2.0], device="cuda")
    options = {"keep": keep, "recompute": recompute}
    runs = [with_gradients(block.call, inputs, cotangent, **options) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
    theirs = with_gradients(
        block.call, [t.cpu() for t in inputs], cotangent.cpu(), keep=keep.cpu()
    )  # fmt: skip
    pixels = SHAPE[0] * SHAPE[2] * SHAPE[3]
    for i, (a, b) in enumerate(zip(runs[0], theirs, strict=True)):
        limit = tolerance(dtype, reduction=pixels if i > 1 else 16, roundings=4)
        assert relative_error(a.cpu(), b) <= 2 * limit, i


KEEP = [0.0, 0.25, 1.5, 0.0, 2.0]


@both_blocks
@both_ways
@pytest.mark.parametrize("rows", [5, 12, 29])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_of_rows(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, recompute: bool, block: Block
) -> None:
    """Chunks that are parts of an image, an image, or several; each image with its own factor."""
    monkeypatch.setattr(mlp, "ROW_MULTIPLE", 1)
    policy = policy_of("cuda")
    chunk = rows * 32 * policy.product_dtype(dtype).itemsize
    inputs = on_gpu(block, (5, 8, 3, 4), 32, dtype=dtype)
    cotangent, keep = torch.randn_like(inputs[0]), torch.tensor(KEEP, device="cuda")
    with backend("triton"), use_policy(policy, hidden_bytes=chunk, hidden_rows=1):
        results = with_gradients(block.call, inputs, cotangent, keep=keep, recompute=recompute)
    expected = with_gradients(
        block.reference, [t.double() for t in inputs], cotangent.double(), keep=keep.double()
    )
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) <= tolerance(dtype, reduction=60, roundings=3)


@both_blocks
def test_memory_kept_for_backward(block: Block) -> None:
    """For backward x is kept; eager keeps about twelve tensors of its size, and needs more."""
    inputs = on_gpu(block, (4, 128, 128, 128), 512, dtype=torch.bfloat16, channels_last=True)

    def kept(name: str) -> int:
        leaves = [t.detach().requires_grad_() for t in inputs]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with backend(name):
            output = block.call(*leaves)
        return torch.cuda.memory_allocated() - before - output.nbytes

    assert kept("triton") <= inputs[0].nbytes / 8
    assert kept("reference") >= 8 * inputs[0].nbytes


@both_blocks
def test_no_image_is_empty(block: Block) -> None:
    inputs = on_gpu(block, (0, 8, 5, 6), 32)
    output, *gradients = with_gradients(
        block.call, inputs, inputs[0], keep=inputs[0].sum((1, 2, 3))
    )
    assert output.shape == (0, 8, 5, 6)
    assert not any(g.any() for g in gradients)


@both_blocks
def test_compiles_and_runs_in_a_cuda_graph(block: Block) -> None:
    torch._dynamo.reset()
    x, *parameters = on_gpu(block, dtype=torch.bfloat16, channels_last=True)

    def step(x: Tensor) -> Tensor:
        return block.call(x, *parameters)

    expected = step(x)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)


@both_blocks
def test_any_strides(block: Block) -> None:
    whole, *parameters = on_gpu(block)
    _, *few = on_gpu(block, (2, 45, 4, 4), 100)
    for x in (
        whole[:, 3:93:2, 5:30, 7:40],
        whole[:, :45].transpose(2, 3),
        whole[:, :1].expand(-1, 45, -1, -1),
    ):
        result, dense = block.call(x, *few), block.call(x.contiguous(), *few)
        assert relative_error(result, dense) <= tolerance(torch.float32, roundings=4)
    spread = [torch.stack([p, p], -1)[..., 0] for p in parameters]
    result, dense = block.call(whole, *spread), block.call(whole, *parameters)
    assert relative_error(result, dense) <= tolerance(torch.float32, roundings=4)
