"""fusion_conv2d's derivatives, and fusion_conv2d in PyTorch's machinery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from inputs import images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, fusion_conv2d
from fastfuse.ops.policy import policy_of, use_policy

SHAPES = ((2, 3, 6, 8), (2, 40, 3, 4), (2, 2, 5, 7), (2, 50, 1, 2))
SIZE, LEVELS = (6, 8), range(4)


@pytest.fixture(autouse=True)
def by_the_plan() -> Iterator[None]:
    """However little there is to do."""
    with use_policy(policy_of("cpu"), little_macs=0):
        yield


def inputs(dtype: torch.dtype = torch.float32, k: int = 3, channels_last: bool = False) -> Any:
    """Levels of every plan, a weight and a bias."""
    channels = sum(s[1] for s in SHAPES)
    weight = torch.randn(4, channels, k, k, dtype=torch.float64) / (k * channels**0.5)
    features = images(*SHAPES, dtype=dtype, channels_last=channels_last)
    return [*features, weight.to(dtype), torch.randn(4).to(dtype)]


def call(tensors: Sequence[Tensor], **options: Any) -> Tensor:
    *features, weight, bias = tensors
    return fusion_conv2d(features, weight, bias, **options)


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("k", "padding"), [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3), (5, 2)])
def test_gradgradcheck_of_every_plan(k: int, padding: int, align_corners: bool, bias: bool) -> None:
    leaves = [x.requires_grad_() for x in inputs(torch.float64, k)]

    def function(*tensors: Tensor) -> Tensor:
        return call(
            tensors if bias else [*tensors, None], padding=padding, mean=[0.5, -1.0, 2.0, 3.0],
            std=[0.5, 2.0, 1.5, 3.0], align_corners=align_corners,
        )  # fmt: skip

    leaves = leaves if bias else leaves[:-1]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


WANTED = {
    "all but the first level": (1, 2, 3, 4, 5),
    "all but an own level": (0, 2, 3, 4, 5),
    "all but a resized level": (0, 1, 3, 4, 5),
    "all but the weight": (0, 1, 2, 3, 5),
    "all but the bias": (0, 1, 2, 3, 4),
    "the first level": (0,),
    "an own level": (3,),
    "a resized level": (2,),
    "two levels": (0, 3),
    "levels": (0, 1, 2, 3),
    "weight": (4,),
    "bias": (5,),
    "nothing": (),
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_frozen_inputs(wanted: tuple[int, ...]) -> None:
    """First and second derivatives with some inputs frozen equal the reference's."""

    def derivatives(which: Sequence[int]) -> list[list[Tensor]]:
        torch.manual_seed(1)
        tensors = inputs(torch.float64)
        leaves = [tensors[i].requires_grad_() for i in which]
        output = call(tensors, mean=[0.5, 1.0, -2.0, 3.0], std=[0.5, 2.0, 3.0, 1.5])
        assert output.requires_grad == bool(leaves)
        if not leaves:
            return [[], []]
        first = torch.autograd.grad((output**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [list(first), list(second)]

    some = derivatives(wanted)
    everything = derivatives(range(6))[0]
    for mine, i in zip(some[0], wanted, strict=True):
        torch.testing.assert_close(mine, everything[i], rtol=1e-11, atol=1e-11)
    with backend("reference"):
        expected = derivatives(wanted)
    for order, expected_order in zip(some, expected, strict=True):
        for mine, theirs in zip(order, expected_order, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (range(6), (0, 1, 2, 3, 4)),
        (LEVELS, (4,)),
        ((2,), (4,)),
        ((4,), LEVELS),
        ((4, 5), LEVELS),
        ((5,), ()),
        ((), ()),
    ],
    ids=["all", "weight frozen", "one level", "levels frozen", "weight and bias", "bias", "none"],
)
def test_what_is_kept_for_backward(wanted: Sequence[int], kept: Sequence[int]) -> None:
    """Features for the weight's gradient, the weight for theirs: no copies, and nothing else."""
    tensors = inputs(channels_last=True)
    for i in wanted:
        tensors[i].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(tensors)
    pointers = sorted(t.data_ptr() for t in saved)
    assert pointers == sorted(tensors[i].data_ptr() for i in kept)


# ---- machinery ----------------------------------------------------------------------------------


def test_compile_with_floats_and_a_backend_inside() -> None:
    constants = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [1.0, 2.0, 3.0, 4.0]}

    @torch.compile(fullgraph=True)
    def step(tensors: list[Tensor]) -> Tensor:
        with backend("cpu"):
            return call(tensors, **constants)

    tensors = inputs()
    torch.testing.assert_close(step(tensors), call(tensors, **constants))


def test_autocast_casts_features_and_weight(any_backend: str) -> None:
    """bfloat16 in and out; bias, mean and std keep their digits; gradients are float32."""
    leaves = [x.requires_grad_() for x in inputs()]
    mean = torch.tensor([1.00390625, 0.0, 0.0, 0.0])  # 1 + 2^-8: 1 in bfloat16
    std = torch.tensor([1.00390625, 1.0, 1.0, 1.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(leaves, mean=mean, std=std)
        narrow = [x.bfloat16() for x in leaves[1:-1]]
        mixed = call([leaves[0], *narrow, leaves[-1]], mean=mean, std=std)
        wide = call([x.double() for x in leaves])
    assert output.dtype == mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    with torch.no_grad():
        narrow = [x.bfloat16() for x in leaves[:-1]]
        expected = call([*narrow, leaves[-1]], mean=mean, std=std)
    assert torch.equal(output, expected)
    assert torch.equal(mixed, expected)
    for gradient in torch.autograd.grad(output.float().sum(), leaves):
        assert gradient.dtype == torch.float32


def test_autocast_leaves_the_mean_alone() -> None:
    """A feature of the mean's value, a bfloat16 number or not, is nothing."""
    mean = torch.tensor([256.0, 0.5 + 2**-12])
    features = [torch.full((1, 4, 8, 8), 256.0), torch.full((1, 64, 4, 4), 0.5)]
    weight = torch.ones(1, 68, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16), backend("cpu"):
        output = fusion_conv2d(features, weight, mean=mean)
    assert torch.equal(output, torch.full((1, 1, 8, 8), -64 * 2**-12).bfloat16())


def test_flop_formula() -> None:
    features = images((2, 4, 8, 8), (2, 32, 4, 4), dtype=torch.float64)
    weight = torch.randn(5, 36, 3, 3, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        fusion_conv2d(features, weight)
    at_target, at_own = 2 * 9 * 4 * 5 * 64, 2 * 9 * 32 * 5 * 16
    # y: 9 taps, 8 rows of 4 values; x: 3 taps, 8 rows of 8; a multiply-add per weight, 2 weights
    summed = 2 * 2 * 5 * (9 * 8 * 4 + 3 * 8 * 8)
    forward = 2 * (at_target + at_own + summed)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        fusion_conv2d(features, weight.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 2 * forward
    leaves = [f.requires_grad_() for f in features]
    with FlopCounterMode(display=False) as counter:
        fusion_conv2d(leaves, weight).sum().backward()
    assert counter.get_total_flops() >= 3 * forward


def test_far_fewer_flops_than_the_reference() -> None:
    """UPerNet's fusion, without computing it."""

    def flops(name: str) -> int:
        with backend(name), FakeTensorMode(), FlopCounterMode(display=False) as counter:
            features = [torch.empty(1, 512, 128 >> i, 128 >> i) for i in range(4)]
            fusion_conv2d(features, torch.empty(512, 2048, 3, 3))
        return counter.get_total_flops()

    assert flops("reference") == 2 * 9 * 2048 * 512 * 128 * 128
    assert flops("cpu") < 0.4 * flops("reference")


def test_small_levels_are_exact_under_autocast() -> None:
    levels = [x.bfloat16() for x in images((1, 64, 32, 32), (1, 64, 4, 4), channels_last=True)]
    weight = (torch.randn(64, 128, 3, 3) / 34).bfloat16()
    expected = fusion_conv2d(levels, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fusion_conv2d(levels, weight)
    assert torch.equal(found, expected)


def test_std_does_not_bias_narrow_gradients() -> None:
    """1 / std is not rounded to the features' dtype, which would move every value one way."""
    (x,) = images((1, 64, 32, 32), channels_last=True)
    weight = (torch.randn(64, 64, 3, 3) / 24).bfloat16().requires_grad_()
    output = fusion_conv2d([x.bfloat16()], weight, std=[1.5045])
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, weight, gradient)
    wide = weight.detach().double().requires_grad_()
    output = fusion_conv2d([x.bfloat16().double()], wide, std=[1.5045])
    (expected,) = torch.autograd.grad(output, wide, gradient.double())
    assert ((found.double() - expected) / expected).median().abs() < 3e-4
