"""upsample_equalize_concat: values, inputs, derivatives, determinism, memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import both_layouts, every_dtype, images, pyramid, streaming_from
from memory import peak_of, reads_proc
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, upsample_equalize_concat
from fastfuse.ops.upsample_equalize_concat.samples import exact
from fastfuse.tolerances import relative_error, tolerance

# ---- values -------------------------------------------------------------------------------------


def test_reference_is_what_a_user_would_write() -> None:
    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4), dtype=torch.float64)
    up = F.interpolate(p3, size=(8, 8), mode="bilinear", align_corners=False)
    expected = torch.cat([(p2 - 0.5) / 2.0, (up - 0.25) / 4.0], dim=1)
    for name in ("reference", "cpu"):
        with backend(name):
            result = upsample_equalize_concat([p2, p3], mean=[0.5, 0.25], std=[2.0, 4.0])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


@both_layouts
def test_a_level_of_the_target_size_passes_unchanged(channels_last: bool) -> None:
    (x,) = images((2, 7, 5, 9), channels_last=channels_last)
    result = upsample_equalize_concat([x])
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("std", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value(isa: str, dtype: torch.dtype, std: float) -> None:
    """All 65536 bit patterns are widened, divided and rounded as PyTorch does."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(1, 1, 256, 256)
    with backend("cpu"):
        result = upsample_equalize_concat([x], std=[std])
    expected = (x.float() * (1 / torch.tensor(std, dtype=torch.float64)).float()).to(dtype)
    assert torch.equal(result.isnan(), expected.isnan())
    same = (result.view(torch.int16) == expected.view(torch.int16)) | expected.isnan()
    if isa == "avx512_bf16" and dtype == torch.bfloat16:  # takes subnormal values for zero
        same |= (expected.abs() < torch.finfo(dtype).tiny) & (result == 0)
    assert same.all()


@every_dtype
def test_large_values_do_not_overflow(isa: str, dtype: torch.dtype) -> None:
    largest = 0.9 * torch.finfo(dtype).max  # differences overflow, interpolated values do not
    x = torch.tensor([largest, -largest] * 8, dtype=dtype).reshape(1, 1, 4, 4)
    with backend("cpu"):
        output = upsample_equalize_concat([x], size=(9, 11))
    assert output.isfinite().all()
    assert output.abs().max() <= x.abs().max()


@pytest.mark.walks_memory
@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(1, 40)),
        min_size=1,
        max_size=5,
    ),
    size=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(0, 3),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_levels(
    levels: list[tuple[int, int, int]],
    size: tuple[int, int] | None,
    batch: int,
    align_corners: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    """Random channels (none too), sizes and ratios: values, gradients and shapes."""
    features = images(*((batch, *s) for s in levels), dtype=dtype, channels_last=channels_last)
    leaves = [f.requires_grad_() for f in features]
    doubles = [f.detach().double().requires_grad_() for f in features]
    mean = torch.randn(len(levels)).tolist()
    std = (torch.rand(len(levels)) + 0.5).tolist()
    with backend("cpu"):
        output = upsample_equalize_concat(
            leaves, size=size, mean=mean, std=std, align_corners=align_corners
        )
    expected = exact(tuple(doubles), size, mean, std, align_corners, dtype)
    assert relative_error(output.detach(), expected.detach()) <= tolerance(dtype)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    exact_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact_gradient) <= tolerance(dtype, reduction=1600)


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("width", [16, 128, 144])
def test_streaming_stores_write_the_same_bits(channels_last: bool, width: int) -> None:
    """All images together bypass the caches, one of them does not."""
    features = images((3, 64, 32, width), (3, 32, 16, width // 2), channels_last=channels_last)
    with streaming_from(3 * 96 * 32 * width * 4):
        whole = upsample_equalize_concat(features)
        for i in range(3):
            part = upsample_equalize_concat([f[i : i + 1] for f in features])
            assert torch.equal(whole[i : i + 1], part)


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [(1, 1), (2, 2), (1, 2), (3, 2)])
def test_streaming_stores_write_the_same_gradients(
    isa: str, dtype: torch.dtype, channels_last: bool, ratio: tuple[int, int]
) -> None:
    """The gradient of all images bypasses the caches, that of one does not."""
    batch = 3
    (x,) = images((batch, 64, 32, 64), dtype=dtype, channels_last=channels_last)
    size = (32 * ratio[0], 64 * ratio[1])
    (grad,) = images((batch, 64, *size), dtype=dtype, channels_last=channels_last)

    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        output = upsample_equalize_concat([leaf], size=size, std=[3.0])
        return torch.autograd.grad(output, leaf, grad)[0]

    with streaming_from(x.nbytes):
        whole = gradient(x, grad)
        for i in range(batch):
            assert torch.equal(whole[i : i + 1], gradient(x[i : i + 1], grad[i : i + 1]))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without fused multiply-adds PyTorch's weights are other ones",
)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", [(333, 1000), (7, 50), (129, 65), (16, 64)])
def test_float32_weights_are_pytorchs_to_the_bit(
    isa: str, sizes: tuple[int, int], align_corners: bool
) -> None:
    """One-hot rows read the weights out."""
    source, target = sizes
    one_hot = torch.eye(source).reshape(1, source, 1, source)
    for rows in (one_hot, one_hot.contiguous(memory_format=torch.channels_last)):
        with backend("cpu"):
            ours = upsample_equalize_concat([rows], size=(1, target), align_corners=align_corners)
        theirs = F.interpolate(
            one_hot, size=(1, target), mode="bilinear", align_corners=align_corners
        )
        assert torch.equal(ours, theirs)


def test_equal_sizes_are_the_identity_however_large() -> None:
    """Coordinates beyond 2^24 are no float32 numbers."""
    x = torch.randint(0, 256, (1, 1, 2**24 + 9, 1)).to(torch.bfloat16)
    output = upsample_equalize_concat([x], size=(2**24 + 9, 2))
    assert torch.equal(output[..., 1:], x)


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@every_dtype
def test_any_strides(dtype: torch.dtype, channels_last: bool) -> None:
    """Sliced, flipped, transposed, expanded and mixed inputs equal their dense copies."""
    a, b = images((4, 40, 24, 32), (2, 24, 20, 12), dtype=dtype, channels_last=channels_last)
    variants = {
        "sliced": [a[::2, 3:23, 4:16, ::2], b[:, ::2, 2:8, 1:9]],
        "transposed": [a[:2].transpose(2, 3), b.transpose(2, 3)],
        "expanded": [a[:2, :1].expand(-1, 7, -1, -1), b[:, :, :1, :1].expand(-1, -1, 5, 6)],
        "expanded batch": [a[:1].expand(2, -1, -1, -1), b],
        "mixed layouts": [a[:2].contiguous(), b.contiguous(memory_format=torch.channels_last)],
    }
    for name, features in variants.items():
        with backend("cpu"):
            result = upsample_equalize_concat(features, std=[0.5, 2.0])
            dense = upsample_equalize_concat([f.contiguous() for f in features], std=[0.5, 2.0])
        assert relative_error(result, dense) <= tolerance(dtype), name


@pytest.mark.walks_memory
@both_layouts
def test_gradients_of_any_strides(channels_last: bool) -> None:
    """grad_output may be expanded, sliced or in the other layout."""
    features = [f.requires_grad_() for f in pyramid(channels_last=channels_last)]
    output = upsample_equalize_concat(features)
    dense = torch.randn(2, 42, 12, 16)
    wide = torch.randn(2, 50, 12, 32)
    for cotangent in (
        torch.ones(()).expand_as(output),
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        wide[:, 4:46, :, ::2],
        wide.contiguous(memory_format=torch.channels_last)[:, 4:46, :, 16:],
    ):
        gradients = torch.autograd.grad(output, features, cotangent, retain_graph=True)
        expected = torch.autograd.grad(
            output,
            features,
            cotangent.clone(memory_format=torch.contiguous_format),
            retain_graph=True,
        )
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


def test_memory_format_is_the_first_telling_inputs() -> None:
    first, second = images((2, 4, 8, 8), (2, 4, 4, 4))
    last = first.contiguous(memory_format=torch.channels_last)
    one_pixel = torch.randn(2, 4, 1, 1)
    for features, channels_last in (
        ([first, second], False),
        ([last, second], True),
        ([one_pixel, last], True),
        ([one_pixel, first], False),
        ([last[:, :, 1:5, 2:6], second], True),
    ):
        for name in ("reference", "cpu"):
            with backend(name):
                output = upsample_equalize_concat(features, size=(8, 8))
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            assert output.is_contiguous(memory_format=memory_format), name


@pytest.mark.walks_memory
@both_layouts
def test_every_value_is_written(channels_last: bool) -> None:
    """With new memory filled with NaN, none is left in output or gradients."""
    torch.use_deterministic_algorithms(True)
    try:
        for shapes, size in (
            (((2, 5, 7, 9), (2, 70, 3, 4)), None),
            (((1, 3, 50, 40), (1, 130, 20, 31)), (7, 5)),  # source pixels that nobody reads
        ):
            features = [f.requires_grad_() for f in images(*shapes, channels_last=channels_last)]
            assert torch.empty(3).isnan().all()
            output = upsample_equalize_concat(features, size=size)
            assert not output.isnan().any()
            for gradient in torch.autograd.grad(output.sum(), features):
                assert not gradient.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    "shapes",
    [((0, 3, 4, 4), (0, 2, 2, 2)), ((2, 0, 4, 4),), ((2, 0, 4, 4), (2, 3, 2, 2))],
    ids=["no images", "no channels", "one level without channels"],
)
def test_empty_inputs(any_backend: str, shapes: Sequence[tuple[int, ...]]) -> None:
    features = [f.requires_grad_() for f in images(*shapes)]
    output = upsample_equalize_concat(features, size=(8, 8))
    assert output.shape == (shapes[0][0], sum(s[1] for s in shapes), 8, 8)
    for feature, gradient in zip(
        features, torch.autograd.grad(output.sum(), features), strict=True
    ):
        assert gradient.shape == feature.shape


def test_constants_as_tensors_and_floats() -> None:
    features = pyramid(dtype=torch.float64)
    mean, std = [0.1, -0.2, 0.3], [0.5, 1.5, 2.0]
    expected = upsample_equalize_concat(features, mean=mean, std=std)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        constants = {
            "mean": torch.tensor(mean, dtype=dtype),
            "std": torch.tensor([v for s in std for v in (s, 9.0)], dtype=dtype)[::2],
        }
        result = upsample_equalize_concat(features, **constants)
        close = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(result, expected, rtol=close, atol=close)


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_frozen_levels(frozen: tuple[int, ...]) -> None:
    """Gradients and second derivatives with some levels frozen equal those with none."""

    def derivatives(leaves: Sequence[int]) -> list[list[Tensor]]:
        torch.manual_seed(1)
        features = pyramid(dtype=torch.float64)
        for i in leaves:
            features[i].requires_grad_()
        output = upsample_equalize_concat(features, std=[0.5, 2.0, 3.0])
        if not leaves:
            assert not output.requires_grad
            return []
        inputs = [features[i] for i in leaves]
        first = torch.autograd.grad((output**3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [list(first), list(second)]

    leaves = [i for i in range(3) if i not in frozen]
    some, all_levels = derivatives(leaves), derivatives([0, 1, 2])
    if leaves:
        for mine, theirs in zip(some[0], [all_levels[0][i] for i in leaves], strict=True):
            assert torch.equal(mine, theirs)
    with backend("reference"):
        expected = derivatives(leaves)
    for order, expected_order in zip(some, expected, strict=True):
        for mine, theirs in zip(order, expected_order, strict=True):
            torch.testing.assert_close(mine, theirs)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, dtype: torch.dtype, channels_last: bool
) -> None:
    shapes = ((2, 70, 60, 52), (2, 33, 31, 26), (2, 130, 7, 9), (2, 16, 1, 1))
    features = images(*shapes, dtype=dtype, channels_last=channels_last)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        leaves = [f.detach().requires_grad_() for f in features]
        output = upsample_equalize_concat(leaves, mean=[1.0, 2.0, 3.0, 4.0], std=[0.3] * 4)
        torch.manual_seed(1)
        results.append([output, *torch.autograd.grad(output, leaves, torch.randn_like(output))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- memory -------------------------------------------------------------------------------------


@reads_proc
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_peak_memory_is_output_and_gradients(layout: str) -> None:
    before = f"""
layout = torch.{layout}
features = [torch.randn(1, 256, 128 >> i, 128 >> i).contiguous(memory_format=layout)
            .requires_grad_() for i in range(4)]
grad = torch.randn(1, 1024, 128, 128).contiguous(memory_format=layout)
def step():
    output = fastfuse.upsample_equalize_concat(features, std=[1.0, 2.0, 3.0, 4.0])
    return output, *torch.autograd.grad(output, features, grad)
step()
"""
    kept = 4 * (1024 * 128**2 + sum(256 * (128 >> i) ** 2 for i in range(4)))
    slack = 1 << 20  # threads' scratch rows, tables
    assert kept / 2 <= peak_of("found = step()", before=before) <= kept + slack


# ---- machinery ----------------------------------------------------------------------------------


def test_compile_with_floats_and_a_backend_inside() -> None:
    @torch.compile(fullgraph=True)
    def step(features: list[Tensor]) -> Tensor:
        with backend("cpu"):
            return upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])

    features = pyramid()
    expected = upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    torch.testing.assert_close(step(features), expected)


def test_autocast_casts_features_only(any_backend: str) -> None:
    """bfloat16 in and out; mean and std keep their digits."""
    features = [f.requires_grad_() for f in pyramid()]
    mean = torch.tensor([1.00390625, 0.0, 0.0])  # 1 + 2^-8: 1 in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = upsample_equalize_concat(features, mean=mean)
        mixed = upsample_equalize_concat([features[0], features[1].bfloat16()])
        wide = upsample_equalize_concat([features[0].double()])
    assert output.dtype == torch.bfloat16
    assert mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    halves = [f.detach().bfloat16() for f in features]
    with torch.no_grad():
        assert torch.equal(output, upsample_equalize_concat(halves, mean=mean))
    output.float().sum().backward()
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in features)


def test_flop_formula() -> None:
    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4))
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2, p3])
    # x: 4 rows of 8 values, y: 8 rows of 8 values, a multiply-add per weight, 2 weights
    assert counter.get_total_flops() == 2 * 6 * 4 * (4 * 8 + 8 * 8)
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2.requires_grad_(), p3], std=[1.0, 2.0]).sum().backward()
    forward = 2 * (4 * 2 * 64 + 6 * (2 * 16 + 4 * 96))
    assert counter.get_total_flops() == forward + 2 * 4 * 2 * 64


def test_compile_with_dynamic_sizes_and_floats() -> None:
    """The target's size and the constants may be inputs of the graph."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x: Tensor, like: Tensor, scale: float) -> Tensor:
        return upsample_equalize_concat([x], size=like.shape[2:], std=[scale])

    for height, scale in ((8, 0.5), (12, 0.25), (20, 2.0)):
        x, like = images((2, 3, 4, 6), (2, 1, height, 9))
        expected = upsample_equalize_concat([x], size=(height, 9), std=[scale])
        torch.testing.assert_close(step(x, like, scale), expected)
