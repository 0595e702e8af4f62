"""The steps of blocks on each pixel: values, what they write, determinism, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import every_dtype, wide
from torch import Tensor

from fastfuse.tolerances import relative_error, tolerance

OPS = torch.ops.fastfuse
EPS = 1e-6

# Rows and channels: parts of vectors, of blocks of rows; more than a thread's share.
SIZES = [(1, 1), (3, 5), (129, 17), (40, 96), (300, 131), (0, 8)]


class Rows:
    """A matrix within a larger one; what surrounds it must stay as it is."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, values: float | None = None):
        rows, channels = size
        self.whole = torch.randn(rows + 2, channels + 3).to(dtype)
        self.matrix = self.whole[1:-1, 2:-1]
        if values is not None:
            self.matrix.fill_(values)
        self.before = self.whole.clone()

    @property
    def intact(self) -> bool:
        """Whether nothing around the matrix was written."""
        changed = self.whole.view(-1).ne(self.before.view(-1)).view_as(self.whole)
        changed[1:-1, 2:-1] = False
        return not changed.any()


def inputs(size: tuple[int, int], dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    return [Rows(size, dtype).matrix for _ in range(count)]


def vectors(length: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(length, dtype=wide(dtype)) for _ in range(count)]


def gelu(x: Tensor) -> Tensor:
    """Without the cancellation of 1 + erf."""
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


# ---- values by the definition -------------------------------------------------------------------


@pytest.mark.walks_memory
@every_dtype
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("with_gelu", [False, True])
def test_layer_norm_by_the_definition(
    isa: str, with_gelu: bool, with_skip: bool, dtype: torch.dtype
) -> None:
    """Forward and backward; sums are added to what is there."""
    for size in SIZES:
        check_layer_norm(size, dtype, with_gelu, with_skip)


def check_layer_norm(
    size: tuple[int, int], dtype: torch.dtype, with_gelu: bool, with_skip: bool
) -> None:
    x, skip, grad = inputs(size, dtype, 3)
    weight, bias, *sums = vectors(size[1], dtype, 4)
    out, grad_x = Rows(size, dtype, torch.nan), Rows(size, dtype, torch.nan)
    OPS.layer_norm_into(
        out.matrix, x, weight, bias, EPS, skip if with_skip else None, with_gelu
    )  # fmt: skip
    before = [s.clone() for s in sums]
    OPS.layer_norm_backward_into(grad_x.matrix, *sums, grad, x, weight, bias, EPS, with_gelu)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    normalized = F.layer_norm(leaves[0], size[1:], *leaves[1:], EPS)
    result = gelu(normalized) if with_gelu else normalized
    expected = torch.autograd.grad(result, leaves, grad.double())
    if with_skip:
        result = result + skip.double()
    assert relative_error(out.matrix, result.detach()) <= tolerance(dtype, roundings=2)
    assert out.intact
    assert grad_x.intact
    # Gradients of one channel, or of nearly equal ones, are differences of larger numbers.
    variance = (x.double() - x.double().mean(1, keepdim=True)).square().mean(1, keepdim=True)
    slope = weight.double().abs() / (variance + EPS).sqrt()
    limit = tolerance(dtype, roundings=2) * (slope * grad.double().abs()).amax() if size[0] else 0
    assert ((grad_x.matrix.double() - expected[0]).abs() <= limit).all()
    for total, start, gradient in zip(sums, before, expected[1:], strict=True):
        exact = start.double() + gradient
        assert relative_error(total, exact) <= tolerance(dtype, reduction=size[0])


def test_layer_norm_of_a_large_mean(isa: str) -> None:
    """The variance is that of differences, not a difference of squares."""
    x = torch.randn(20, 48) + 1000
    out, (weight, bias) = torch.empty_like(x), (torch.ones(48), torch.zeros(48))
    OPS.layer_norm_into(out, x, weight, bias, EPS, None, False)
    expected = F.layer_norm(x.double(), (48,), eps=EPS)
    assert relative_error(out, expected) <= 1e-4  # float32's spacing at 1000, not at 1000^2


@pytest.mark.walks_memory
@every_dtype
def test_bias_and_gelu_by_the_definition(isa: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        check_bias_and_gelu(size, dtype)


def check_bias_and_gelu(size: tuple[int, int], dtype: torch.dtype) -> None:
    hidden, grad = inputs(size, dtype, 2)
    bias, total = vectors(size[1], dtype, 2)
    out, out_too, gradient = (Rows(size, dtype, torch.nan) for _ in range(3))
    gradient.matrix.copy_(grad)
    OPS.bias_gelu_into(out.matrix, hidden, bias)
    start = total.clone()
    OPS.bias_gelu_backward_into(gradient.matrix, out_too.matrix, total, hidden, bias)

    h = (hidden.double() + bias.double()).requires_grad_()
    expected = gelu(h)
    (exact,) = torch.autograd.grad(expected, h, grad.double())
    for result in (out, out_too):
        assert relative_error(result.matrix, expected.detach()) <= tolerance(dtype, roundings=2)
        assert result.intact
    assert relative_error(gradient.matrix, exact) <= tolerance(dtype, roundings=2)
    assert gradient.intact
    error = relative_error(total, start.double() + exact.sum(0))
    assert error <= tolerance(dtype, reduction=size[0], roundings=2)


@pytest.mark.walks_memory
@every_dtype
def test_gelu_in_place(isa: str, dtype: torch.dtype) -> None:
    """Where the hidden tensor stands the same is written."""
    (hidden, grad), (bias,) = inputs((130, 37), dtype, 2), vectors(37, dtype, 1)
    out, again = torch.empty_like(hidden), hidden.clone()
    OPS.bias_gelu_into(out, hidden, bias)
    OPS.bias_gelu_into(again, again, bias)
    assert torch.equal(out, again)
    results = []
    for place in (torch.empty_like(hidden), hidden.clone()):
        g, total = grad.clone(), torch.zeros_like(bias)
        source = place if results else hidden
        OPS.bias_gelu_backward_into(g, place, total, source, bias)
        results.append((g, place, total))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.walks_memory
@every_dtype
@pytest.mark.parametrize("with_skip", [False, True])
def test_bias_and_relu_by_the_definition(isa: str, dtype: torch.dtype, with_skip: bool) -> None:
    """In place too; what is no number stays none."""
    limit = tolerance(dtype, roundings=2)
    for size in SIZES:
        product, skip = inputs(size, dtype, 2)
        (bias,) = vectors(size[1], dtype, 1)
        if product.numel():
            product[0, 0] = math.nan
        out = Rows(size, dtype, math.nan)
        OPS.bias_relu_into(out.matrix, product, bias, skip if with_skip else None)
        expected = product.double() + bias + (skip if with_skip else 0)
        torch.testing.assert_close(
            out.matrix.double(), expected.relu(), rtol=limit, atol=limit, equal_nan=True
        )
        assert out.intact
        OPS.bias_relu_into(product, product, bias, skip if with_skip else None)
        torch.testing.assert_close(product, out.matrix, rtol=0, atol=0, equal_nan=True)


@pytest.mark.walks_memory
@every_dtype
@pytest.mark.parametrize("with_keep", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_residual_by_the_definition(
    isa: str, with_scale: bool, with_keep: bool, dtype: torch.dtype
) -> None:
    """Rows of several images, the first of which began before."""
    for size in SIZES:
        check_residual(size, dtype, with_scale, with_keep)


def check_residual(
    size: tuple[int, int], dtype: torch.dtype, with_scale: bool, with_keep: bool
) -> None:
    pixels, first = 37, 50
    images = (first + torch.arange(size[0])) // pixels
    x, product, grad = inputs(size, dtype, 3)
    bias, scale, total = vectors(size[1], dtype, 3)
    keep = torch.arange(12, dtype=wide(dtype)) * 0.5
    factor = keep.double()[images][:, None] if with_keep else 1.0
    out = Rows(size, dtype, torch.nan)
    OPS.residual_into(
        out.matrix, x, product, bias, scale if with_scale else None, keep if with_keep else None,
        pixels, first,
    )  # fmt: skip
    branch = product.double() + bias.double()
    if with_scale:
        branch = branch * scale.double()
    assert relative_error(out.matrix, x.double() + factor * branch) <= tolerance(dtype)
    assert out.intact

    kept, start = Rows(size, dtype, torch.nan), total.clone()
    OPS.residual_backward_into(
        kept.matrix, total, grad, keep if with_keep else None, pixels, first
    )  # fmt: skip
    exact = factor * grad.double()
    if with_keep:
        assert relative_error(kept.matrix, exact) <= tolerance(dtype)
    else:  # nothing to write: what would be written is the gradient
        assert kept.matrix.isnan().all()
    assert kept.intact
    error = relative_error(total, start.double() + exact.sum(0))
    assert error <= tolerance(dtype, reduction=size[0])


# ---- GELU ---------------------------------------------------------------------------------------


def gelu_of(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The values in a dtype, GELU of them, and its derivative."""
    x = values.to(dtype)[:, None].contiguous()
    bias, out = torch.zeros(1, dtype=wide(dtype)), torch.full_like(x, torch.nan)
    OPS.bias_gelu_into(out, x, bias)
    grad, out_too = torch.ones_like(x), torch.full_like(x, torch.nan)
    OPS.bias_gelu_backward_into(grad, out_too, bias.clone(), x, bias)
    limit = tolerance(dtype, roundings=2) * x.double().abs().clamp(min=1)
    finite = x.isfinite()
    assert ((out.double() - out_too.double()).abs() <= limit)[finite].all()
    return x[:, 0], out[:, 0], grad[:, 0]


@every_dtype
def test_gelu_is_accurate_everywhere(isa: str, dtype: torch.dtype) -> None:
    values = torch.cat(
        [
            torch.linspace(-40, 40, 80_001, dtype=torch.float64),
            torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-5, -1e-5, 1000.0, -1000.0, 6e4, -6e4]),
        ]
    )
    x, result, derivative = gelu_of(values, dtype)
    exact = x.double().requires_grad_()
    expected = gelu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    scale = exact.detach().abs().clamp(min=1)
    assert ((result.double() - expected.detach()).abs() <= tolerance(dtype) * scale).all()
    assert ((derivative.double() - slope).abs() <= tolerance(dtype) * slope.abs().max()).all()


def test_gelu_keeps_its_digits_where_it_is_small(isa: str) -> None:
    """float32, far out too: what it loses is what x^2 loses when it is rounded."""
    values = torch.cat([torch.linspace(-12.9, 13, 50_001), torch.logspace(-30, 0, 100)])
    x, result, _ = gelu_of(torch.cat([values, -values]).clamp(min=-12.9), torch.float32)
    expected = gelu(x.double())
    limit = 1e-6 + x.double().square() * 2**-24
    assert ((result.double() - expected).abs() <= limit * expected.abs()).all()


@every_dtype
def test_gelu_hides_nothing_that_is_not_finite(isa: str, dtype: torch.dtype) -> None:
    """Nor lets it reach a neighbour."""
    values = torch.tensor([1.0, math.inf, -1.0, math.nan, 2.0, -math.inf, 0.5])
    _, result, derivative = gelu_of(values, dtype)
    for tensor in (result, derivative):
        assert torch.equal(tensor.isfinite(), values.isfinite())


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    size = (1500, 70)
    x, grad = inputs(size, dtype, 2)
    weight, bias = vectors(size[1], dtype, 2)
    keep = torch.rand(30, dtype=wide(dtype))
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        outs = [torch.empty_like(x) for _ in range(6)]
        sums = [torch.zeros_like(bias) for _ in range(4)]
        OPS.layer_norm_into(outs[0], x, weight, bias, EPS, None, True)
        OPS.layer_norm_backward_into(outs[1], *sums[:2], grad, x, weight, bias, EPS, True)
        OPS.bias_gelu_into(outs[2], x, bias)
        outs[3].copy_(grad)
        OPS.bias_gelu_backward_into(outs[3], outs[4], sums[2], x, bias)
        OPS.residual_backward_into(outs[5], sums[3], grad, keep, 50, 0)
        results.append([*outs, *sums])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- bad input ----------------------------------------------------------------------------------

CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layer_norm": lambda a: OPS.layer_norm_into(
        a["out"], a["x"], a["weight"], a["bias"], EPS, a["skip"], False
    ),
    "layer_norm_backward": lambda a: OPS.layer_norm_backward_into(
        a["out"], a["sum"], a["sum2"], a["skip"], a["x"], a["weight"], a["bias"], EPS, False
    ),
    "bias_gelu": lambda a: OPS.bias_gelu_into(a["out"], a["x"], a["bias"]),
    "bias_gelu_backward": lambda a: OPS.bias_gelu_backward_into(
        a["skip"], a["out"], a["sum"], a["x"], a["bias"]
    ),
    "bias_relu": lambda a: OPS.bias_relu_into(a["out"], a["x"], a["bias"], a["skip"]),
    "residual": lambda a: OPS.residual_into(
        a["out"], a["skip"], a["x"], a["bias"], a["weight"], a["keep"], a["pixels"], a["first"]
    ),
    "residual_backward": lambda a: OPS.residual_backward_into(
        a["out"], a["sum"], a["x"], a["keep"], a["pixels"], a["first"]
    ),
}


def matrix_of_others(t: Tensor) -> list[Any]:
    """What a matrix must not be replaced by."""
    return [t[:-1], t[:, :-1], t.double(), t.int(), t[0], t[None], t.t().contiguous().t()]


def vector_of_others(t: Tensor) -> list[Any]:
    return [t[:-1], t.double(), t.half(), t[None], t.repeat_interleave(2)[::2]]


@pytest.mark.walks_memory
@pytest.mark.parametrize("name", CALLS)
def test_the_ops_guard_memory(name: str) -> None:
    good: dict[str, Any] = {key: torch.randn(20, 6) for key in ("out", "x", "skip")}
    good |= {key: torch.randn(6) for key in ("weight", "bias", "sum", "sum2")}
    good |= {"keep": torch.ones(4), "pixels": 5, "first": 0}
    CALLS[name](good)
    read = [key for key in good if key in CALLS[name].__code__.co_consts]
    assert "out" in read
    for key in read:
        bad: list[Any] = {
            "keep": [torch.ones(3), torch.ones(4, 1), torch.ones(4).double()],
            "pixels": [0, -1, 4],
            "first": [-1, 1],
        }.get(key, [])
        if not bad:
            others = matrix_of_others if good[key].dim() == 2 else vector_of_others
            bad = others(good[key])
        for value in bad:
            with pytest.raises(RuntimeError, match=f"{name}_into: "):
                CALLS[name]({**good, key: value})
