"""fusion_conv2d as it runs on CUDA devices, on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_like import cuda_like
from inputs import alternating, every_dtype, images
from torch import Tensor

import fastfuse
from fastfuse.backends import DTYPES, accumulation_dtype
from fastfuse.ops.costs import CPU_COSTS
from fastfuse.ops.fusion_conv2d import kernel
from fastfuse.ops.fusion_conv2d.shape import Equalization, FusionShape
from fastfuse.tolerances import relative_error, tolerance

# With them levels of few channels have their own resolutions, too.
COSTS = dict.fromkeys(DTYPES, CPU_COSTS)

LEVELS = {
    "one of the size": [(24, 16, 16), (16, 8, 8), (40, 2, 2)],
    "two of the size": [(24, 16, 16), (8, 16, 16), (40, 4, 4)],
    "a larger one": [(24, 16, 16), (8, 20, 19), (40, 2, 1)],
    "none of the size": [(24, 8, 8), (8, 2, 2)],
    "one alone": [(24, 16, 16)],
}


NARROW_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out)


def fusion(levels: str, dtype: torch.dtype, k: int) -> dict[str, Any]:
    shapes = LEVELS[levels]
    channels = sum(shape[0] for shape in shapes)
    features = images(*[(2, *shape) for shape in shapes], dtype=dtype, channels_last=True)
    weight = torch.randn(16, channels, k, k) / (k * channels**0.5)
    return {
        "features": features,
        "weight": weight.to(dtype),
        "bias": torch.randn(16).to(accumulation_dtype(dtype)),
        "mean": torch.linspace(-0.5, 1, len(shapes)),
        "std": torch.linspace(0.5, 2, len(shapes)),
    }


def run(
    features: list[Tensor], weight: Tensor, bias: Tensor, mean: Tensor | None, std: Tensor | None
) -> list[Tensor]:
    """The output and all gradients, for an output's gradient that depends on its shape alone."""
    k = weight.shape[2]
    size, padding = (16, 16), k // 2
    out = kernel.forward(features, weight, bias, *size, mean, std, padding, False, True)
    grad = torch.linspace(-1, 1, out.numel()).sin().view(out.shape).to(out.dtype)
    shape = FusionShape.of(features, weight, *size, padding, False)
    wanted = [True] * len(features)
    gradients = kernel.backward(
        grad, features, weight, mean, std, *shape.arguments, wanted, True, False
    )
    return [out, *gradients]


@every_dtype
@pytest.mark.parametrize(("levels", "k"), alternating(list(LEVELS), [1, 3, 5]))
@pytest.mark.parametrize("equalized", [False, True])
def test_equals_the_definition(levels: str, k: int, equalized: bool, dtype: torch.dtype) -> None:
    arguments = fusion(levels, dtype, k)
    if not equalized:
        arguments["mean"] = arguments["std"] = None
    with cuda_like(fusion_costs=COSTS) as calls:
        found = run(**arguments)
    exact = {
        name: [v.double() for v in value] if isinstance(value, list) else
        None if value is None else value.double()
        for name, value in arguments.items()
    }  # fmt: skip
    expected = run(**exact)
    for mine, one in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        limit = tolerance(dtype, reduction=mine.numel() / mine.shape[1], roundings=2)
        assert relative_error(mine, one) <= limit
    assert not calls.named("convolution")
    if dtype.itemsize == 2:  # sums over pixels, of transposed matrices, are wide
        narrow = [args[0] for func, args, _ in calls.found if func in NARROW_PRODUCTS]
        assert all(a.stride(1) == 1 for a in narrow)
        assert len(calls.named("mm")) > len(narrow)


def test_the_inverse_of_a_deviation_is_rounded_once() -> None:
    std = torch.rand(1_000_000).exp() * torch.logspace(-30, 30, 1_000_000)
    found = Equalization.of(None, std, torch.float32).inverse_std
    assert found is not None
    assert torch.equal(found, std.double().reciprocal().float())
    assert Equalization.of(None, std, torch.float64).inverse_std.dtype == torch.float64


# Launches of forward and of backward: those that PyTorch's ops are, and one for each of ours.
@pytest.mark.parametrize(
    ("equalized", "dtype", "launches"),
    [
        (False, torch.float32, (9, 31)),
        (False, torch.bfloat16, (10, 31)),
        (True, torch.float32, (14, 38)),
        (True, torch.bfloat16, (15, 38)),
    ],
    ids=str,
)
def test_launches(equalized: bool, dtype: torch.dtype, launches: tuple[int, int]) -> None:
    """Of a fusion of four levels, of which the smallest is small."""
    shapes = [(16, 32, 32), (24, 16, 16), (16, 8, 8), (32, 4, 4)]
    features = images(*[(1, *shape) for shape in shapes], dtype=dtype, channels_last=True)
    weight, bias = torch.randn(16, 88, 3, 3).to(dtype), torch.randn(16).to(dtype)
    constants = (torch.zeros(4), torch.ones(4)) if equalized else (None, None)
    with cuda_like(fusion_costs=COSTS) as forward:
        out = kernel.forward(features, weight, bias, 32, 32, *constants, 1, False, True)
    shape, grad = FusionShape.of(features, weight, 32, 32, 1, False), torch.ones_like(out)
    with cuda_like(fusion_costs=COSTS) as backward:
        kernel.backward(
            grad, features, weight, *constants, *shape.arguments, [True] * 4, True, False
        )
    found = forward.launches(), backward.launches()
    assert (len(found[0]), len(found[1])) == launches, found


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [
        ([0, 0], [16, 8]),  # of no strategy
        ([8, 8], [8, 4]),  # none of the target's size
        ([8, 0, 8], [16, 8, 4]),  # not in a row
        ([8, 8, 8], [8, 16, 4]),
    ],
    ids=str,
)
def test_factors_of_any_order(channels: list[int], sizes: list[int]) -> None:
    """1 / std of each level, whichever are its neighbours; on CPUs too."""
    shapes = zip(channels, sizes, strict=True)
    features = images(*[(1, c, n, n) for c, n in shapes], dtype=torch.float64, channels_last=True)
    weight, bias = torch.randn(4, sum(channels), 3, 3).double(), torch.randn(4).double()
    std = torch.linspace(0.5, 2, len(channels)).double()
    fused = fastfuse.upsample_equalize_concat(features, size=(16, 16), std=std)
    expected = bias[:, None, None].expand(1, 4, 16, 16)
    if fused.numel():
        expected = torch.conv2d(fused, weight, bias, padding=1)
    arguments = (features, weight, bias, 16, 16, None, std, 1, False, True)
    with cuda_like(fusion_costs=COSTS):
        found = kernel.forward(*arguments)
    for output in (found, kernel.forward(*arguments)):
        torch.testing.assert_close(output, expected)


def test_small_levels_have_float32_taps() -> None:
    """One product each; a second sum of what rounding takes there is none."""
    levels = LEVELS["one of the size"]
    arguments = fusion("one of the size", torch.bfloat16, 3)
    with cuda_like(fusion_costs=COSTS) as calls:
        run(**arguments)
    ((sums, _),) = calls.named("tap_sum_into")
    assert [taps.shape[2:] for taps in sums[1]] == [level[1:] for level in levels[1:]]
    assert [taps.dtype for taps in sums[1]] == [torch.bfloat16, torch.float32]
    assert "sub" not in calls.launches()
