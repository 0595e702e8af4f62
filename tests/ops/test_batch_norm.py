"""Batch norms with the ReLUs and products behind them, against PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from inputs import images
from torch import Tensor

from fastfuse import _extension
from fastfuse.ops import batch_norm
from fastfuse.ops.batch_norm import BatchNorm, normalized_relu, normalized_relu_conv
from fastfuse.ops.policy import policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.skipif(_extension.module is None, reason="needs the compiled module")

DTYPES = (torch.float64, torch.float32)
EPS = 1e-3
# N, C, H, W: rows of a block and of a group with a rest, vectors with a rest, one of each
SHAPES = {
    "odd": (3, 5, 11, 7),
    "whole": (2, 32, 8, 16),
    "large": (2, 33, 23, 19),
    "few": (1, 1, 1, 2),
}
both_kinds = pytest.mark.parametrize("of_batch", [True, False], ids=["batch", "running"])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_shapes = pytest.mark.parametrize("case", SHAPES)


def norm_of(x: Tensor, of_batch: bool, *, affine: bool = True) -> BatchNorm:
    channels, dtype = x.shape[1], x.dtype
    moments = batch_norm.measure(x)
    if not of_batch:
        moments = torch.stack([torch.randn(channels), torch.rand(channels) + 0.5]).to(dtype)
    weight, bias = (torch.randn(channels).to(dtype) for _ in range(2))
    if not affine:
        return BatchNorm(moments, None, None, EPS, of_batch)
    return BatchNorm(moments, weight.requires_grad_(), bias.requires_grad_(), EPS, of_batch)


def exact_norm(x: Tensor, norm: BatchNorm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mean, variance = norm.moments.detach().double()
    return F.batch_norm(x, mean, variance, weight, bias, norm.of_batch, 0.0, EPS)


def compare(
    run: Callable[..., Tensor], exact: Callable[..., Tensor], given: list[Tensor | None], rows: int
) -> None:
    """Results and all gradients, of the same arguments in their dtype and in float64."""
    dtype = next(t.dtype for t in given if t is not None)
    mine = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
    out, expected = run(*mine), exact(*wide)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= tolerance(dtype, reduction=64, roundings=4)
    (grad,) = images(tuple(expected.shape), dtype=dtype, channels_last=False)
    out.backward(grad)
    expected.backward(grad.double())
    for i, (a, b) in enumerate(zip(mine, wide, strict=True)):
        if a is None or b is None:
            continue
        assert a.grad is not None, i
        assert b.grad is not None, i
        error = (a.grad.double() - b.grad).abs().max()
        scale = b.grad.abs().max() + grad.abs().max()
        assert error <= tolerance(dtype, reduction=rows, roundings=8) * scale, i


@pytest.mark.walks_memory
@all_dtypes
@all_shapes
def test_moments(isa: str, case: str, dtype: torch.dtype) -> None:
    (x,) = images(SHAPES[case], dtype=dtype, channels_last=True)
    x = x + 1000  # what a sum of squares would lose
    mean, variance = batch_norm.measure(x)
    exact = x.double()
    assert relative_error(mean, exact.mean((0, 2, 3))) <= tolerance(dtype)
    expected = exact.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.walks_memory
@pytest.mark.parametrize("has_skip", [False, True], ids=["alone", "skip"])
@both_kinds
@all_dtypes
@all_shapes
def test_relu(isa: str, case: str, dtype: torch.dtype, of_batch: bool, has_skip: bool) -> None:
    x, skip = images(SHAPES[case], SHAPES[case], dtype=dtype, channels_last=has_skip)
    norm = norm_of(x, of_batch, affine=case != "whole")
    keep = (torch.rand(x.shape[0]) * 2).to(dtype) if has_skip else None

    def run(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        here = norm._replace(weight=weight, bias=bias)
        return normalized_relu(x, here, skip, keep)

    def exact(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        y = exact_norm(x, norm, weight, bias)
        if skip is not None and keep is not None:
            y = skip + y * keep.double()[:, None, None, None]
        return y.relu()

    given = [x, skip if has_skip else None, norm.weight, norm.bias]
    compare(run, exact, given, x.numel() // x.shape[1])


@pytest.mark.walks_memory
@pytest.mark.parametrize("kind", ["batch", "running", "none"])
@all_dtypes
@all_shapes
def test_convolution(isa: str, case: str, dtype: torch.dtype, kind: str) -> None:
    (x,) = images(SHAPES[case], dtype=dtype, channels_last=True)
    norm = None if kind == "none" else norm_of(x, kind == "batch")
    matrix = (torch.randn(9, x.shape[1], 1, 1) / 3).to(dtype)

    def run(x: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        here = None if norm is None else norm._replace(weight=weight, bias=bias)
        out, moments = normalized_relu_conv(x, here, matrix, measured=True)
        torch.testing.assert_close(moments, batch_norm.measure(out))
        assert not moments.requires_grad
        return out

    def exact(x: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x if norm is None else exact_norm(x, norm, weight, bias).relu()
        return F.conv2d(y, matrix)

    given = [x, matrix, *((None, None) if norm is None else (norm.weight, norm.bias))]
    with use_policy(policy_of("cpu"), hidden_bytes=1, hidden_rows=128):  # several chunks
        compare(run, exact, given, x.numel() // x.shape[1])


def test_what_is_not_wanted_is_not_computed() -> None:
    (x,) = images((1, 8, 6, 6), channels_last=True)
    norm, matrix = norm_of(x, True), torch.randn(4, 8, 1, 1).requires_grad_()
    out, empty = normalized_relu_conv(x, norm, matrix, measured=False)
    assert empty.numel() == 0
    (alone,) = torch.autograd.grad(out.sum(), [matrix], retain_graph=True)
    both = torch.autograd.grad(out.sum(), [matrix, norm.weight])
    torch.testing.assert_close(both[0], alone)


@pytest.mark.walks_memory
def test_the_same_bits_for_any_number_of_threads(isa: str) -> None:
    x, skip = images((2, 40, 31, 29), (2, 40, 31, 29), channels_last=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norm = norm_of(x, True, affine=False)
        given = [t.clone().requires_grad_() for t in (x, skip)]
        y = normalized_relu(given[0], norm, given[1])
        found.append((norm.moments, y.detach(), *torch.autograd.grad(y.square().sum(), given)))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


def test_a_nan_stays_one_and_lets_its_gradient_through() -> None:
    (x,) = images((1, 3, 4, 4), channels_last=True)
    x[0, 1, 2, 3] = torch.nan
    moments = torch.stack([torch.zeros(3), torch.ones(3)])
    x.requires_grad_()
    out = normalized_relu(x, BatchNorm(moments, None, None, 0.0, False))
    torch.testing.assert_close(out, x.relu(), equal_nan=True)
    (grad,) = torch.autograd.grad(out.sum(), [x], retain_graph=True)
    (expected,) = torch.autograd.grad(x.relu().sum(), [x])
    assert torch.equal(grad, expected)


def test_a_second_derivative_is_refused() -> None:
    (x,) = images((1, 3, 4, 4), channels_last=True)
    x.requires_grad_()
    out = normalized_relu(x, norm_of(x, True))
    (grad,) = torch.autograd.grad(out.sum(), [x], create_graph=True)
    with pytest.raises(NotImplementedError, match="batch_norm_relu: expected first derivatives"):
        grad.sum().backward()


@pytest.mark.walks_memory
def test_what_does_not_fit_is_refused() -> None:
    ops, x = torch.ops.fastfuse, torch.randn(200, 4)
    with pytest.raises(RuntimeError, match=r"row_moments_into: moments must be \(2, 2, 4\)"):
        ops.row_moments_into(torch.empty(1, 2, 4), x)
    with pytest.raises(RuntimeError, match="combine_moments_into: moments must be those"):
        ops.combine_moments_into(torch.empty(2, 4), torch.empty(2, 2, 4), 300)
    moments = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=r"norm_relu_into: moments must be \(2, channels\)"):
        ops.norm_relu_into(x, x, torch.ones(2, 5), None, None, EPS, None, None, 1)
    with pytest.raises(RuntimeError, match="norm_relu_into: keep must have a value"):
        ops.norm_relu_into(x, x, moments, None, None, EPS, None, torch.ones(1), 100)
    with pytest.raises(RuntimeError, match="norm_backward_into: grad must be a matrix of 200"):
        ops.norm_backward_into(x, x[:9], x, moments, None, EPS, None, None, 1)
