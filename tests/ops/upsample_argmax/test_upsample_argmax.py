"""upsample_argmax: values, values that are not finite, inputs, determinism, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import ISAS, both_corners, both_layouts, every_dtype, images
from logits import strided, zero_times_infinity
from memory import peak_of, reads_proc
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, upsample_argmax
from fastfuse.backends import DTYPES
from fastfuse.ops.bilinear import interpolate, interpolate_exactly
from fastfuse.ops.policy import use_isa
from fastfuse.tolerances import tolerance

OP = "upsample_argmax"
INF, NAN = math.inf, math.nan


def check(logits: Tensor, size: tuple[int, int], **options: Any) -> None:
    """Labels are of the largest values but for rounding, confidences theirs; alone they are the
    same."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    labels, confidence = upsample_argmax(logits, size, return_confidence=True, **options)
    assert torch.equal(labels, upsample_argmax(logits, size, **options))
    assert labels.dtype == torch.int64
    assert confidence.dtype == wide
    assert labels.shape == confidence.shape == (logits.shape[0], *size)
    assert labels.is_contiguous()
    values = interpolate_exactly(logits, size, coordinates=logits.dtype, **options)
    if values.numel() == 0:
        return
    error = 2 * tolerance(wide) * max(values.abs().max().item(), 1e-30)
    assert ((labels >= 0) & (labels < logits.shape[1])).all()
    chosen = values.gather(1, labels[:, None])[:, 0]
    assert (chosen >= values.amax(1) - error).all()
    expected = values.softmax(1).gather(1, labels[:, None])[:, 0]
    limit = 2 * error + 40 * torch.finfo(wide).eps
    assert ((confidence - expected).abs() <= limit).all()


# ---- values -------------------------------------------------------------------------------------


@both_corners
@both_layouts
def test_is_what_a_user_would_write(
    any_backend: str, channels_last: bool, align_corners: bool
) -> None:
    (x,) = images((2, 19, 5, 7), dtype=torch.float64, channels_last=channels_last)
    for size in ((20, 28), (5, 7), (3, 11), (1, 1), (13, 4)):
        up = F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
        labels, confidence = upsample_argmax(
            x, size, align_corners=align_corners, return_confidence=True
        )
        assert torch.equal(labels, up.argmax(1))
        torch.testing.assert_close(confidence, up.softmax(1).amax(1), rtol=1e-12, atol=0)


@pytest.mark.walks_memory
@settings(max_examples=80, deadline=None)
@given(
    classes=st.one_of(st.integers(1, 40), st.integers(1, 1000)),
    source=st.tuples(st.integers(1, 7), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 15), st.integers(1, 40)),
    batch=st.integers(0, 3),
    align_corners=st.booleans(),
    layout=st.sampled_from(["nchw", "nhwc", "sliced", "sliced nhwc", "transposed", "expanded"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    scale=st.sampled_from([1e-30, 1.0, 30.0, 3e4]),
)
@backend("cpu")
def test_any_logits(
    classes: int,
    source: tuple[int, int],
    size: tuple[int, int],
    batch: int,
    align_corners: bool,
    layout: str,
    dtype: torch.dtype,
    isa: str,
    scale: float,
) -> None:
    """Random classes, sizes, ratios, strides, magnitudes and instruction sets."""
    x = strided((batch, classes, *source), layout, dtype, scale)
    with use_isa(isa):
        check(x, size, align_corners=align_corners)


def test_ties_take_the_lowest_class(isa: str) -> None:
    """Small integers at power-of-two ratios: exact, whatever the order, with many ties."""
    with backend("cpu"):
        for classes in (1, 2, 3, 7, 8, 9, 16, 17, 33, 150):
            for channels_last in (False, True):
                for dtype in DTYPES:
                    x = torch.randint(-1, 2, (2, classes, 3, 5)).to(dtype)
                    if channels_last:
                        x = x.contiguous(memory_format=torch.channels_last)
                    for size in ((3, 5), (6, 10), (12, 20), (3, 10)):
                        up = F.interpolate(x.double(), size=size, mode="bilinear")
                        assert torch.equal(upsample_argmax(x, size), first_of_largest(up))


def first_of_largest(values: Tensor) -> Tensor:
    largest = values == values.amax(1, keepdim=True)
    classes = torch.arange(values.shape[1])[:, None, None]
    return torch.where(largest, classes, values.shape[1]).amin(1)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, 1e-45, -1e30, 1e30, -3e38, 3e38, -INF])
def test_all_classes_equal(isa: str, value: float) -> None:
    """Class 0, however large: what fills a vector's last lanes never wins, and all classes are
    rounded alike."""
    for classes in (1, 3, 8, 21):
        for channels_last in (False, True):
            x = torch.full((1, classes, 2, 3), value)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with backend("cpu"):
                labels, confidence = upsample_argmax(x, (4, 7), return_confidence=True)
            assert not labels.any()
            expected = torch.full_like(confidence, NAN if math.isinf(value) else 1 / classes)
            torch.testing.assert_close(confidence, expected, equal_nan=True)


def test_signed_zeros_are_equal(any_backend: str) -> None:
    x = torch.tensor([-0.0, 0.0, -0.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert not upsample_argmax(x, (4, 4)).any()


@pytest.mark.parametrize("magnitude", [1e29, 1e30, 1.1e30, 1e36, 3e36, 1e38, 3e38])
def test_huge_values(isa: str, magnitude: float) -> None:
    """No interpolated value overflows, and the least of them is above what fills vectors."""
    with backend("cpu"):
        for classes in (1, 5, 16, 19):
            (x,) = images((2, classes, 3, 4))
            x = x.sign() * x.abs().clamp(0.1, 1) * magnitude
            check(x, (7, 9))
            check(-x.abs(), (7, 9))
            check(-x.abs(), (3, 4))


def test_float16_at_its_limits(any_backend: str) -> None:
    """Interpolated in float32: values beside the largest do not overflow."""
    x = torch.tensor([65504.0, -65504.0, 65472.0]).half().reshape(1, 3, 1, 1).expand(1, 3, 3, 3)
    labels, confidence = upsample_argmax(x, (8, 7), return_confidence=True)
    assert not labels.any()
    torch.testing.assert_close(confidence, torch.ones_like(confidence))


def test_one_class_is_certain(any_backend: str) -> None:
    labels, confidence = upsample_argmax(torch.randn(2, 1, 3, 4), (9, 5), return_confidence=True)
    assert not labels.any()
    assert torch.equal(confidence, torch.ones(2, 9, 5))


# ---- values that are not finite -----------------------------------------------------------------


def as_pytorch(x: Tensor, size: tuple[int, int], align_corners: bool) -> None:
    labels, confidence = upsample_argmax(
        x, size, align_corners=align_corners, return_confidence=True
    )
    with backend("reference"):
        expected, theirs = upsample_argmax(
            x, size, align_corners=align_corners, return_confidence=True
        )
    up = interpolate(x, size, align_corners=align_corners)
    mine, best = (up.gather(1, found[:, None])[:, 0] for found in (labels, expected))
    assert ((labels == expected) | ((mine - best).abs() <= 1e-5)).all()  # near ties
    torch.testing.assert_close(confidence, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.walks_memory
@settings(max_examples=80, deadline=None)
@given(
    classes=st.integers(1, 40),
    source=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 30)),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    isa=st.sampled_from(ISAS),
    values=st.lists(
        st.tuples(st.sampled_from([INF, -INF, NAN]), st.integers(0, 10**6)),
        min_size=1,
        max_size=6,
    ),
)
@backend("cpu")
def test_nan_and_infinity_anywhere(
    classes: int,
    source: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
    channels_last: bool,
    isa: str,
    values: list[tuple[float, int]],
) -> None:
    """As in PyTorch."""
    assume(source[1] != size[1])  # which has tests of its own, as have infinities times 0
    (x,) = images((2, classes, *source), channels_last=channels_last)
    exact = any(
        zero_times_infinity(*sizes, align_corners) for sizes in zip(source, size, strict=True)
    )
    for value, where in values:
        if exact and not math.isfinite(value):
            continue
        n, rest = where % 2, where // 2
        x[n, rest % classes, rest % source[0], rest % source[1]] = value
    with use_isa(isa):
        as_pytorch(x, size, align_corners)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("axis", ["height", "both"])
def test_of_one_size_and_not_finite(any_backend: str, axis: str, value: float) -> None:
    """Where widths agree, the first column's neighbour on its left does not exist; no other pixel
    is touched."""
    x = torch.randn(1, 11, 4, 5, dtype=torch.float64)
    x[0, 3, :, 0] = value
    size = (4, 5) if axis == "both" else (9, 5)
    labels, confidence = upsample_argmax(x, size, return_confidence=True)
    clean = interpolate_exactly(x.nan_to_num(), size)[..., 1:]
    assert torch.equal(labels[..., 1:], clean.argmax(1))
    torch.testing.assert_close(confidence[..., 1:], clean.softmax(1).amax(1))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("size", [(4, 5), (9, 5)], ids=["one size", "one width"])
def test_of_one_width_neighbours_stay_apart(size: tuple[int, int], value: float) -> None:
    x = torch.randn(1, 11, 4, 5, dtype=torch.float64)
    x[0, 3, 2, 3] = value
    with backend("cpu"):
        labels = upsample_argmax(x, size)
    clean = interpolate_exactly(x.nan_to_num(0, 0, 0), size)[..., :3]
    assert torch.equal(labels[..., :3], clean.argmax(1))


def test_infinity_on_the_last_row() -> None:
    x = torch.zeros(1, 3, 4, 4)
    x[0, 1] = -INF
    x[0, 1, :-1] = 0
    with backend("cpu"):
        as_pytorch(x, (8, 9), True)


def test_the_first_nan_wins(isa: str) -> None:
    with backend("cpu"):
        for classes in (2, 8, 9, 40):
            for first in range(0, classes, 5):
                x = torch.randn(1, classes, 3, 3)
                x[:, first:] = NAN
                x[:, 0, 0, 0] = INF
                labels, confidence = upsample_argmax(x, (7, 7), return_confidence=True)
                assert (labels[:, 4:] == first).all()
                assert confidence.isnan().all()


@pytest.mark.parametrize("mask", [-1e4, -1e30, -3e38])
def test_masked_classes(any_backend: str, mask: float) -> None:
    """Classes that are as good as -inf everywhere never win and have no probability."""
    x = torch.randn(2, 20, 4, 6)
    masked = x.clone()
    masked[:, 5:] = mask
    for size in ((9, 13), (3, 4), (4, 6)):
        labels, confidence = upsample_argmax(masked, size, return_confidence=True)
        expected, theirs = upsample_argmax(x[:, :5], size, return_confidence=True)
        assert torch.equal(labels, expected)
        torch.testing.assert_close(confidence, theirs)


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.walks_memory
@every_dtype
@pytest.mark.parametrize("layout", ["sliced", "sliced nhwc", "transposed", "expanded"])
def test_any_strides(isa: str, layout: str, dtype: torch.dtype) -> None:
    """To the bit those of dense copies of either layout."""
    with backend("cpu"):
        for shape in ((2, 20, 6, 9), (1, 3, 1, 17), (3, 1, 5, 1)):
            x = strided(shape, layout, dtype)
            results = [
                upsample_argmax(t, (11, 19), return_confidence=True)
                for t in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last))
            ]
            for labels, confidence in results[1:]:
                assert torch.equal(labels, results[0][0])
                assert torch.equal(confidence, results[0][1])


def test_views_of_every_kind(any_backend: str) -> None:
    dense = torch.randn(2, 5, 4, 4)
    imaginary = torch.complex(torch.zeros(()), dense).conj().imag  # whose sign is a flag
    assert imaginary.is_neg()
    assert torch.equal(upsample_argmax(imaginary, (9, 9)), upsample_argmax(-dense, (9, 9)))
    one = dense[:1, :, :1, :1].expand(2, 5, 4, 4)
    expected = dense[0, :, 0, 0].argmax()
    assert (upsample_argmax(one, (9, 9)) == expected).all()


def test_size_may_be_any_sequence(any_backend: str) -> None:
    x = torch.randn(1, 3, 4, 4)
    expected = upsample_argmax(x, (6, 7))
    for size in ([6, 7], torch.Size((6, 7)), torch.zeros(6, 7).shape):
        assert torch.equal(upsample_argmax(x, size), expected)


def test_no_images(any_backend: str) -> None:
    labels, confidence = upsample_argmax(torch.randn(0, 3, 4, 4), (7, 9), return_confidence=True)
    assert labels.shape == confidence.shape == (0, 7, 9)
    assert (labels.dtype, confidence.dtype) == (torch.int64, torch.float32)


def test_nothing_flows_back(any_backend: str) -> None:
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    for result in upsample_argmax(x, (6, 7), return_confidence=True):
        assert not result.requires_grad
    assert not upsample_argmax(x, (4, 4)).requires_grad


def test_logits_stay(any_backend: str) -> None:
    x = torch.randn(2, 9, 3, 5)
    before = x.clone()
    upsample_argmax(x, (3, 5), return_confidence=True)
    assert torch.equal(x, before)


def test_every_value_is_written(poisoned: None) -> None:
    for shape, size in (((2, 70, 3, 4), (7, 9)), ((1, 3, 20, 40), (7, 5)), ((1, 1, 1, 1), (1, 33))):
        for x in images(shape), images(shape, channels_last=True):
            labels, confidence = upsample_argmax(x[0], size, return_confidence=True)
            assert ((labels >= 0) & (labels < shape[1])).all()
            assert ((confidence > 0) & (confidence <= 1 + 1e-6)).all()


def _x(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 3, 4, 4))


BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not a tensor": (
        lambda: upsample_argmax([1.0], (4, 4)),
        TypeError,
        r"logits must be a tensor; got list",
    ),
    "rank 3": (
        lambda: upsample_argmax(_x(3, 4, 4), (4, 4)),
        ValueError,
        r"logits must have 4 dimensions \(N, C, H, W\); got shape \(3, 4, 4\)",
    ),
    "integers": (
        lambda: upsample_argmax(_x().long(), (4, 4)),
        ValueError,
        r"logits must be float64, float32, bfloat16 or float16; got int64",
    ),
    "complex": (
        lambda: upsample_argmax(_x().cfloat(), (4, 4)),
        ValueError,
        r"logits must be float64, float32, bfloat16 or float16; got complex64",
    ),
    "sparse": (
        lambda: upsample_argmax(_x().to_sparse(), (4, 4)),
        ValueError,
        r"logits must be a dense tensor; got layout torch.sparse_coo",
    ),
    "no class": (
        lambda: upsample_argmax(_x(2, 0, 4, 4), (4, 4)),
        ValueError,
        r"logits must have at least 1 class; got shape \(2, 0, 4, 4\)",
    ),
    "no height": (
        lambda: upsample_argmax(_x(2, 3, 0, 4), (4, 4)),
        ValueError,
        r"logits must be at least 1 pixel high and wide; got shape \(2, 3, 0, 4\)",
    ),
} | {
    f"size {size!r}": (
        lambda size=size: upsample_argmax(_x(), size),
        ValueError,
        r"size must be two positive ints \(height, width\) below 2\^31; got ",
    )
    for size in (4, None, (4,), (4, 4, 4), (0, 4), (4, -1), (4.0, 4), (True, 4), (2**31, 1), "44")
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(any_backend: str, case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith(f"{OP}: ")


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (_x().int(), (4, 4), "got Int"),
        (_x(3, 4, 4), (4, 4), "4 dimensions"),
        (_x(2, 0, 4, 4), (4, 4), "at least 1 class"),
        (_x(2, 3, 0, 4), (4, 4), "at least 1"),
        (_x(), (0, 4), "at least 1"),
        (_x(), (4, -1), "at least 1"),
    ],
)
def test_the_ops_themselves_guard_memory(x: Tensor, size: tuple[int, int], message: str) -> None:
    """Called past the public function, they refuse instead of reading beyond their inputs."""
    for op in (torch.ops.fastfuse.upsample_argmax, torch.ops.fastfuse.upsample_argmax_confidence):
        with pytest.raises(RuntimeError, match=message):
            op(x, *size, False)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """From run to run, and for every image alone too."""
    (x,) = images((3, 35, 13, 26), dtype=dtype, channels_last=channels_last)
    x[1, 2, 5, 7] = NAN
    with backend("cpu"):
        expected = upsample_argmax(x, (52, 41), return_confidence=True)

        def again() -> Iterator[tuple[Tensor, Tensor]]:
            for threads in (1, 2, 3, 5, 5):
                torch.set_num_threads(threads)
                yield upsample_argmax(x, (52, 41), return_confidence=True)
            one_by_one = [upsample_argmax(i[None], (52, 41), return_confidence=True) for i in x]
            yield tuple(torch.cat(parts) for parts in zip(*one_by_one, strict=True))

        for labels, confidence in again():
            assert torch.equal(labels, expected[0])
            torch.testing.assert_close(confidence, expected[1], rtol=0, atol=0, equal_nan=True)


# ---- cost ---------------------------------------------------------------------------------------


def test_flops_are_those_of_upsampling() -> None:
    """A multiply-add each for two taps: along x of source rows, then along y."""
    for size, expected in (((3, 4), 0), ((3, 8), 5 * 4 * 3 * 8), ((6, 8), 5 * 4 * (24 + 48))):
        x = torch.randn(2, 5, 3, 4)
        for confidence in (False, True):
            with backend("cpu"), FlopCounterMode(display=False) as counter:
                upsample_argmax(x, size, return_confidence=confidence)
            assert counter.get_total_flops() == 2 * expected


@reads_proc
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_upsampled_logits_are_never_stored(layout: str) -> None:
    """Labels and confidences take 3 MiB; the logits' copy is 10, upsampled they would be 150."""
    before = f"""
x = torch.randn(1, 150, 128, 128).contiguous(memory_format=torch.{layout})
def call(x, size):
    with fastfuse.backend("cpu"):
        return fastfuse.upsample_argmax(x, size, return_confidence=True)
call(x[..., :8, :8], (32, 32))
"""
    assert peak_of("found = call(x, (512, 512))", before=before) < 16 << 20
