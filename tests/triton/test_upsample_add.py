"""upsample_add's Triton kernel against the float64 definition, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from inputs import STRIDES, integers, of_strides
from triton_interpreter import INTERPRETING, interpreted

from fastfuse.ops.upsample_add.samples import exact
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("poisoned")

if INTERPRETING:
    from fastfuse.ops.upsample_add import triton as kernels

# x (N, C, h, w) and skip's size.
CASES = {
    "up": ((2, 5, 8, 8), (16, 16)),
    "down": ((1, 4, 12, 10), (4, 4)),
    "primes": ((2, 3, 7, 5), (13, 17)),
    "one axis": ((1, 4, 12, 5), (12, 9)),
    "from one pixel": ((2, 4, 1, 1), (5, 40)),
    "to one pixel": ((2, 3, 5, 6), (1, 1)),
    "one channel": ((1, 1, 5, 3), (10, 6)),
    "many channels": ((1, 70, 2, 2), (4, 4)),
    "the same size": ((2, 17, 7, 5), (7, 5)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)] + [("primes", d) for d in DTYPES],
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", "_"),
)
def test_forward(case: str, dtype: torch.dtype) -> None:
    """Every layout of x; skip is in the same one with aligned corners, else in another."""
    shape, size = CASES[case]
    for i, layout in enumerate(STRIDES):
        align_corners, channels_last = (len(case) + i) % 2 == 0, layout != "contiguous"
        x = of_strides(shape, dtype, layout)
        skip = of_strides((*shape[:2], *size), dtype, layout if align_corners else STRIDES[i - 1])
        result = kernels.forward(x, skip, align_corners, channels_last)
        error = relative_error(result, exact(x, skip, align_corners, dtype))
        assert error <= tolerance(dtype), (layout, error)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert result.is_contiguous(memory_format=memory_format)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """At a ratio of 2 weights are quarters: the result is rounded once, from an exact sum."""
    x, skip = integers(2, 5, 3, 4, dtype=dtype), integers(2, 5, 6, 8, dtype=dtype)
    result = kernels.forward(x, skip, False, False)
    assert torch.equal(result, exact(x, skip, False, dtype).to(dtype))


@interpreted
def test_nothing_to_do() -> None:
    for shape in ((0, 3), (2, 0)):
        x, skip = torch.empty(*shape, 2, 2), torch.empty(*shape, 4, 4)
        assert kernels.forward(x, skip, False, True).shape == skip.shape


@interpreted
def test_expanded_inputs() -> None:
    x = torch.randn(1, 4, 3, 5).expand(2, 4, 3, 5)
    skip = torch.randn(2, 1, 1, 1).expand(2, 4, 6, 9)
    result = kernels.forward(x, skip, False, False)
    assert relative_error(result, exact(x, skip, False, x.dtype)) <= tolerance(x.dtype)
