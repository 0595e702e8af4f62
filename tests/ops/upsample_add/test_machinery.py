"""upsample_add under autocast, and its FLOPs."""

from __future__ import annotations

import torch
from inputs import images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import upsample_add


def _pair(**options: object) -> list[Tensor]:
    return images((2, 5, 4, 6), (2, 5, 8, 9), **options)


def test_autocast(any_backend: str) -> None:
    x, skip = (t.requires_grad_() for t in _pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = upsample_add(x, skip)
        mixed = upsample_add(x.bfloat16(), skip)
        wide = upsample_add(x.double(), skip.double())
    assert output.dtype == mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(output, upsample_add(x.bfloat16(), skip.bfloat16()))
    output.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, skip))


def test_flop_formula() -> None:
    x, skip = images((2, 6, 4, 4), (2, 6, 8, 8))
    # x: 4 rows of 8 values, y: 8 rows of 8 values, a multiply-add per weight, 2 weights; and a sum
    interpolation = 2 * 6 * 4 * (4 * 8 + 8 * 8)
    with FlopCounterMode(display=False) as counter:
        upsample_add(x, skip)
    assert counter.get_total_flops() == interpolation + 2 * 6 * 64
    with FlopCounterMode(display=False) as counter:
        upsample_add(x.requires_grad_(), skip).sum().backward()
    assert counter.get_total_flops() == 2 * interpolation + 2 * 6 * 64
