"""The Winograd transforms and the convolutions made of them, against PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import images

from fastfuse import _extension, backend
from fastfuse.backends import DTYPES, accumulation_dtype
from fastfuse.ops.fusion_conv2d import winograd
from fastfuse.ops.fusion_conv2d.samples import samples
from fastfuse.ops.policy import policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.skipif(_extension.module is None, reason="needs the compiled module")

# N, channels of every input, C_out, height, width, padding
CASES = {
    "even": (2, [16], 16, 8, 12, 1),
    "odd": (1, [5], 7, 9, 7, 1),
    "no padding": (2, [33], 3, 6, 5, 0),
    "wide padding": (1, [4], 20, 5, 4, 2),
    "two inputs": (2, [17, 6], 9, 7, 8, 1),
    "one pixel": (3, [2], 2, 1, 1, 1),
    # More than a block of tiles, a panel's inputs and a group of outputs, each with a rest.
    "large": (2, [130, 7], 53, 42, 37, 1),
}


@pytest.fixture
def small_blocks(isa: str) -> Iterator[None]:
    """As many blocks as can be, the last one smaller."""
    with use_policy(policy_of("cpu"), winograd_bytes=1):
        yield


@pytest.mark.walks_memory
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolution_and_gradients(small_blocks: None, case: str, dtype: torch.dtype) -> None:
    batch, channels, outputs, height, width, padding = CASES[case]
    shapes = [(batch, c, height, width) for c in channels]
    inputs = images(*shapes, dtype=dtype, channels_last=True)
    weight, bias = (
        torch.randn(outputs, sum(channels), 3, 3).to(dtype),
        torch.randn(outputs).to(dtype),
    )
    x = torch.cat(inputs, dim=1).double().requires_grad_()
    w = weight.double().clone().requires_grad_()
    expected = F.conv2d(x, w, bias.double(), padding=padding)
    (gradient,) = images(tuple(expected.shape), dtype=dtype, channels_last=True)
    x_gradient, w_gradient = torch.autograd.grad(expected, [x, w], gradient.double())

    taps = weight.permute(2, 3, 0, 1).reshape(9, outputs, -1)
    out = torch.full_like(gradient, torch.nan)
    winograd.convolve(out, inputs, taps, bias, padding)
    limit = tolerance(dtype, reduction=9 * sum(channels))
    assert out.dtype == dtype
    assert relative_error(out, expected.detach()) <= limit

    out = torch.full_like(torch.cat(inputs, dim=1), torch.nan)
    winograd.input_gradient(out, gradient, taps, padding)
    assert relative_error(out, x_gradient) <= tolerance(dtype, reduction=9 * outputs)

    result = torch.full(taps.shape, torch.nan, dtype=accumulation_dtype(dtype))
    winograd.weight_gradient(result, gradient, inputs, padding)
    expected = w_gradient.permute(2, 3, 0, 1).reshape(9, outputs, -1)
    limit = tolerance(dtype, reduction=batch * height * width)
    assert relative_error(result, expected) <= limit


@pytest.mark.walks_memory
@pytest.mark.parametrize("flipped", [False, True])
def test_taps_may_lie_anyhow(isa: str, flipped: bool) -> None:
    """What is read side by side where it lies so, and value by value elsewhere."""
    (x,) = images((1, 33, 9, 10), channels_last=True)
    (gradient,) = images((1, 40, 9, 10), channels_last=True)
    weight = torch.randn(40, 33, 3, 3)
    layouts = {
        "contiguous": weight.permute(2, 3, 0, 1).flatten(0, 1),
        "channels_last": weight.to(memory_format=torch.channels_last)
        .permute(2, 3, 0, 1)
        .flatten(0, 1),
        "outputs last": weight.permute(2, 3, 1, 0).contiguous().permute(0, 1, 3, 2).flatten(0, 1),
        "a slice": torch.randn(9, 80, 99)[:, ::2, ::3],
    }
    found = []
    for taps in layouts.values():
        taps.copy_(weight.permute(2, 3, 0, 1).flatten(0, 1))
        out, of_taps = torch.full_like(gradient, torch.nan), torch.full_like(taps, torch.nan)
        winograd.convolve(out, [x], taps, None, 1, flipped=flipped)
        back = torch.full_like(x, torch.nan)
        winograd.input_gradient(back, gradient, taps, 1)
        winograd.weight_gradient(of_taps, gradient, [x], 1)
        found.append((out, back, of_taps))
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))
        assert all(result.isfinite().all() for result in results)


@pytest.mark.walks_memory
def test_the_same_bits_for_any_number_of_threads(isa: str) -> None:
    (x,) = images((2, 40, 31, 29), channels_last=True)
    (gradient,) = images((2, 40, 31, 29), channels_last=True)
    taps = torch.randn(9, 40, 40)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tiles = torch.full((36, 2 * 8 * 8, 40), torch.nan)
        torch.ops.fastfuse.winograd_input(tiles, x, 0, 31, 29, 1)
        out = torch.full_like(x, torch.nan)
        torch.ops.fastfuse.winograd_product(out, tiles, taps, False, 0, None)
        adjoint = torch.full_like(tiles, torch.nan)
        torch.ops.fastfuse.winograd_output_adjoint(adjoint, gradient, 0)
        of_taps = torch.full_like(taps, torch.nan)
        torch.ops.fastfuse.winograd_gradient(of_taps, tiles, adjoint, False)
        assert out.isfinite().all()
        assert of_taps.isfinite().all()
        found.append((tiles, out, adjoint, of_taps))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dtype", torch.int32), ("kernel_size", 5), ("padding", 3), ("channels", 16),
     ("pixels", 10), ("device", "cuda")],
)  # fmt: skip
def test_the_rule(argument: str, value: object) -> None:
    usual = {
        "device": "cpu", "dtype": torch.float32, "channels": 512, "out_channels": 512,
        "pixels": 128 * 128, "kernel_size": 3, "padding": 1,
    }  # fmt: skip
    assert winograd.applies(**usual)
    assert not winograd.applies(**{**usual, argument: value})


@pytest.mark.walks_memory
def test_what_does_not_fit_is_refused() -> None:
    (x,) = images((1, 4, 6, 6), channels_last=True)
    op = torch.ops.fastfuse.winograd_input
    with pytest.raises(RuntimeError, match="winograd: tiles must be"):
        op(torch.empty(36, 4, 5), x, 0, 6, 6, 1)
    with pytest.raises(RuntimeError, match="winograd: first and tiles must lie in the image"):
        op(torch.empty(36, 4, 4), x, 1, 6, 6, 1)
    with pytest.raises(RuntimeError, match="winograd: tiles must be"):
        op(torch.empty(36, 4, 4), x.double(), 0, 6, 6, 1)
    with pytest.raises(RuntimeError, match="winograd: image must be channels_last"):
        op(torch.empty(36, 4, 4), x.contiguous(), 0, 6, 6, 1)
    op = torch.ops.fastfuse.winograd_product
    with pytest.raises(RuntimeError, match=r"winograd: taps must be \(9, 4, 5\)"):
        op(x, torch.empty(36, 4, 5), torch.empty(9, 5, 5), False, 0, None)
    with pytest.raises(RuntimeError, match="winograd: bias must have one value per channel"):
        op(x, torch.empty(36, 4, 5), torch.empty(9, 4, 5), False, 0, torch.empty(5))
    op = torch.ops.fastfuse.winograd_gradient
    with pytest.raises(RuntimeError, match="winograd: tiles and gradients must be as many"):
        op(torch.empty(9, 4, 5), torch.empty(36, 4, 5), torch.empty(36, 3, 4), False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_takes_it(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every op owes is asserted of samples, and of this one it must be asserted of Winograd's
    algorithm, forward and backward, wherever products of the dtype are not the library's own."""
    if dtype in policy_of("cpu").native - {torch.float64, torch.float32}:
        pytest.skip(f"from more channels on for {dtype}, which this processor multiplies itself")
    called = set()

    def noted(name: str) -> None:
        call = getattr(winograd, name)

        def note(*args: Any, **options: Any) -> Any:
            called.add(name)
            return call(*args, **options)

        monkeypatch.setattr(winograd, name, note)

    for name in ("convolve", "input_gradient", "weight_gradient"):
        noted(name)
    (sample, _) = (
        s
        for s in samples(device="cpu", dtype=dtype, channels_last=True)
        if s.name.startswith("by Winograd")
    )
    with backend("cpu"):
        sample.call(*(x.detach().requires_grad_() for x in sample.inputs)).sum().backward()
    assert called == {"convolve", "input_gradient", "weight_gradient"}
