"""upsample_argmax's Triton kernel against float64 arithmetic, under Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import STRIDES, fast_and_slow, of_strides
from triton_interpreter import INTERPRETING, interpreted

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("poisoned")

if INTERPRETING:
    from fastfuse.ops.upsample_argmax import triton as kernels

# Logits (N, C, h, w) and the target's size.
CASES = {
    "ratio 2": ((2, 5, 4, 4), (8, 8)),
    "ratio 4": ((1, 7, 3, 5), (12, 20)),
    "ratio 8": ((1, 9, 2, 3), (16, 24)),
    "down": ((1, 4, 12, 10), (4, 4)),
    "up and down": ((1, 3, 3, 9), (14, 4)),
    "primes": ((2, 3, 7, 5), (13, 17)),
    "one axis": ((1, 4, 12, 5), (12, 9)),
    "from one pixel": ((2, 4, 1, 1), (5, 40)),
    "to one pixel": ((2, 3, 5, 6), (1, 1)),
    "one class": ((1, 1, 5, 3), (10, 6)),
    "many classes": ((1, 70, 2, 2), (8, 4)),
    "wide": ((1, 2, 1, 33), (2, 130)),
    "the same size": ((2, 17, 7, 5), (7, 5)),
}
# What they do to the kernels, others do too.
SUBSUMED = ("ratio 2", "up and down", "one axis", "from one pixel", "wide")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@interpreted
@fast_and_slow(
    "case dtype",
    [(case, DTYPES[i % 2]) for i, case in enumerate(CASES) if case not in SUBSUMED],
    [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)] + [("ratio 4", d) for d in DTYPES],
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", "_"),
)
def test_values(case: str, dtype: torch.dtype) -> None:
    """The class is one of the largest but for rounding; both functions give the same."""
    shape, size = CASES[case]
    accumulation = torch.promote_types(dtype, torch.float32)
    for i, layout in enumerate(STRIDES):
        logits = of_strides(shape, dtype, layout)
        for align_corners in (False, True) if i < 2 else (len(case) % 2 == 0,):
            upsampled = interpolate_exactly(
                logits, size, align_corners=align_corners, coordinates=accumulation
            )
            result, confidence = kernels.forward_confidence(logits, *size, align_corners)
            assert (result.dtype, confidence.dtype) == (torch.int64, accumulation)
            won = upsampled.gather(1, result[:, None])
            assert relative_error(won, upsampled.amax(1, keepdim=True)) <= tolerance(accumulation)
            expected = upsampled.softmax(1).amax(1)
            assert relative_error(confidence, expected) <= tolerance(accumulation)
        assert torch.equal(kernels.forward(logits, *size, align_corners), result)


@interpreted
@pytest.mark.parametrize("layout", STRIDES)
def test_the_lowest_class_of_equals(layout: str) -> None:
    """Of few different values, in as many classes as many blocks have."""
    for size in ((3, 4), (6, 8)):
        logits = of_strides((1, 37, 3, 4), torch.float32, layout)
        logits.copy_(torch.randint(3, (1, 37, 1, 1)).expand_as(logits))
        expected = logits[:, :, :1, :1].argmax(1).expand(1, *size)
        assert torch.equal(kernels.forward(logits, *size, False), expected)


@interpreted
@pytest.mark.parametrize("layout", STRIDES)
def test_nan_and_infinity(layout: str) -> None:
    """As in PyTorch: the first NaN is the largest value, and a confidence of neither is one."""
    logits = of_strides((4, 37, 3, 4), torch.float32, layout)
    logits[0, 20:30, 1] = math.nan
    logits[1, ::7] = math.inf
    logits[2] = -math.inf
    logits[3, :36] = -math.inf
    for size in ((3, 4), (6, 8)):
        upsampled = interpolate_exactly(logits, size)
        result, confidence = kernels.forward_confidence(logits, *size, False)
        assert torch.equal(result, upsampled.argmax(1))
        expected = upsampled.softmax(1).amax(1)
        torch.testing.assert_close(confidence, expected.float(), equal_nan=True)


@interpreted
def test_nothing_to_do() -> None:
    assert kernels.forward(torch.empty(0, 3, 2, 2), 4, 4, False).shape == (0, 4, 4)


@interpreted
def test_expanded_logits() -> None:
    logits = torch.randn(1, 4, 1, 5).expand(2, 4, 3, 5)
    expected = interpolate_exactly(logits, (6, 9)).argmax(1)
    assert torch.equal(kernels.forward(logits, 6, 9, False), expected)
