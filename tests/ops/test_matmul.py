"""Products with a weight, whichever library does them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cuda_like import cuda_like

from fastfuse.backends import accumulation_dtype
from fastfuse.ops import matmul
from fastfuse.ops.pointwise.mlp import _Sum
from fastfuse.ops.policy import Machine, cpu_policy, policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance

ROWS = {"as it comes": 1, "packed": 10_000}
WEIGHTS = {
    "dense": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "a slice": lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
    "every other row": lambda w: torch.stack([w, w], dim=1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", WEIGHTS)
def test_products(dtype: torch.dtype, rows: str, layout: str) -> None:
    weight = WEIGHTS[layout](torch.randn(24, 17)).to(dtype)
    made = matmul.MatmulWeight(weight, ROWS[rows])
    for count in (0, 1, 5):
        a = torch.randn(count, 17).to(dtype)
        expected = a.double() @ weight.double().t()
        for out in (None, torch.empty(count, 24, dtype=made.dtype)):
            result = made.matmul(a.to(made.dtype), out)
            assert result.dtype == made.dtype
            assert relative_error(result, expected) <= tolerance(dtype, reduction=17)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 300, 5000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("center", [None, 1000.0])
def test_products_into_memory_that_is_there(
    dtype: torch.dtype, rows: int, bias: bool, center: float | None
) -> None:
    """Of narrow rows in float32 a chunk at a time, the bias added before anything is rounded, and
    the center taken off."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, a, shift = (torch.randn(*s).to(dtype) for s in ((24, 17), (rows, 17), (24,)))
    a = a + (center or 0)
    given = a.clone()
    out = torch.full((rows, 24), torch.nan, dtype=wide)
    with use_policy(policy_of("cpu"), convert_bytes=1):
        matmul.matmul_into(
            out, a, weight.to(wide), shift.to(wide) if bias else None,
            None if center is None else torch.tensor([center], dtype=wide),
        )  # fmt: skip
    assert torch.equal(a, given)
    expected = (a.double() - (center or 0)) @ weight.double().t() + (shift.double() if bias else 0)
    assert relative_error(out, expected) <= tolerance(wide, reduction=17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_a_processor_without_their_products(dtype: torch.dtype) -> None:
    with use_policy(cpu_policy(Machine(isa="avx2"))):
        made = matmul.MatmulWeight(torch.randn(4, 3).to(dtype), 1)
        assert made.matmul(torch.ones(2, 3)).dtype == made.dtype == torch.float32


def test_a_pytorch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_LINEAR", None)
    made = matmul.MatmulWeight(torch.randn(4, 3), 10_000)
    assert made.takes_out
    assert made.matmul(torch.ones(2, 3)).shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_sums_over_pixels(dtype: torch.dtype, chunks: int) -> None:
    """Wide where the library gives them; elsewhere rounded once, or once for each chunk."""
    pairs = [(torch.randn(50, 6).to(dtype), torch.randn(50, 7).to(dtype)) for _ in range(chunks)]
    expected = sum((a.double().t() @ b.double() for a, b in pairs), torch.zeros(6, 7).double())
    results = []
    for context in (contextlib.nullcontext(), cuda_like()):
        with context:
            total = _Sum(6, 7, torch.empty(0, dtype=dtype))
            for a, b in pairs:
                total.add(a, b)
            results.append(total.result())
    here, there = results
    assert there.dtype == accumulation_dtype(dtype)
    assert relative_error(there, expected) <= tolerance(there.dtype, reduction=150)
    assert here.dtype == (dtype if chunks < 2 else there.dtype)
    assert relative_error(here, expected) <= tolerance(dtype, roundings=2, reduction=150)
