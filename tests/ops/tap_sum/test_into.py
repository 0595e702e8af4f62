"""tap_sum in PyTorch's machinery, and the ops that write to memory that is there."""

from __future__ import annotations

import pytest
import torch
from inputs import both_layouts, every_dtype, images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import tap_sum
from fastfuse.ops.tap_sum.samples import exact
from fastfuse.tolerances import relative_error, tolerance

OPS = torch.ops.fastfuse


def test_flop_formula() -> None:
    taps = torch.randn(5, 9 * 2, 3, 4, requires_grad=True)
    # y: 9 taps, 6 rows of 4 values; x: 3 taps, 6 rows of 8; a multiply-add per weight, 2 weights
    expected = 5 * 2 * 2 * (9 * 6 * 4 * 2 + 3 * 6 * 8 * 2)
    with FlopCounterMode(display=False) as counter:
        output = tap_sum(taps, (6, 8), kernel_size=3)
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        tap_sum(taps.detach(), (3, 8), kernel_size=3, padding=0)  # one row; one weight along y
    assert counter.get_total_flops() == 5 * 2 * 2 * (9 * 1 * 4 * 1 + 3 * 1 * 6 * 2)


# ---- writing to memory that is there ------------------------------------------------------------

SOURCES = {
    "one": [(4, 3)],
    "three": [(4, 5), (2, 2), (1, 1)],
    "down": [(16, 9), (8, 6)],
    "none": [],
}
GEOMETRY = (8, 6, 3, 1, False)


def _expected_sum(
    base: Tensor | float,
    taps: list[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    total = torch.zeros(2, 4, 8, 6, dtype=torch.float64) + base
    for i, level in enumerate(taps):
        scale = 1.0 if scales is None else scales[1 + i].double()
        total = total + scale * exact(level, None, (8, 6), 3, 1, False, dtype)
    if offsets is not None:
        nothing = torch.zeros(2, 36, 1, 1, dtype=torch.float64)
        total = total + exact(nothing, offsets, (8, 6), 3, 1, False, dtype)
    return total if bias is None else total + bias.double()[:, None, None]


@pytest.mark.walks_memory
@both_layouts
@every_dtype
@pytest.mark.parametrize("levels", SOURCES)
def test_sum_into_written_slice(
    isa: str, levels: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """Levels with scales, offsets and a bias, added to a slice of channels; rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    whole = images((2, 9, 8, 6), dtype=dtype, channels_last=channels_last)[0]
    before = whole.clone()
    taps = [
        images((2, 36, *source), dtype=dtype, channels_last=channels_last != (i == 1))[0]
        for i, source in enumerate(SOURCES[levels])
    ]
    scales = torch.randn(2 * len(taps) + 2, dtype=wide)[::2]
    offsets, bias = torch.randn(36, dtype=wide), torch.randn(4, dtype=wide)
    OPS.tap_sum_into(whole[:, 2:6], taps, scales, offsets, bias, True, *GEOMETRY, channels_last)
    base = scales[0].double() * before[:, 2:6].double()
    expected = _expected_sum(base, taps, scales, offsets, bias, dtype)
    assert relative_error(whole[:, 2:6], expected) <= tolerance(dtype)
    for untouched in (slice(0, 2), slice(6, 9)):
        assert torch.equal(whole[:, untouched], before[:, untouched])


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("optional", ["nothing", "scales", "offsets", "bias"])
@pytest.mark.parametrize("levels", SOURCES)
def test_sum_into_without_what_is_optional(levels: str, optional: str, channels_last: bool) -> None:
    """What stands in ``out`` is not read, or added as it is."""
    taps = [torch.randn(2, 36, *source) for source in SOURCES[levels]]
    scales = torch.randn(len(taps) + 1) if optional == "scales" else None
    offsets = torch.randn(36) if optional == "offsets" else None
    bias = torch.randn(4) if optional == "bias" else None
    (out,) = images((2, 4, 8, 6), channels_last=channels_last)
    out.fill_(torch.nan)
    options = (taps, scales, offsets, bias)
    OPS.tap_sum_into(out, *options, False, *GEOMETRY, channels_last)
    expected = _expected_sum(0.0, *options, torch.float32)
    assert relative_error(out, expected) <= tolerance(torch.float32)
    OPS.tap_sum_into(out, *options, True, *GEOMETRY, channels_last)
    base = expected if scales is None else scales[0].double() * expected
    expected = _expected_sum(base, *options, torch.float32)
    assert relative_error(out, expected) <= tolerance(torch.float32, roundings=2)


@pytest.mark.walks_memory
@both_layouts
@every_dtype
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_into_written_slice(
    isa: str, scaled: bool, dtype: torch.dtype, channels_last: bool
) -> None:
    whole, grad_output = images(
        (2, 40, 3, 4), (2, 7, 7, 8), dtype=dtype, channels_last=channels_last
    )
    before, grad_output = whole.clone(), grad_output[:, 2:6]
    scale = torch.randn(1, dtype=torch.promote_types(dtype, torch.float32)) if scaled else None
    OPS.tap_sum_backward_into(whole[:, 1:37], grad_output, scale, 7, 8, 3, 1, False, channels_last)
    taps = torch.zeros(2, 36, 3, 4, dtype=torch.float64, requires_grad=True)
    exact(taps, None, (7, 8), 3, 1, False, dtype).backward(grad_output.double())
    assert taps.grad is not None
    expected = taps.grad if scale is None else scale.double() * taps.grad
    assert relative_error(whole[:, 1:37], expected) <= tolerance(dtype, reduction=20)
    for untouched in (slice(0, 1), slice(37, 40)):
        assert torch.equal(whole[:, untouched], before[:, untouched])
