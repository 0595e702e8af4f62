"""Products with a weight, whichever library does them."""

from __future__ import annotations

import pytest
import torch

from fastfuse.ops import product
from fastfuse.tolerances import relative_error, tolerance

ROWS = {"as it comes": 1, "packed": product.PACKING_ROWS}
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
        for out in (None, torch.empty(count, 24, dtype=dtype)):
            result = made.product(a, out)
            assert result.dtype == dtype
            assert relative_error(result, expected) <= tolerance(dtype, reduction=17)


def test_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_HAS_BF16", lambda: False)
    assert torch.bfloat16 not in product._dtypes()
    monkeypatch.setattr(product, "ONEDNN_DTYPES", product._dtypes())
    weight = product.Weight(torch.randn(4, 3).bfloat16(), product.PACKING_ROWS)
    assert weight.packed is None
    assert weight.product(torch.ones(2, 3).bfloat16()).shape == (2, 4)


def test_a_pytorch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_PACK", None)
    assert product._dtypes() == frozenset()
