"""ced_block and lr_ced_block on a CUDA device: PyTorch's products, Triton kernels around them."""

from __future__ import annotations

import pytest
import torch
from blocks import Block, both_blocks, with_gradients
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
