"""fusion_conv2d: values, inputs, derivatives, determinism, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import both_layouts, every_dtype, images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, fusion_conv2d, upsample_equalize_concat
from fastfuse.ops.fusion_conv2d.samples import exact
from fastfuse.ops.policy import WinogradRule, policy_of, use_policy
from fastfuse.tolerances import relative_error, tolerance


@pytest.fixture(autouse=True)
def by_the_plan() -> Iterator[None]:
    """However little there is to do."""
    with use_policy(policy_of("cpu"), little_macs=0):
        yield


# ---- values -------------------------------------------------------------------------------------


def test_reference_is_what_a_user_would_write() -> None:
    p2, p3 = images((2, 4, 8, 8), (2, 60, 4, 4), dtype=torch.float64)
    weight, bias = torch.randn(5, 64, 3, 3).double(), torch.randn(5).double()
    up = F.interpolate(p3, size=(8, 8), mode="bilinear", align_corners=False)
    fused = torch.cat([(p2 - 0.5) / 2.0, (up - 0.25) / 4.0], dim=1)
    expected = F.conv2d(fused, weight, bias, padding=1)
    for name in ("reference", "cpu"):
        with backend(name):
            result = fusion_conv2d([p2, p3], weight, bias, mean=[0.5, 0.25], std=[2.0, 4.0])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.walks_memory
@settings(max_examples=100, deadline=None)
@given(
    levels=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20)),
        min_size=1,
        max_size=5,
    ),
    size=st.none() | st.tuples(st.integers(1, 20), st.integers(1, 20)),
    outputs=st.integers(1, 9),
    batch=st.integers(0, 3),
    k=st.sampled_from([1, 3, 5]),
    padding=st.sampled_from([None, 0, 1, 3]),
    constants=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
)
def test_any_levels(
    levels: list[tuple[int, int, int]],
    size: tuple[int, int] | None,
    outputs: int,
    batch: int,
    k: int,
    padding: int | None,
    constants: tuple[bool, bool, bool],
    align_corners: bool,
    channels_last: bool,
) -> None:
    """Values and gradients are those of the composition, borders included."""
    target = size or (max(s[1] for s in levels), max(s[2] for s in levels))
    if padding is not None and min(target) + 2 * padding < k:
        padding = 3
    features = images(
        *((batch, *s) for s in levels), dtype=torch.float64, channels_last=channels_last
    )
    weight = torch.randn(outputs, sum(s[0] for s in levels), k, k, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64) if constants[2] else None
    leaves = [x.requires_grad_() for x in [*features, weight, *([] if bias is None else [bias])]]
    how = {
        "size": size,
        "mean": (10 * torch.randn(len(levels))).tolist() if constants[0] else None,
        "std": (torch.rand(len(levels)) + 0.5).tolist() if constants[1] else None,
        "align_corners": align_corners,
    }
    with backend("cpu"):
        output = fusion_conv2d(features, weight, bias, padding=padding, **how)
    with backend("reference"):
        fused = upsample_equalize_concat(features, **how)
    expected = F.conv2d(fused, weight, bias, padding=k // 2 if padding is None else padding)
    assert relative_error(output.detach(), expected.detach()) <= 1e-11
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    expected_gradients = torch.autograd.grad(expected, leaves, cotangent)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, other) <= 1e-11


def test_little_work_runs_as_defined() -> None:
    """Multiply-adds at the target's resolution decide, and nothing differs but speed."""
    p2, p3 = images((2, 4, 8, 8), (2, 60, 4, 4))
    weight = torch.randn(5, 64, 3, 3)
    with backend("reference"):
        expected = fusion_conv2d([p2, p3], weight, mean=[1.0, 2.0])
    work = 2 * 8 * 8 * 5 * 64 * 9
    for threshold, fused in ((work, True), (work + 1, False)):
        little = use_policy(policy_of("cpu"), little_macs=threshold)
        with little, FlopCounterMode(display=False) as counter:
            result = fusion_conv2d([p2, p3], weight, mean=[1.0, 2.0])
        ops = {str(op) for op in counter.get_flop_counts()["Global"]}
        assert ("fastfuse.fusion_conv2d" in ops) == fused
        assert fused or torch.equal(result, expected)
        assert relative_error(result, expected) <= tolerance(torch.float32, reduction=576)


# Levels (C, H, W) convolved at their own resolution, at the target's, or some of both.
PLANS = {
    "own": [(64, 4, 4), (64, 2, 3)],
    "target": [(8, 16, 20)],
    "resized to the target": [(8, 16, 20), (8, 15, 19), (4, 22, 30)],
    "both": [(8, 16, 20), (64, 4, 5), (32, 1, 1)],
    "both, resized too": [(8, 16, 20), (9, 15, 19), (64, 4, 5)],
}
every_plan = pytest.mark.parametrize("levels", PLANS.values(), ids=PLANS)


@every_plan
@pytest.mark.parametrize("std", [False, True], ids=["mean only", "mean and std"])
@pytest.mark.parametrize(("k", "padding"), [(1, 0), (1, 1), (3, 0), (3, 1), (3, 4), (5, 2)])
def test_what_equals_the_mean_is_nothing(
    any_backend: str, levels: list[tuple[int, int, int]], k: int, padding: int, std: bool
) -> None:
    """Features of the value of a large mean leave the bias, at borders and in corners too."""
    mean = [1000.0 * (-1) ** i * (i + 1) for i in range(len(levels))]
    features = [torch.full((2, *s), m).double() for s, m in zip(levels, mean, strict=True)]
    weight = torch.randn(7, sum(s[0] for s in levels), k, k, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    result = fusion_conv2d(
        features, weight, bias, size=(16, 20), mean=mean, padding=padding,
        std=[0.5 + i for i in range(len(levels))] if std else None,
    )  # fmt: skip
    torch.testing.assert_close(result, bias[:, None, None].expand_as(result), rtol=0, atol=1e-8)


OFF_MEAN = {
    "own": [(64, 4, 4), (64, 2, 2)],
    "target": [(16, 16, 16)],
    "several of the target's size": [(8, 16, 16), (8, 16, 16)],
    "resized to the target": [(8, 16, 16), (4, 32, 32)],
    "both": [(8, 16, 16), (64, 4, 4), (32, 1, 1)],
    "one channel": [(1, 16, 16)],
}


@pytest.mark.parametrize("levels", OFF_MEAN.values(), ids=OFF_MEAN)
@pytest.mark.parametrize("winograd", [False, True], ids=["direct", "winograd"])
@pytest.mark.parametrize(
    ("dtype", "products"),
    [
        (torch.float32, torch.float32),
        *((d, p) for d in (torch.bfloat16, torch.float16) for p in (torch.float32, d)),
    ],
)
def test_a_mean_costs_no_digits(
    dtype: torch.dtype,
    products: torch.dtype,
    winograd: bool,
    levels: list[tuple[int, int, int]],
) -> None:
    """Features with a mean give the bits of what they are off it, in derivatives of both orders:
    the mean comes off before anything is rounded. All values are short binary fractions."""
    torch.set_num_threads(1)  # waking others would take most of the time
    off = [torch.randint(-2, 3, (2, *shape)) / 2 for shape in levels]
    std = [0.75 + i for i in range(len(levels))]

    def results(mean: list[float] | None, tensors: Sequence[Tensor], padding: int) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        *features, weight, bias = leaves
        output = fusion_conv2d(
            features, weight, bias, size=(16, 16), mean=mean, std=std, padding=padding
        )
        torch.manual_seed(1)
        cotangent = (torch.randn(output.shape) + 0.5).to(dtype).requires_grad_()
        first = torch.autograd.grad(output, leaves, cotangent, create_graph=True)
        loss = sum(x.float().square().mean() for x in first)
        return [output, *first, *torch.autograd.grad(loss, [cotangent, *features, weight])]

    rule = WinogradRule(channels=1 if winograd else 1 << 20, pixels=0, work=0)
    native = frozenset({torch.float32, products})
    with use_policy(policy_of("cpu"), little_macs=0, native=native, winograd={dtype: rule}):
        for k, padding in ((3, 0), (3, 2)) if winograd else ((1, 0), (1, 1), (3, 4)):
            parameters = torch.randn(5, sum(s[0] for s in levels), k, k) / 24, torch.randn(5)
            expected = results(None, [*off, *parameters], padding)
            for size in (0.5, 2.0, 7.0, 70.0):  # 0.7 to 100 deviations
                mean = [size * (-1) ** i for i in range(len(levels))]
                features = [x + m for x, m in zip(off, mean, strict=True)]
                found = results(mean, [*features, *parameters], padding)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_plan
def test_borders(levels: list[tuple[int, int, int]]) -> None:
    """The outermost pixels alone, with means that would drown everything if they were wrong."""
    features = images(*((2, *s) for s in levels), dtype=torch.float64)
    weight = torch.randn(5, sum(s[0] for s in levels), 3, 3, dtype=torch.float64)
    how = {"size": (16, 20), "mean": [100.0] * len(levels), "std": [0.25] * len(levels)}
    with backend("cpu"):
        result = fusion_conv2d(features, weight, **how)
    expected = F.conv2d(upsample_equalize_concat(features, **how), weight, padding=1)
    for border in (
        (..., 0), (..., -1), (..., 0, slice(None)), (..., -1, slice(None)), (..., 0, 0),
        (..., 0, -1), (..., -1, 0), (..., -1, -1),
    ):  # fmt: skip
        torch.testing.assert_close(result[border], expected[border], rtol=1e-11, atol=1e-9)


@pytest.mark.walks_memory
@every_dtype
@pytest.mark.parametrize("levels", [PLANS["own"], PLANS["both"]], ids=["own", "both"])
def test_chunks_of_outputs(levels: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """Outputs in chunks, the last one smaller, are those of one chunk; gradients too."""
    inputs = images(*((2, *s) for s in levels), dtype=torch.float64, channels_last=True)
    channels = sum(s[0] for s in levels)
    inputs = [*inputs, torch.randn(150, channels, 3, 3) / channels**0.5, torch.randn(150)]
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    how = {"mean": [0.5] * len(levels), "std": [1.5] * len(levels)}
    with use_policy(policy_of("cpu"), taps_bytes=1):
        output = fusion_conv2d(leaves[:-2], *leaves[-2:], size=(16, 20), **how)
    expected = exact(tuple(doubles[:-2]), *doubles[-2:], (16, 20), *how.values(), 1, False, dtype)
    limit = tolerance(dtype, reduction=9 * channels**0.5, roundings=2)
    assert relative_error(output.detach(), expected.detach()) <= limit
    cotangent = torch.randn_like(output)
    with use_policy(policy_of("cpu"), taps_bytes=1):
        gradients = torch.autograd.grad(output, leaves, cotangent)
    exact_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        limit = tolerance(dtype, reduction=2 * 16 * 20, roundings=2)
        assert relative_error(gradient, exact_gradient) <= limit


@both_layouts
@pytest.mark.parametrize(("k", "mean"), [(1, 0.0), (3, 0.0), (3, 0.7)])
def test_bfloat16_is_as_close_as_eager(channels_last: bool, k: int, mean: float) -> None:
    """Root mean square errors of output and gradients, against float64."""
    shapes = [(2, 128, 32 >> i, 32 >> i) for i in range(4)]
    features = [(x + mean).bfloat16() for x in images(*shapes, channels_last=channels_last)]
    weight = (torch.randn(96, 512, k, k) / (512 * k * k) ** 0.5).bfloat16()
    leaves = [x.requires_grad_() for x in (*features, weight)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    cotangent = torch.randn(2, 96, 32, 32).bfloat16()

    def composed(inputs: Sequence[Tensor]) -> Tensor:
        resized = [
            F.interpolate(x, size=(32, 32), mode="bilinear") if x.shape[2] < 32 else x
            for x in inputs[:-1]
        ]
        return F.conv2d(torch.cat(resized, dim=1) - mean, inputs[-1], padding=k // 2)

    def results(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))]

    truth = results(composed(doubles), doubles)
    eager = results(composed(leaves), leaves)
    ours = results(fusion_conv2d(features, weight, mean=[mean] * 4), leaves)
    for mine, theirs, true in zip(ours, eager, truth, strict=True):
        errors = [(x.double() - true).square().mean().sqrt().item() for x in (mine, theirs)]
        assert errors[0] <= 1.1 * errors[1]


# ---- inputs -------------------------------------------------------------------------------------


def pyramid(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> list[Tensor]:
    """Levels (2, C, H, W), a weight (6, sum C, 3, 3) and a bias; levels of both plans."""
    shapes = ((2, 20, 12, 16), (2, 37, 6, 8), (2, 8, 11, 15), (2, 45, 3, 4))
    features = images(*shapes, dtype=dtype, channels_last=channels_last)
    return [*features, (torch.randn(6, 110, 3, 3) / 30).to(dtype), torch.randn(6).to(dtype)]


@pytest.mark.walks_memory
@both_layouts
@every_dtype
def test_any_strides(dtype: torch.dtype, channels_last: bool) -> None:
    """Sliced, permuted, expanded and mixed inputs equal their dense copies."""
    a, b = images((4, 40, 24, 32), (2, 64, 20, 12), dtype=dtype, channels_last=channels_last)
    (w,) = images((20, 200, 3, 3), dtype=dtype, channels_last=channels_last)
    w = w / 20
    bias = torch.randn(18).to(dtype)
    variants = {
        "sliced": [a[::2, 3:23, 4:16, ::2], b[:, ::2, 2:8, 1:9]],
        "transposed": [a[:2].transpose(2, 3), b.transpose(2, 3)],
        "permuted": [a[:2], b.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)],
        "expanded": [a[:2, :1].expand(-1, 7, -1, -1), b[:, :, :1, :1].expand(-1, -1, 5, 6)],
        "expanded batch": [a[:1].expand(2, -1, -1, -1), b],
        "mixed layouts": [a[:2].contiguous(), b.contiguous(memory_format=torch.channels_last)],
    }
    for name, features in variants.items():
        channels = sum(f.shape[1] for f in features)
        for weight in (w[::2, 1 : 1 + channels], w[:9, -channels:].transpose(2, 3)):
            offset = bias[:: 18 // weight.shape[0]][: weight.shape[0]]
            dense = [f.contiguous() for f in features]
            with backend("cpu"):
                result = fusion_conv2d(features, weight, offset, std=[0.5, 2.0])
                expected = fusion_conv2d(dense, weight.contiguous(), offset.clone(), std=[0.5, 2.0])
            assert relative_error(result, expected) <= 2 * tolerance(dtype), name


@pytest.mark.walks_memory
@both_layouts
def test_gradients_of_any_strides(channels_last: bool) -> None:
    """grad_output may be expanded, sliced or in the other layout."""
    leaves = [x.requires_grad_() for x in pyramid(channels_last=channels_last)]
    output = fusion_conv2d(leaves[:-2], *leaves[-2:])
    dense, larger = torch.randn(2, 6, 12, 16), torch.randn(2, 9, 12, 32)
    for cotangent in (
        torch.ones(()).expand_as(output),
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        larger[:, 3:, :, ::2],
        larger.contiguous(memory_format=torch.channels_last)[:, 3:, :, 16:],
    ):
        gradients = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        plain = cotangent.clone(memory_format=torch.contiguous_format)
        expected = torch.autograd.grad(output, leaves, plain, retain_graph=True)
        for gradient, other in zip(gradients, expected, strict=True):
            assert relative_error(gradient, other) <= tolerance(torch.float32, reduction=16)


def test_memory_format_is_the_first_telling_inputs(any_backend: str) -> None:
    first, second = images((2, 64, 8, 8), (2, 64, 4, 4))
    last = first.contiguous(memory_format=torch.channels_last)
    one_pixel = torch.randn(2, 64, 1, 1)
    (weight,) = images((8, 128, 3, 3))
    for w in (weight, weight.contiguous(memory_format=torch.channels_last)):
        for features, channels_last in (
            ([first, second], False),
            ([last, second], True),
            ([second, last], False),
            ([one_pixel, last], True),
            ([one_pixel, first], False),
            ([last[:, :, 1:5, 2:6], second], True),
        ):
            output = fusion_conv2d(features, w, size=(8, 8))
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            assert output.is_contiguous(memory_format=memory_format)


@both_layouts
def test_output_is_new_memory(any_backend: str, channels_last: bool) -> None:
    (x,) = images((2, 7, 5, 9), channels_last=channels_last)
    before = x.clone()
    result = fusion_conv2d([x], torch.eye(7)[:, :, None, None])
    assert torch.equal(result, x)
    result.zero_()
    assert torch.equal(x, before)


@pytest.mark.walks_memory
@every_plan
@both_layouts
@pytest.mark.parametrize(("k", "padding"), [(1, 0), (3, 1), (3, 4)])
def test_every_value_is_written(
    levels: list[tuple[int, int, int]], channels_last: bool, k: int, padding: int
) -> None:
    """With new memory filled with NaN, none is left in output or gradients."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        features = images(*((2, *s) for s in levels), channels_last=channels_last)
        weight = torch.randn(7, sum(s[0] for s in levels), k, k)
        for frozen in ((), (0,), tuple(range(len(levels))), (len(levels),)):
            inputs = [*features, weight, torch.randn(7)]
            inputs = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
            output = fusion_conv2d(
                inputs[:-2], *inputs[-2:], size=(16, 20), padding=padding,
                mean=[1.0] * len(levels),
            )  # fmt: skip
            assert not output.isnan().any()
            leaves = [x for x in inputs if x.requires_grad]
            for gradient in torch.autograd.grad(output.sum(), leaves):
                assert not gradient.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("shapes", "outputs"),
    [
        ([(0, 64, 4, 4), (0, 64, 2, 2)], 3),
        ([(0, 4, 8, 8)], 3),
        ([(2, 64, 4, 4), (2, 0, 2, 2)], 3),
        ([(1, 64, 1, 1)], 3),
        ([(2, 1, 1, 1), (2, 1, 4, 4)], 1),
    ],
    ids=["no images", "no images, one level", "a level without channels", "one pixel",
         "one channel"],
)  # fmt: skip
def test_small_and_empty_inputs(
    any_backend: str, shapes: list[tuple[int, ...]], outputs: int
) -> None:
    weight = torch.randn(outputs, sum(s[1] for s in shapes), 3, 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*images(*shapes, dtype=torch.float64), weight)]
    output = fusion_conv2d(leaves[:-1], weight, size=(8, 8), mean=[2.0] * len(shapes))
    assert output.shape == (shapes[0][0], outputs, 8, 8)
    gradients = torch.autograd.grad(output.sum(), leaves)
    with backend("reference"):
        expected = fusion_conv2d(leaves[:-1], weight, size=(8, 8), mean=[2.0] * len(shapes))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    for mine, other in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_constants_as_tensors_and_floats() -> None:
    *features, weight, bias = pyramid(torch.float64)
    mean, std = [0.1, -0.2, 0.3, 0.4], [0.5, 1.5, 2.0, 2.5]
    expected = fusion_conv2d(features, weight, bias, mean=mean, std=std)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        constants = {
            "mean": torch.tensor(mean, dtype=dtype),
            "std": torch.tensor([v for s in std for v in (s, 9.0)], dtype=dtype)[::2],
        }
        result = fusion_conv2d(features, weight, bias, **constants)
        close = 1e-2 if dtype == torch.bfloat16 else 1e-6
        assert relative_error(result, expected) <= close


# ---- determinism --------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_from_run_to_run(dtype: torch.dtype, channels_last: bool) -> None:
    leaves = [x.requires_grad_() for x in pyramid(dtype, channels_last)]
    cotangent = torch.randn(2, 6, 12, 16).to(dtype)
    results = []
    for _ in range(4):
        output = fusion_conv2d(leaves[:-2], *leaves[-2:], mean=[0.5] * 4, std=[0.3] * 4)
        results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
