"""The pointwise steps' Triton kernels against float64 PyTorch, under Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from inputs import fast_and_slow, integers
from torch import Tensor
from triton_interpreter import INTERPRETING, interpreted

from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("poisoned")

if INTERPRETING:
    from fastfuse.ops.pointwise import triton as kernels

EPS = 1e-6
# Rows and channels: one row; parts of a tile; several tiles and blocks of channels; a long row.
SIZES = {
    "one row": (1, 6),
    "odd": (7, 17),
    "many rows": (70, 40),
    "many channels": (3, 290),
    "one channel": (5, 1),
    "a long row": (2, 1100),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _id(value: object) -> str:
    named = {False: "without", True: "with"}.get(value, str(value))
    return named.removeprefix("torch.").replace(" ", "_")


CASES = [(size, torch.float32) for size in SIZES] + [("odd", dtype) for dtype in DTYPES[1:]]
few_programs = pytest.mark.parametrize("programs", [1, 3])


def with_or_without(*options: str) -> pytest.MarkDecorator:
    """Every case with some of the options on, in turn; all that is possible in slow tests."""
    some = [[bool(i >> bit & 1) for bit in range(len(options))] for i in range(len(CASES))]
    return fast_and_slow(
        " ".join(("size", "dtype", *options)),
        [(*case, *flags) for case, flags in zip(CASES, some, strict=True)],
        [
            (*case, *flags)
            for case in CASES
            for flags in product((False, True), repeat=len(options))
        ],
        ids=_id,
    )


class Output:
    """A matrix full of NaN within a larger one, or what the matrix holds."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, values: Tensor | None = None):
        self.whole = torch.full((size[0] + 2, size[1] + 3), torch.nan).to(dtype)
        self.matrix = self.whole[1:-1, 2:-1]
        if values is not None:
            self.matrix.copy_(values)

    def check(self, expected: Tensor) -> None:
        _assert_close(self.matrix, expected)
        self.matrix.fill_(torch.nan)
        assert self.whole.isnan().all(), "written outside"


def _matrix(size: str, dtype: torch.dtype) -> Tensor:
    """A slice of a larger one's columns."""
    rows, channels = SIZES[size]
    return torch.randn(rows, channels + 3).to(dtype)[:, 1:-2]


def _vectors(length: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return [torch.randn(length, dtype=wide) for _ in range(count)]


def _assert_close(result: Tensor, expected: Tensor, reduction: float = 1.0) -> None:
    error = relative_error(result, expected)
    limit = tolerance(result.dtype, reduction=reduction, roundings=2)
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"


def _assert_added(sums: Tensor, before: Tensor, expected: Tensor, rows: int) -> None:
    _assert_close(sums, before.double() + expected, reduction=rows)


@interpreted
@with_or_without("gelu", "optional")
def test_layer_norm(size: str, dtype: torch.dtype, gelu: bool, optional: bool) -> None:
    x = _matrix(size, dtype)
    skip = _matrix(size, dtype) if optional else None
    weight, bias = _vectors(x.shape[1], dtype, 2)
    out = Output(x.shape, dtype)
    kernels.layer_norm_into(out.matrix, x, weight, bias, EPS, skip, gelu)
    expected = F.layer_norm(x.double(), x.shape[1:], weight.double(), bias.double(), EPS)
    expected = F.gelu(expected) if gelu else expected
    out.check(expected if skip is None else expected + skip.double())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_gelu_of_small_and_large_values(dtype: torch.dtype) -> None:
    """Relative to itself, as far as float32's exponential reaches; of both infinities and NaN what
    PyTorch gives."""
    hidden = torch.linspace(-12, 12, 960).reshape(4, 240).to(dtype)
    bias = torch.zeros(240, dtype=torch.promote_types(dtype, torch.float32))
    out = torch.empty_like(hidden)
    kernels.bias_gelu_into(out, hidden, bias)
    x = hidden.double()
    exact = x * 0.5 * torch.erfc(-x * 0.5**0.5)
    limits = torch.finfo(dtype)
    relative = 6e-6 if dtype == torch.float32 else limits.eps
    wrong = (out.double() - exact).abs() > relative * exact.abs() + limits.eps * limits.tiny
    if dtype == torch.float64:  # as PyTorch has it, from erf: absolute
        wrong = (out - exact).abs() > 1e-14
    assert not wrong.any(), hidden[wrong]
    extreme = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1e4, -1e4, 0.0]]).to(dtype)
    result = torch.empty_like(extreme)
    kernels.bias_gelu_into(result, extreme, bias[:6])
    torch.testing.assert_close(result, F.gelu(extreme), rtol=0, atol=0, equal_nan=True)


@interpreted
@with_or_without("gelu")
def test_layer_norm_backward(size: str, dtype: torch.dtype, gelu: bool) -> None:
    x, grad = _matrix(size, dtype), _matrix(size, dtype)
    weight, bias, *sums = _vectors(x.shape[1], dtype, 4)
    before, grad_x = [s.clone() for s in sums], Output(x.shape, dtype)
    kernels.layer_norm_backward_into(grad_x.matrix, *sums, grad, x, weight, bias, EPS, gelu)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    result = F.layer_norm(leaves[0], x.shape[1:], *leaves[1:], EPS)
    result = F.gelu(result) if gelu else result
    expected = torch.autograd.grad(result, leaves, grad.double())
    grad_x.check(expected[0] if x.shape[1] > 1 else torch.zeros(x.shape))  # exactly zero
    for total, start, gradient in zip(sums, before, expected[1:], strict=True):
        _assert_added(total, start, gradient, x.shape[0])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_layer_norm_backward_of_one_channel(dtype: torch.dtype) -> None:
    """Exactly zero, however the compiler fuses."""
    x, grad = _matrix("one channel", dtype), _matrix("one channel", dtype)
    weight, bias, *sums = _vectors(1, dtype, 4)
    grad_x = Output(x.shape, dtype)
    kernels.layer_norm_backward_into(grad_x.matrix, *sums, grad, x, weight, bias, EPS, False)
    assert not grad_x.matrix.any()


@interpreted
def test_layer_norm_of_a_large_mean() -> None:
    """The variance is that of differences, not a difference of squares."""
    x = torch.randn(6, 48) + 1000
    out = torch.full_like(x, torch.nan)
    kernels.layer_norm_into(out, x, torch.ones(48), torch.zeros(48), EPS, None, False)
    expected = F.layer_norm(x.double(), (48,), eps=EPS)
    assert relative_error(out, expected) <= 1e-4  # float32's spacing at 1000, not at 1000^2


@interpreted
@with_or_without("optional")
def test_bias_gelu(size: str, dtype: torch.dtype, optional: bool) -> None:
    """Into other memory, or in place."""
    hidden = 2 * _matrix(size, dtype)
    (bias,) = _vectors(hidden.shape[1], dtype, 1)
    out = Output(hidden.shape, dtype, hidden if optional else None)
    kernels.bias_gelu_into(out.matrix, out.matrix if optional else hidden, bias)
    out.check(F.gelu(hidden.double() + bias.double()))


@interpreted
@with_or_without("optional")
def test_bias_gelu_backward(size: str, dtype: torch.dtype, optional: bool) -> None:
    hidden, incoming = 2 * _matrix(size, dtype), _matrix(size, dtype)
    bias, sums = _vectors(hidden.shape[1], dtype, 2)
    before = sums.clone()
    out = Output(hidden.shape, dtype, hidden if optional else None)
    grad = Output(hidden.shape, dtype, incoming)
    source = out.matrix if optional else hidden
    kernels.bias_gelu_backward_into(grad.matrix, out.matrix, sums, source, bias)
    leaf = (hidden.double() + bias.double()).requires_grad_()
    result = F.gelu(leaf)
    (expected,) = torch.autograd.grad(result, leaf, incoming.double())
    out.check(result.detach())
    grad.check(expected)
    _assert_added(sums, before, expected.sum(0), hidden.shape[0])


def _images(rows: int, keep: Tensor, pixels: int, first: int) -> Tensor:
    """The factor of every row, in float64."""
    return keep.double()[(first + torch.arange(rows)) // pixels][:, None]


@interpreted
@with_or_without("optional")
def test_residual(size: str, dtype: torch.dtype, optional: bool) -> None:
    """With and without a scale of the channels and a factor of the images."""
    x, product = _matrix(size, dtype), _matrix(size, dtype)
    rows, channels = x.shape
    bias, scale = _vectors(channels, dtype, 2)
    pixels, first = 5, 3
    (keep,) = _vectors((first + rows - 1) // pixels + 1, dtype, 1)
    options = (scale, keep) if optional else (None, None)
    out = Output(x.shape, dtype)
    kernels.residual_into(out.matrix, x, product, bias, *options, pixels, first)
    expected = product.double() + bias.double()
    if optional:
        expected *= scale.double() * _images(rows, keep, pixels, first)
    out.check(expected + x.double())


@interpreted
@with_or_without("optional")
def test_residual_backward(size: str, dtype: torch.dtype, optional: bool) -> None:
    """Without a factor of the images, nothing but the sums is written."""
    grad = _matrix(size, dtype)
    rows, channels = grad.shape
    pixels, first = 4, 6
    (keep,) = _vectors((first + rows - 1) // pixels + 1, dtype, 1)
    (sums,) = _vectors(channels, dtype, 1)
    before, out = sums.clone(), Output(grad.shape, dtype)
    kernels.residual_backward_into(
        out.matrix, sums, grad, keep if optional else None, pixels, first
    )
    expected = grad.double()
    if optional:
        expected = expected * _images(rows, keep, pixels, first)
        out.check(expected)
    assert out.whole.isnan().all()
    _assert_added(sums, before, expected.sum(0), rows)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Of sums over rows no bit is lost."""
    grad, keep = integers(70, 17, dtype=dtype), integers(7, dtype=_vectors(1, dtype, 1)[0].dtype)
    out, sums = torch.full_like(grad, torch.nan), torch.ones(17, dtype=keep.dtype)
    kernels.residual_backward_into(out, sums, grad, keep, 10, 0)
    expected = grad.double() * _images(70, keep, 10, 0)
    assert torch.equal(out.double(), expected)
    assert torch.equal(sums.double(), 1 + expected.sum(0))


@interpreted
def test_images_of_one_pixel_far_on() -> None:
    """Rows are counted in int64."""
    keep, grad, sums = torch.randn(70), torch.randn(60, 3), torch.zeros(3)
    out = torch.full_like(grad, torch.nan)
    kernels.residual_backward_into(out, sums, grad, keep, 1, 10)
    assert torch.equal(out, grad * keep[10:, None])
    pixels = 2**31 - 1
    kernels.residual_backward_into(out, sums, grad, keep, pixels, 3 * pixels - 20)
    factors = torch.cat([keep[2].expand(20), keep[3].expand(40)])
    assert torch.equal(out, grad * factors[:, None])


@interpreted
@pytest.mark.usefixtures("plans_anew")
@few_programs
def test_many_tiles_of_one_program(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images have more tiles than programs."""
    monkeypatch.setattr(kernels, "SUM_PROGRAMS", programs)
    rows, channels = 150, 40
    x, grad, weight, bias = (torch.randn(s) for s in 2 * [(rows, channels)] + 2 * [(channels,)])
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    out, sums = torch.full_like(x, torch.nan), torch.zeros(3, channels)
    kernels.layer_norm_backward_into(out, sums[0], sums[1], grad, x, weight, bias, EPS, True)
    result = F.gelu(F.layer_norm(leaves[0], (channels,), *leaves[1:], EPS))
    expected = torch.autograd.grad(result, leaves, grad.double())
    _assert_close(out, expected[0])
    _assert_close(sums[0], expected[1], reduction=rows)
    _assert_close(sums[1], expected[2], reduction=rows)
    kernels.residual_backward_into(out, sums[2], grad, torch.arange(1.0, 5), 50, 20)
    factors = (1 + (20 + torch.arange(rows)) // 50)[:, None]
    assert torch.equal(out, grad * factors)
    _assert_close(sums[2], out.double().sum(0), reduction=rows)
    sums.zero_()
    kernels.bias_gelu_backward_into(grad, out, sums[2], x, bias)
    _assert_close(out, F.gelu(x.double() + bias.double()))
    _assert_close(sums[2], grad.double().sum(0), reduction=rows)


@interpreted
def test_the_same_bits_again() -> None:
    x, grad, weight = torch.randn(90, 24), torch.randn(90, 24), torch.randn(24)
    results = []
    for _ in range(2):
        out, sums = torch.full_like(x, torch.nan), torch.ones(2, 24)
        kernels.layer_norm_backward_into(out, sums[0], sums[1], grad, x, weight, weight, EPS, True)
        results.append((out, sums))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
@pytest.mark.parametrize("size", [(0, 8), (3, 0)], ids=["no rows", "no channels"])
def test_nothing_to_do(size: tuple[int, int]) -> None:
    """Sums stay as they are."""
    x, vector, sums = torch.empty(size), torch.ones(size[1]), torch.ones(size[1])
    kernels.layer_norm_into(x, x, vector, vector, EPS, None, True)
    kernels.layer_norm_backward_into(x, sums, sums, x, x, vector, vector, EPS, True)
    kernels.bias_gelu_into(x, x, vector)
    kernels.bias_gelu_backward_into(x, x, sums, x, vector)
    kernels.residual_into(x, x, x, vector, None, None, 4, 0)
    kernels.residual_backward_into(x, sums, x, None, 4, 0)
    assert torch.equal(sums, vector)
