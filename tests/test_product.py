"""Products with a weight, whichever library does them."""

from __future__ import annotations

import pytest
import torch

from fastfuse.ops import product
from fastfuse.ops.policy import Machine, cpu_policy, use_policy
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
    made = product.Weight(weight, ROWS[rows])
    for count in (0, 1, 5):
        a = torch.randn(count, 17).to(dtype)
        expected = a.double() @ weight.double().t()
        for out in (None, torch.empty(count, 24, dtype=made.dtype)):
            result = made.product(a.to(made.dtype), out)
            assert result.dtype == made.dtype
            assert relative_error(result, expected) <= tolerance(dtype, reduction=17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_of_a_processor_without_their_products(dtype: torch.dtype) -> None:
    """In float32, a chunk of rows at a time, and rounded once."""
    weight, a, bias = (torch.randn(*s).to(dtype) for s in ((24, 17), (700, 17), (24,)))
    with use_policy(cpu_policy(Machine(isa="avx2")), product_bytes=1):
        made = product.Weight(weight, a.shape[0])
        assert made.dtype == torch.float32
        out = torch.full((700, 24), torch.nan)
        made.product_into(out, a, bias.float())
    expected = a.double() @ weight.double().t() + bias.double()
    assert relative_error(out, expected) <= tolerance(torch.float32, reduction=17)


@pytest.mark.parametrize("rows", [0, 1, 300, 5000])
def test_products_into_memory_that_is_there(rows: int) -> None:
    weight, a = torch.randn(24, 17), torch.randn(rows, 17)
    out = torch.full((rows, 24), torch.nan)
    product.Weight(weight, rows).product_into(out, a)
    assert relative_error(out, a.double() @ weight.double().t()) <= tolerance(
        torch.float32, reduction=17
    )


def test_a_pytorch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_LINEAR", None)
    made = product.Weight(torch.randn(4, 3), 10_000)
    assert made.takes_out
    assert made.product(torch.ones(2, 3)).shape == (2, 4)
