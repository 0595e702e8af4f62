"""depthwise_conv2d's Triton kernels against the float64 definition, under Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from inputs import fast_and_slow, integers
from torch import Tensor
from triton_interpreter import INTERPRETING, interpreted

from fastfuse.ops.depthwise_conv2d.reference import reference
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("poisoned")

if INTERPRETING:
    from fastfuse.ops.depthwise_conv2d import triton as kernels

# (N, C, H, W), kernel size and dilation.
CASES = {
    "3x3": ((2, 3, 5, 6), 3, 1),
    "3x3 dilated": ((1, 16, 9, 7), 3, 3),
    "5x5": ((1, 4, 6, 5), 5, 1),
    "7x7": ((2, 5, 7, 9), 7, 1),
    "7x7 dilated": ((1, 2, 11, 8), 7, 3),
    "9x9": ((1, 2, 5, 10), 9, 1),
    "1x1": ((2, 17, 3, 4), 1, 1),
    "smaller than the reach": ((1, 6, 3, 2), 7, 3),
    "far taps": ((1, 2, 3, 4), 3, 50),
    "one pixel": ((2, 5, 1, 1), 7, 1),
    "one channel": ((1, 1, 6, 7), 7, 1),
    "one row": ((1, 3, 1, 9), 5, 1),
    "one column": ((1, 3, 9, 1), 5, 2),
    "many channels": ((1, 48, 2, 3), 3, 1),
    "wide": ((1, 2, 3, 35), 3, 1),
    "tall": ((1, 2, 37, 2), 3, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "channels_last", "sliced"]


def _id(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "_")


FAST = [(case, torch.float32, LAYOUTS[i % 3]) for i, case in enumerate(CASES)] + [
    ("3x3 dilated", dtype, LAYOUTS[i]) for i, dtype in enumerate(DTYPES[1:])
]
ALL = [
    *(("3x3 dilated", dtype, layout) for dtype in DTYPES[1:] for layout in LAYOUTS),
    *(("7x7", torch.bfloat16, layout) for layout in LAYOUTS[:2]),
    ("7x7", torch.float32, LAYOUTS[1]),
    ("smaller than the reach", torch.float32, LAYOUTS[0]),
]
every_case = fast_and_slow("case dtype layout", FAST, ALL, ids=_id)
# Where the kernel is the one of test_forward.
every_third_case = fast_and_slow("case dtype layout", FAST[::3], FAST + ALL, ids=_id)


def _image(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    if layout == "sliced":
        n, c, h, w = shape
        return torch.randn(n, c + 3, h + 2, 2 * w).to(dtype)[:, 1:-2, 2:, ::2]
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _parameters(channels: int, kernel_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias, neither of them contiguous."""
    weight = torch.randn(channels, 1, kernel_size, kernel_size).to(dtype).transpose(2, 3)
    return weight, torch.randn(2 * channels).to(dtype)[::2]


def _assert_close(result: Tensor, expected: Tensor, reduction: float = 1.0) -> None:
    error, limit = relative_error(result, expected), tolerance(result.dtype, reduction=reduction)
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _assert_layout(result: Tensor, channels_last: bool) -> None:
    assert result.is_contiguous(memory_format=_format(channels_last))


def _exact_gradients(
    grad_output: Tensor, x: Tensor, kernel_size: int, dilation: int
) -> tuple[Tensor, ...]:
    channels = x.shape[1]
    weight = torch.zeros(channels, 1, kernel_size, kernel_size, dtype=torch.float64)
    bias = torch.zeros(channels, dtype=torch.float64)
    leaves = (weight.requires_grad_(), bias.requires_grad_())
    return torch.autograd.grad(
        reference(x.double(), *leaves, dilation), leaves, grad_output.double()
    )


def _check_gradients(grad_output: Tensor, x: Tensor, kernel_size: int, dilation: int) -> None:
    results = kernels.backward_weight(grad_output, x, kernel_size, dilation)
    expected = _exact_gradients(grad_output, x, kernel_size, dilation)
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == x.dtype
        assert result.is_contiguous()
        _assert_close(result, exact, reduction=x[:, 0].numel())


@interpreted
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_float32_bias(channels_last: bool) -> None:
    """Beside a narrow image, as blocks give it under autocast: it is not rounded."""
    x = _image((2, 5, 4, 6), torch.bfloat16, "channels_last" if channels_last else "contiguous")
    weight, bias = torch.zeros(5, 1, 3, 3).bfloat16(), 1 + torch.rand(5)
    out = kernels.forward(torch.zeros_like(x), weight, bias, None, 1, False, channels_last)
    assert torch.equal(out, bias[:, None, None].expand(x.shape).bfloat16())
    minus = bias.bfloat16()[:, None, None].expand(x.shape)
    minus = (-minus).contiguous(memory_format=_format(channels_last))
    rest = kernels.forward(torch.zeros_like(x), weight, bias, minus, 1, False, channels_last)
    rounding = bias - bias.bfloat16().float()
    assert torch.equal(rest, rounding[:, None, None].expand(x.shape).bfloat16())


@interpreted
@every_case
def test_forward(case: str, dtype: torch.dtype, layout: str) -> None:
    shape, kernel_size, dilation = CASES[case]
    x, (weight, bias) = _image(shape, dtype, layout), _parameters(shape[1], kernel_size, dtype)
    channels_last = layout == "channels_last"
    result = kernels.forward(x, weight, bias, None, dilation, False, channels_last)
    _assert_close(result, reference(x.double(), weight.double(), bias.double(), dilation))
    _assert_layout(result, channels_last)


@interpreted
@every_third_case
def test_flipped_with_an_addend(case: str, dtype: torch.dtype, layout: str) -> None:
    """The gradient of the input; the addend is in another layout than the input."""
    shape, kernel_size, dilation = CASES[case]
    x, (weight, _) = _image(shape, dtype, layout), _parameters(shape[1], kernel_size, dtype)
    addend = _image(shape, dtype, LAYOUTS[LAYOUTS.index(layout) - 1])
    channels_last = layout != "contiguous"
    result = kernels.forward(x, weight, None, addend, dilation, True, channels_last)
    expected = reference(x.double(), weight.double().flip(2, 3), None, dilation)
    _assert_close(result, expected + addend.double())
    _assert_layout(result, channels_last)


@interpreted
@every_case
def test_backward_weight(case: str, dtype: torch.dtype, layout: str) -> None:
    """The gradient of the output is in another layout than the input."""
    shape, kernel_size, dilation = CASES[case]
    grad_output = _image(shape, dtype, LAYOUTS[LAYOUTS.index(layout) - 1])
    _check_gradients(grad_output, _image(shape, dtype, layout), kernel_size, dilation)


@interpreted
@pytest.mark.usefixtures("plans_anew")
@fast_and_slow(
    "layout dtype",
    zip(LAYOUTS, DTYPES[:2], strict=False),
    product(LAYOUTS[:2], DTYPES[:2]),
    ids=_id,
)
def test_long_runs(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images have runs of as many rows as registers allow."""
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", 1)
    weight, bias = _parameters(16, 7, dtype)
    for height, dilation in ((33, 1), (29, 3)):
        x = _image((1, 16, height, 3), dtype, layout)
        channels_last = layout == "channels_last"
        result = kernels.forward(x, weight, bias, None, dilation, False, channels_last)
        _assert_close(result, reference(x.double(), weight.double(), bias.double(), dilation))


@interpreted
@pytest.mark.usefixtures("plans_anew")
@fast_and_slow(
    "programs layout", zip((1, 5), LAYOUTS, strict=False), product((1, 5), LAYOUTS[:2]), ids=_id
)
def test_many_tiles_of_one_program(
    programs: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large images have more tiles than programs: a program walks from image to image."""
    monkeypatch.setattr(kernels, "PARTIAL_PROGRAMS", programs)
    shape = (2, 3, 20, 40)
    grad_output, x = (_image(shape, torch.float32, layout) for _ in range(2))
    _check_gradients(grad_output, x, 3, 2)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Results are rounded once, from sums that are exact."""
    x, grad_output = integers(2, 2, 5, 7, 9, dtype=dtype)
    weight, bias = integers(5, 1, 7, 7, dtype=dtype), integers(5, dtype=dtype)
    result = kernels.forward(x, weight, bias, None, 1, False, False)
    expected = reference(x.double(), weight.double(), bias.double(), 1)
    assert torch.equal(result, expected.to(dtype))
    results = kernels.backward_weight(grad_output, x, 7, 1)
    for result, gradient in zip(results, _exact_gradients(grad_output, x, 7, 1), strict=True):
        assert torch.equal(result, gradient.to(dtype))


@interpreted
def test_gradients_of_an_expanded_tensor() -> None:
    x = _image((2, 4, 5, 6), torch.float32, "channels_last")
    _check_gradients(torch.randn(4, 1, 1).expand(2, 4, 5, 6), x, 3, 1)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_same_bits_again(layout: str) -> None:
    grad_output, x = (_image((2, 5, 7, 11), torch.float32, layout) for _ in range(2))
    first, second = (kernels.backward_weight(grad_output, x, 3, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_what_is_outside_is_not_read(layout: str) -> None:
    """An infinity reaches only the values that read it."""
    x = _image((1, 2, 7, 9), torch.float32, layout).zero_()
    x[:, 1, 0, 8] = torch.inf
    weight = torch.ones(2, 1, 5, 5)
    result = kernels.forward(x, weight, None, None, 1, False, layout == "channels_last")
    expected = torch.zeros(1, 2, 7, 9)
    expected[:, 1, :3, 6:] = torch.inf
    assert torch.equal(result, expected)
    grad_weight, grad_bias = kernels.backward_weight(torch.ones_like(x), x, 5, 1)
    expected = torch.zeros(2, 1, 5, 5)
    expected[1, :, :3, 2:] = torch.inf  # tap (4, .) reads y + 2, and no y is -2
    assert torch.equal(grad_weight, expected)
    assert torch.equal(grad_bias, torch.full((2,), 63.0))


@interpreted
def test_nothing_to_do() -> None:
    weight = torch.ones(3, 1, 3, 3)
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)):
        x = torch.empty(shape)
        result = kernels.forward(x, weight[: shape[1]], None, None, 1, False, True)
        assert result.shape == shape
        grad_weight, grad_bias = kernels.backward_weight(x, x, 3, 1)
        assert torch.equal(grad_weight, torch.zeros(shape[1], 1, 3, 3))
        assert torch.equal(grad_bias, torch.zeros(shape[1]))
