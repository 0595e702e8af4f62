"""tap_sum's Triton kernels against the float64 oracle, under Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from inputs import fast_and_slow, integers
from torch import Tensor
from triton_interpreter import INTERPRETING, interpreted

from fastfuse.ops.tap_sum.samples import exact
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("poisoned", "unsplit")

if INTERPRETING:
    from fastfuse.ops.tap_sum import triton as kernels

# (C, h, w) of a tap, the upsampled size, kernel size and padding.
CASES = {
    "ratio 2": ((5, 2, 2), (4, 4), 3, 1),
    "ratio 4": ((2, 2, 1), (8, 4), 3, 1),
    "ratio 8": ((3, 2, 1), (16, 2), 3, 1),
    "odd ratio": ((4, 3, 1), (9, 3), 3, 1),
    "odd sizes": ((1, 2, 4), (5, 5), 3, 1),
    "nearly one": ((3, 3, 5), (4, 6), 3, 1),
    "down": ((4, 5, 6), (3, 4), 3, 1),
    "up and down": ((4, 2, 7), (5, 3), 3, 1),
    "same size": ((3, 2, 5), (2, 5), 3, 1),
    "same height": ((3, 2, 3), (2, 7), 3, 1),
    "same width": ((3, 2, 4), (5, 4), 3, 1),
    "one pixel": ((4, 1, 1), (5, 6), 3, 1),
    "to one pixel": ((4, 2, 3), (1, 1), 3, 1),
    "one to one": ((2, 1, 1), (1, 1), 3, 1),
    "1x1": ((3, 3, 2), (6, 5), 1, 0),
    "padded 1x1": ((3, 3, 2), (6, 5), 1, 1),
    "5x5": ((2, 2, 2), (4, 3), 5, 2),
    "no padding": ((4, 2, 3), (4, 7), 3, 0),
    "wide padding": ((4, 2, 3), (3, 6), 3, 4),
    "many blocks": ((48, 1, 17), (2, 34), 3, 1),
    "wide": ((1, 1, 35), (2, 45), 3, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "channels_last", "sliced"]


def _id(value: object) -> str:
    named = {False: "half", True: "corners"}.get(value, str(value))
    return named.removeprefix("torch.").replace(" ", "_")


# What they do to the kernels, others do too.
SUBSUMED = ("ratio 4", "odd ratio", "nearly one", "one to one", "padded 1x1", "wide padding")
# Layouts and corners in turn: every pair of them in some case.
FAST = [
    (case, torch.float32, LAYOUTS[i % 3], i % 2 == 1)
    for i, case in enumerate(case for case in CASES if case not in SUBSUMED)
] + [("ratio 2", dtype, LAYOUTS[1 + i % 2], i > 0) for i, dtype in enumerate(DTYPES[1:])]
ALL = [
    (*values, align_corners)
    for values in [(case, torch.float32, LAYOUTS[i % 3]) for i, case in enumerate(CASES)]
    + [("ratio 2", dtype, layout) for dtype in DTYPES[1:] for layout in LAYOUTS[1:]]
    + [(case, torch.bfloat16, "contiguous") for case in ("odd sizes", "down", "wide")]
    for align_corners in (False, True)
]
every_case = fast_and_slow("case dtype layout align_corners", FAST, ALL, ids=_id)
both_corners = pytest.mark.parametrize("align_corners", [False, True], ids=_id)


def _batch(case: str) -> int:
    return 2 if case in ("odd sizes", "1x1") else 1


def _image(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    if layout == "sliced":
        n, c, h, w = shape
        return torch.randn(n, c + 3, h + 2, 2 * w).to(dtype)[:, 1:-2, 2:, ::2]
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _assert_close(result: Tensor, expected: Tensor, reduction: float = 1.0) -> None:
    error, limit = relative_error(result, expected), tolerance(result.dtype, reduction=reduction)
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"


def _assert_layout(result: Tensor, channels_last: bool) -> None:
    assert result.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _exact_gradient(
    grad_output: Tensor, taps_shape: tuple[int, ...], geometry: tuple, dtype: torch.dtype
) -> Tensor:
    *size, kernel_size, padding, align_corners = geometry
    taps = torch.zeros(taps_shape, dtype=torch.float64, requires_grad=True)
    exact(taps, None, size, kernel_size, padding, align_corners, dtype).backward(
        grad_output.double()
    )
    assert taps.grad is not None
    return taps.grad


@interpreted
@every_case
def test_forward(case: str, dtype: torch.dtype, layout: str, align_corners: bool) -> None:
    (channels, h, w), size, k, padding = CASES[case]
    taps = _image((_batch(case), k * k * channels, h, w), dtype, layout)
    offsets = torch.randn(k * k * channels).to(dtype)
    channels_last = layout == "channels_last"
    result = kernels.forward(taps, offsets, *size, k, padding, align_corners, channels_last)
    _assert_close(result, exact(taps, offsets, size, k, padding, align_corners, dtype))
    _assert_layout(result, channels_last)


@interpreted
@every_case
def test_backward(case: str, dtype: torch.dtype, layout: str, align_corners: bool) -> None:
    (channels, h, w), size, k, padding = CASES[case]
    margin = 2 * padding - (k - 1)
    shape = (_batch(case), channels, size[0] + margin, size[1] + margin)
    grad_output = _image(shape, dtype, layout)
    channels_last = layout == "channels_last"
    geometry = (*size, k, padding, align_corners)
    result = kernels.backward(grad_output, h, w, *geometry, channels_last)
    expected = _exact_gradient(grad_output, result.shape, geometry, dtype)
    assert result.shape == (_batch(case), k * k * channels, h, w)
    _assert_close(result, expected, reduction=4 * size[0] * size[1] / (h * w))
    _assert_layout(result, channels_last)


POOLED = [(1, 1), (2, 2), (3, 3), (6, 6)]


@interpreted
@fast_and_slow(
    "size dtype parts",
    zip(POOLED, DTYPES, (2, 5, 5, 2), strict=True),
    product(POOLED, DTYPES, (2, 5)),
    ids=_id,
)
def test_backward_of_split_rows(
    size: tuple[int, int], dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch,
    plans_anew: None,
) -> None:  # fmt: skip
    """Into a slice of the channels, scaled; rows of a part may be none that is read."""
    monkeypatch.setattr(kernels, "splits_of", lambda programs, rows: min(parts, rows))
    wide = torch.promote_types(dtype, torch.float32)
    whole = _image((2, 40, *size), dtype, "channels_last")
    before, grad_output = whole.clone(), integers(2, 4, 12, 10, dtype=dtype)
    scale, geometry = torch.tensor([0.5], dtype=wide), (12, 10, 3, 1, False)
    kernels.backward_into(whole[:, 1:37], grad_output, scale, *geometry, True)
    expected = 0.5 * _exact_gradient(grad_output, (2, 36, *size), geometry, dtype)
    _assert_close(whole[:, 1:37], expected, reduction=480 / (size[0] * size[1]))
    for untouched in (slice(0, 1), slice(37, 40)):
        assert torch.equal(whole[:, untouched], before[:, untouched])


SOURCES = {
    "one level": [(2, 2)],
    "three levels": [(2, 3), (1, 2), (1, 1)],
    "of the same height": [(4, 2), (3, 3)],
}


@interpreted
@fast_and_slow(
    "levels dtype", zip(SOURCES, DTYPES, strict=False), product(SOURCES, DTYPES), ids=_id
)
def test_forward_into_a_slice_of_the_channels(levels: str, dtype: torch.dtype) -> None:
    """Levels with their scales, what is there, a bias and offsets: rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    whole = _image((2, 9, 4, 3), dtype, "channels_last")
    before, out = whole.clone(), whole[:, 2:6]
    layouts = LAYOUTS[1:] + LAYOUTS
    taps = [_image((2, 36, *s), dtype, layouts[i]) for i, s in enumerate(SOURCES[levels])]
    scales = torch.randn(2 * len(taps) + 2, dtype=wide)[::2]
    offsets, bias = torch.randn(36, dtype=wide), torch.randn(4, dtype=wide)
    geometry = (4, 3, 3, 1, False, True)
    kernels.forward_into(out, taps, scales, offsets, bias, True, *geometry)
    expected = scales[0].double() * before[:, 2:6].double() + bias.double()[:, None, None]
    for level, scale in zip(taps, scales[1:].double(), strict=True):
        expected += scale * exact(level, None, (4, 3), 3, 1, False, dtype)
    nothing = torch.zeros(2, 36, 1, 1, dtype=dtype)
    expected += exact(nothing, offsets, (4, 3), 3, 1, False, dtype)
    _assert_close(out, expected)
    for untouched in (slice(0, 2), slice(6, 9)):
        assert torch.equal(whole[:, untouched], before[:, untouched])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_into_of_a_float32_level(dtype: torch.dtype) -> None:
    """Beside one of the output's dtype: read as it is, and the sum rounded once."""
    taps = [_image((2, 72, 2, 2), dtype, "channels_last")]
    taps.append(_image((2, 72, 1, 1), torch.float32, "channels_last"))
    out = _image((2, 8, 4, 4), dtype, "channels_last")
    kernels.forward_into(out, taps, None, None, None, False, 4, 4, 3, 1, False, True)
    geometry = ((4, 4), 3, 1, False, torch.float32)
    expected = sum(exact(level, None, *geometry) for level in taps)
    _assert_close(out, expected)


@interpreted
@both_corners
def test_forward_into_without_what_is_optional(align_corners: bool) -> None:
    """What is in ``out`` counts as it is, or is not read at all."""
    taps = [_image((1, 27, *size), torch.float32, "sliced") for size in ((2, 3), (1, 2))]
    geometry = ((4, 5), 3, 2, align_corners, torch.float32)
    expected = sum(exact(level, None, *geometry) for level in taps)
    out = torch.full((1, 3, 6, 7), torch.nan)
    kernels.forward_into(out, taps, None, None, None, False, 4, 5, 3, 2, align_corners, False)
    _assert_close(out, expected)
    kernels.forward_into(out, taps, None, None, None, True, 4, 5, 3, 2, align_corners, False)
    _assert_close(out, 2 * expected)


@interpreted
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_forward_into_of_no_levels(channels_last: bool) -> None:
    layout = "channels_last" if channels_last else "contiguous"
    out = _image((1, 5, 6, 7), torch.float32, layout)
    scales, offsets, bias = torch.randn(1), torch.randn(45), torch.randn(5)
    nothing = torch.zeros(1, 45, 1, 1)
    expected = scales * out.double() + bias.double()[:, None, None]
    expected += exact(nothing, offsets, (6, 7), 3, 1, False, torch.float32)
    kernels.forward_into(out, [], scales, offsets, bias, True, 6, 7, 3, 1, False, channels_last)
    _assert_close(out, expected)
    kernels.forward_into(out, [], None, None, None, False, 6, 7, 3, 1, False, channels_last)
    assert not out.any()


@interpreted
@fast_and_slow("dtype", [(dtype,) for dtype in DTYPES[1::2]], [(d,) for d in DTYPES], ids=_id)
def test_backward_into_a_slice_of_the_channels(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    whole = _image((2, 40, 2, 3), dtype, "channels_last")
    before = whole.clone()
    grad_output = _image((2, 4, 3, 5), dtype, "sliced")
    scale = torch.randn(1, dtype=wide)
    kernels.backward_into(whole[:, 1:37], grad_output, scale, 3, 5, 3, 1, False, True)
    expected = _exact_gradient(grad_output, (2, 36, 2, 3), (3, 5, 3, 1, False), dtype)
    _assert_close(whole[:, 1:37], scale.double() * expected, reduction=16)
    for untouched in (slice(0, 1), slice(37, 40)):
        assert torch.equal(whole[:, untouched], before[:, untouched])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """At a ratio of 2 weights are quarters: results are rounded once, from sums that are exact."""
    taps, offsets = integers(2, 45, 3, 4, dtype=dtype), integers(45, dtype=dtype)
    result = kernels.forward(taps, offsets, 6, 8, 3, 1, False, False)
    assert torch.equal(result, exact(taps, offsets, (6, 8), 3, 1, False, dtype).to(dtype))
    grad_output, geometry = integers(2, 5, 6, 8, dtype=dtype), (6, 8, 3, 1, False)
    result = kernels.backward(grad_output, 3, 4, *geometry, False)
    assert torch.equal(result, _exact_gradient(grad_output, taps.shape, geometry, dtype).to(dtype))


LONG_RUNS = {
    "ratios 2, 4 and 8": ([(8, 3), (4, 6), (2, 3)], (16, 6)),
    "half a run": ([(6, 2), (3, 1)], (12, 2)),
    "two rows of a run": ([(5, 2)], (10, 4)),
    "ratio 8 and one row": ([(2, 1), (1, 2)], (16, 4)),
}


@interpreted
@fast_and_slow(
    "case dtype", zip(LONG_RUNS, DTYPES, strict=True), product(LONG_RUNS, DTYPES), ids=_id
)
def test_long_runs_are_exact(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, plans_anew: None
) -> None:
    """Of images that are large: here every one is. Weights are of sixteenths, scales whole."""
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", 1)
    sizes, size = LONG_RUNS[case]
    taps = [integers(1, 144, *s, dtype=dtype) for s in sizes]
    taps = [t.contiguous(memory_format=torch.channels_last) for t in taps]
    wide = torch.promote_types(dtype, torch.float32)
    scales = torch.arange(1.0, 2 + len(taps), dtype=wide)
    geometry = (*size, 3, 1, False)
    for given in (None, scales):
        factors = scales[1:] if given is not None else torch.ones(len(taps))
        expected = sum(
            factor * exact(level, None, size, 3, 1, False, dtype)
            for level, factor in zip(taps, factors.double(), strict=True)
        )
        out = torch.empty_like(expected, dtype=dtype)
        out = out.contiguous(memory_format=torch.channels_last)
        kernels.forward_into(out, taps, given, None, None, False, *geometry, True)
        assert torch.equal(out, expected.to(dtype))


@interpreted
def test_an_infinity_in_a_long_run(monkeypatch: pytest.MonkeyPatch, plans_anew: None) -> None:
    """Taps above the first row and below the last are outside, whatever they are."""
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", 1)
    taps = torch.zeros(1, 3, 3, 16, 4, 2)
    taps[:, 0, 1, 1:, 0] = torch.inf  # the last row of an image reads no tap of kernel row 2
    taps[:, 2, 1, 2:, 3] = torch.inf
    taps = taps.flatten(1, 3).contiguous(memory_format=torch.channels_last)
    result = kernels.forward(taps, None, 8, 2, 3, 1, False, True)
    expected = exact(taps, None, (8, 2), 3, 1, False, torch.float32).float()
    assert torch.equal(result, expected)
    assert [int(expected[0, c].isinf().sum()) for c in range(3)] == [0, 6, 12]


@interpreted
def test_what_is_outside_is_not_read() -> None:
    """An infinity reaches only the values that read it."""
    taps = torch.zeros(1, 9, 2, 2)
    taps[:, 0, 0, 0] = torch.inf  # tap (0, 0) is outside in the first row and column
    result = kernels.forward(taps, None, 4, 4, 3, 1, False, False)
    assert torch.equal(result, exact(taps, None, (4, 4), 3, 1, False, torch.float32).float())
    grad_output = torch.zeros(1, 1, 4, 4)
    grad_output[..., 2, 3] = torch.inf
    result = kernels.backward(grad_output, 2, 2, 4, 4, 3, 1, False, False)
    ones = (grad_output > 0).float()
    reads = kernels.backward(ones, 2, 2, 4, 4, 3, 1, False, False) > 0
    assert torch.equal(result > 0, reads)
    assert not result.isnan().any()


@interpreted
def test_nothing_to_do() -> None:
    empty = torch.empty
    result = kernels.forward(empty(0, 27, 2, 2), None, 4, 4, 3, 1, False, True)
    assert result.shape == (0, 3, 4, 4)
    result = kernels.forward(empty(2, 0, 2, 2), empty(0), 4, 4, 3, 1, False, False)
    assert result.shape == (2, 0, 4, 4)
    result = kernels.backward(empty(0, 3, 4, 4), 2, 2, 4, 4, 3, 1, False, False)
    assert result.shape == (0, 27, 2, 2)
    result = kernels.backward(empty(2, 0, 4, 4), 2, 2, 4, 4, 3, 1, False, True)
    assert result.shape == (2, 0, 2, 2)
    kernels.forward_into(empty(0, 3, 4, 4), [], None, None, None, False, 4, 4, 3, 1, False, False)
    kernels.backward_into(empty(0, 27, 2, 2), empty(0, 3, 4, 4), None, 4, 4, 3, 1, False, False)
