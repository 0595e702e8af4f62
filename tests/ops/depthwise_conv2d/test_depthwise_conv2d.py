"""depthwise_conv2d: values, inputs, derivatives, determinism, and the op with all its options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import ISAS, both_layouts, every_dtype, images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, depthwise_conv2d
from fastfuse.ops.depthwise_conv2d.reference import reference
from fastfuse.ops.depthwise_conv2d.samples import samples
from fastfuse.ops.policy import Machine, cpu_policy, use_isa, use_policy
from fastfuse.tolerances import relative_error, tolerance
from fastfuse.verify import check_sample

OPS = torch.ops.fastfuse


def parameters(
    channels: int, k: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> list[Tensor]:
    shapes = [(channels, 1, k, k), (channels,)][: 1 + bias]
    return [torch.randn(s).to(dtype) for s in shapes]


def with_gradients(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


# ---- values -------------------------------------------------------------------------------------


@both_layouts
@every_dtype
def test_the_reference_too(dtype: torch.dtype, channels_last: bool) -> None:
    with backend("reference"):
        for sample in samples(device="cpu", dtype=dtype, channels_last=channels_last):
            check_sample(sample)


@both_layouts
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
def test_is_pytorchs_convolution(any_backend: str, k: int, channels_last: bool) -> None:
    """One of as many groups as channels, padded to the same size."""
    (x,) = images((2, 5, 9, 11), dtype=torch.float64, channels_last=channels_last)
    for dilation, bias in itertools.product((1, 2, 3, 8), (False, True)):
        tensors = parameters(5, k, torch.float64, bias)
        result = depthwise_conv2d(x, *tensors, dilation=dilation)
        expected = F.conv2d(x, *tensors, padding=k // 2 * dilation, dilation=dilation, groups=5)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def strided(how: str, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A random image with strides of some kind."""
    batch, channels, height, width = shape
    whole = {
        "dense": shape,
        "sliced": (batch, 2 * channels + 1, height + 2, 2 * width),
        "transposed": (batch, channels, width, height),
        "expanded": (batch, 1, height, width),
    }[how]
    (x,) = images(tuple(whole), dtype=dtype, channels_last=channels_last)
    if how == "sliced":
        return x[:, 1::2, 1:-1, 1::2]
    if how == "expanded":
        return x.expand(tuple(shape))
    return x.mT if how == "transposed" else x


HOW = st.sampled_from(["dense", "dense", "sliced", "transposed", "expanded"])
SIZES = st.one_of(
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(st.integers(1, 5), st.integers(25, 200)),  # several tiles of columns
)


@pytest.mark.walks_memory
@settings(max_examples=80, deadline=None)
@given(
    k=st.sampled_from([1, 3, 5, 7, 9]),
    dilation=st.one_of(st.integers(1, 5), st.sampled_from([7, 40])),
    size=SIZES,
    channels=st.integers(1, 40),
    batch=st.integers(0, 3),
    bias=st.booleans(),
    how=st.tuples(HOW, HOW),
    channels_last=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    isa=st.sampled_from(ISAS),
)
def test_any_image(
    k: int,
    dilation: int,
    size: tuple[int, int],
    channels: int,
    batch: int,
    bias: bool,
    how: tuple[str, str],
    channels_last: tuple[bool, bool],
    dtype: torch.dtype,
    isa: str,
) -> None:
    """Random kernels, sizes, channels and strides: values, gradients and shapes.

    An error is measured by the largest sum of magnitudes: a result of few values may cancel.
    """
    shape = (batch, channels, *size)
    x, cotangent = map(strided, how, (shape, shape), (dtype, dtype), channels_last)
    inputs = [x, *parameters(channels, k, dtype, bias)]

    def definition(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference(x, weight, bias, dilation)

    with use_isa(isa), backend("cpu"):
        results = with_gradients(
            lambda *t: depthwise_conv2d(*t, dilation=dilation), inputs, cotangent
        )
    doubles = [t.double() for t in inputs]
    expected = with_gradients(definition, doubles, cotangent.double())
    magnitudes = with_gradients(definition, [t.abs() for t in doubles], cotangent.double().abs())
    reductions = (k * k, k * k, *[batch * math.prod(size)] * 2)
    for result, exact, magnitude, reduction in zip(
        results, expected, magnitudes, reductions, strict=False
    ):
        assert result.shape == exact.shape
        if exact.numel():
            error = (result.double() - exact).abs().max()
            assert error <= tolerance(dtype, reduction=reduction) * magnitude.max()


# (N, C, H, W), kernel size, dilation
SHAPES = {
    "many tiles of columns": ((1, 35, 9, 300), 7, 1),
    "tiles as narrow as the reach": ((1, 9, 5, 131), 7, 5),
    "last tile of one column": ((2, 17, 6, 97), 5, 1),
    "many tiles of rows": ((1, 8, 150, 20), 7, 1),
    "many groups of channels": ((2, 200, 12, 11), 7, 2),
    "dilated beyond the image": ((1, 20, 6, 7), 7, 9),
    "dilated, few rows": ((1, 33, 4, 90), 7, 3),
    "9x9, wide": ((1, 20, 11, 120), 9, 2),
}
every_shape = pytest.mark.parametrize("case", SHAPES)


@pytest.mark.walks_memory
@both_layouts
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_by_the_definition(
    isa: str, case: str, dtype: torch.dtype, channels_last: bool
) -> None:
    shape, k, dilation = SHAPES[case]
    x, cotangent = images(shape, shape, dtype=dtype, channels_last=channels_last)
    inputs = [x, *parameters(shape[1], k, dtype)]
    with backend("cpu"):
        results = with_gradients(
            lambda *t: depthwise_conv2d(*t, dilation=dilation), inputs, cotangent
        )
    expected = with_gradients(
        lambda *t: reference(*t, dilation), [t.double() for t in inputs], cotangent.double()
    )
    pixels = shape[0] * shape[2] * shape[3]
    for result, exact, reduction in zip(results, expected, (1, 1, pixels, pixels), strict=True):
        assert relative_error(result, exact) <= tolerance(dtype, reduction=reduction)


@both_layouts
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "dilation"), [(3, 1), (7, 1), (7, 3), (5, 2), (9, 1)])
def test_what_is_outside_the_window_is_not_read(
    isa: str, k: int, dilation: int, dtype: torch.dtype, bad: float, channels_last: bool
) -> None:
    """Infinities and NaNs reach the results that read them, and no neighbour of any kind."""
    shape, r = (2, 19, 8, 70), k // 2 * dilation
    places = [(0, 0, 0, 0), (0, 2, 7, 69), (0, 5, 4, 35), (1, 17, 0, 31), (1, 18, 3, 64)]
    x, grad = images(shape, shape, dtype=dtype, channels_last=channels_last)
    weight, marks, ones = torch.randn(19, 1, k, k).to(dtype), torch.zeros(shape), torch.ones(shape)
    geometry = {"padding": r, "dilation": dilation, "groups": 19}
    for place in places:
        x[place], marks[place] = bad, 1.0
    reached = F.conv2d(marks, torch.ones(19, 1, k, k), **geometry) > 0
    with backend("cpu"):
        output, grad_x, _ = with_gradients(
            lambda *t: depthwise_conv2d(*t, dilation=dilation), [x, weight], grad
        )
        assert torch.equal(~output.isfinite(), reached)
        assert grad_x.isfinite().all()
        # The other way round: a bad gradient, and what the weight's gradient reads of x.
        finite = x.nan_to_num(0.5, 0.5)
        _, grad_x, grad_weight = with_gradients(
            lambda *t: depthwise_conv2d(*t, dilation=dilation), [finite, weight], x
        )
        assert torch.equal(~grad_x.isfinite(), reached)
        leaf = weight.float().requires_grad_()
        (met,) = torch.autograd.grad(F.conv2d(ones, leaf, **geometry), leaf, marks)
        spoilt = ~grad_weight.isfinite()
        assert spoilt[met > 0].all()
        if dtype == torch.float32:
            assert not spoilt[met == 0].any()
        else:  # pairs of rows: a bad gradient may meet the zeros around the image
            assert not spoilt[met.amax((1, 2, 3)) == 0].any()


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@every_dtype
def test_any_strides(dtype: torch.dtype, channels_last: bool) -> None:
    """Sliced, transposed, expanded and offset inputs equal their dense copies."""
    x = images((4, 21, 24, 32), dtype=dtype, channels_last=channels_last)[0]
    weights, bias = torch.randn(21, 3, 9, 9).to(dtype), torch.randn(42).to(dtype)[::2]
    for name, image in {
        "sliced": x[::2, 3:18, 4:16, 1::2],
        "channel step": x[:, 1::2],
        "transposed": x[:2].transpose(2, 3),
        "permuted": x[:2].permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        "expanded channels": x[:2, :1].expand(-1, 15, -1, -1),
        "expanded pixels": x[:2, :, :1, :1].expand(-1, -1, 5, 6),
        "expanded batch": x[:1].expand(2, -1, -1, -1),
    }.items():
        channels = image.shape[1]
        with backend("cpu"):
            for weight in (
                weights[:channels, 1:2, 2:7, 1:6],
                weights[:channels, :1, ::2, ::2].mT,
                weights[:1, :1, :5, :5].expand(channels, -1, -1, -1),
            ):
                result = depthwise_conv2d(image, weight, bias[:channels], dilation=2)
                dense = depthwise_conv2d(
                    image.contiguous(), weight.contiguous(), bias[:channels].clone(), dilation=2
                )
                assert relative_error(result, dense) <= tolerance(dtype), name


@pytest.mark.walks_memory
@both_layouts
def test_gradients_of_any_strides(channels_last: bool) -> None:
    """grad_output may be expanded, sliced or in the other layout."""
    (x,) = images((2, 5, 12, 16), channels_last=channels_last)
    leaves = [t.requires_grad_() for t in (x, *parameters(5, 7))]
    output = depthwise_conv2d(*leaves)
    dense, larger = torch.randn(2, 5, 12, 16), torch.randn(2, 9, 12, 32)
    for cotangent in (
        torch.ones(()).expand_as(output),
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        larger[:, 3:8, :, ::2],
        larger.contiguous(memory_format=torch.channels_last)[:, 3:8, :, 16:],
    ):
        gradients = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        plain = cotangent.clone(memory_format=torch.contiguous_format)
        expected = torch.autograd.grad(output, leaves, plain, retain_graph=True)
        for gradient, other in zip(gradients, expected, strict=True):
            assert relative_error(gradient, other) <= tolerance(torch.float32, reduction=384)


def test_memory_format_is_the_inputs(any_backend: str) -> None:
    (x,) = images((2, 6, 8, 8))
    last = x.contiguous(memory_format=torch.channels_last)
    for image, expected in (
        (x, torch.contiguous_format),
        (last, torch.channels_last),
        (last[:, 1:5, 1:5, 2:6], torch.channels_last),
        (torch.randn(2, 6, 1, 1), torch.contiguous_format),
    ):
        leaf = image.detach().requires_grad_()
        output = depthwise_conv2d(leaf, *parameters(image.shape[1], 3))
        assert output.is_contiguous(memory_format=expected)
        (gradient,) = torch.autograd.grad(output, leaf, torch.randn_like(output))
        assert gradient.is_contiguous(memory_format=expected)


@both_layouts
def test_output_is_new_memory(any_backend: str, channels_last: bool) -> None:
    (x,) = images((2, 7, 5, 9), channels_last=channels_last)
    result = depthwise_conv2d(x, torch.ones(7, 1, 1, 1))
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


@pytest.mark.walks_memory
@both_layouts
def test_every_value_is_written(isa: str, channels_last: bool) -> None:
    """With new memory filled with NaN, none is left in output or gradients."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape, k, dilation in (
            ((2, 35, 7, 9), 7, 1),
            ((1, 21, 30, 140), 7, 3),
            ((1, 5, 2, 3), 9, 2),  # taps that never meet a pixel
            ((3, 18, 1, 1), 5, 1),
        ):
            (x,) = images(shape, channels_last=channels_last)
            leaves = [t.requires_grad_() for t in (x, *parameters(shape[1], k))]
            output = depthwise_conv2d(*leaves, dilation=dilation)
            assert not output.isnan().any()
            for gradient in torch.autograd.grad(output.sum(), leaves):
                assert not gradient.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 0, 4, 4)], ids=["no images", "no channels"])
def test_empty_inputs(shape: tuple[int, ...], channels_last: bool) -> None:
    (x,) = images(shape, channels_last=channels_last)
    leaves = [t.requires_grad_() for t in (x, *parameters(shape[1], 3))]
    with backend("cpu"):
        output = depthwise_conv2d(*leaves)
    assert output.shape == shape
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), ()])
def test_frozen_inputs(wanted: tuple[int, ...]) -> None:
    """First and second derivatives with other inputs frozen equal those of all."""

    def derivatives(which: Sequence[int]) -> list[Tensor]:
        torch.manual_seed(1)
        inputs = [torch.randn(2, 3, 5, 4).double(), *parameters(3, 3, torch.float64)]
        leaves = [inputs[i].requires_grad_() for i in which]
        output = depthwise_conv2d(*inputs, dilation=2)
        assert output.requires_grad == bool(leaves)
        if not leaves:
            return []
        first = torch.autograd.grad((output**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    some, everything = derivatives(wanted), derivatives([0, 1, 2])
    for mine, i in zip(some, wanted, strict=False):
        torch.testing.assert_close(mine, everything[i])
    with backend("reference"):
        for mine, theirs in zip(some, derivatives(wanted), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [((0, 1, 2), (0, 1)), ((0,), (1,)), ((1,), (0,)), ((2,), ()), ((), ())],
    ids=["all", "x", "weight", "bias", "nothing"],
)
def test_what_is_kept_for_backward(wanted: Sequence[int], kept: Sequence[int]) -> None:
    """x for the weight's gradient, the weight for that of x: no copies, and nothing else."""
    tensors = [torch.randn(2, 3, 5, 4), *parameters(3, 3)]
    for i in wanted:
        tensors[i].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        depthwise_conv2d(*tensors)
    assert sorted(t.data_ptr() for t in saved) == sorted(tensors[i].data_ptr() for i in kept)


# ---- where the library is faster ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "options", "library"),
    [
        (3, {}, True),
        (5, {}, True),
        (7, {}, False),
        (9, {}, True),
        (3, {"channels_last": False}, False),
        (9, {"channels_last": False}, True),
        (3, {"dtype": torch.bfloat16}, True),
        (5, {"dtype": torch.bfloat16}, False),
        (3, {"dtype": torch.float64}, False),
        (3, {"dtype": torch.float16}, False),
        (7, {"shape": (1, 16, 256, 256)}, True),
        (7, {"shape": (1, 16, 256, 256), "channels_last": False}, False),
        (3, {"dilation": 2}, False),
        (3, {"wanted": True}, False),
        (9, {"wanted": True}, False),
        (3, {"name": "cpu"}, False),
    ],
)
def test_the_library_runs_where_it_is_faster(
    k: int, options: dict[str, Any], library: bool
) -> None:
    """By itself, on CPUs, where no derivative is wanted; the result is of the same kind."""
    shape, dtype = options.get("shape", (1, 6, 8, 9)), options.get("dtype", torch.float32)
    (x,) = images(shape, dtype=dtype, channels_last=options.get("channels_last", True))
    inputs, dilation = [x, *parameters(shape[1], k, dtype)], options.get("dilation", 1)
    inputs[1].requires_grad_(options.get("wanted", False))
    zen4 = use_policy(cpu_policy(Machine(isa="avx512_bf16", onednn_bfloat16=True)))
    with zen4, backend(options.get("name", "auto")), FlopCounterMode(display=False) as counter:
        result = depthwise_conv2d(*inputs, dilation=dilation)
    ops = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert ops == {"aten.convolution" if library else "fastfuse.depthwise_conv2d"}
    with backend("cpu"):
        expected = depthwise_conv2d(*inputs, dilation=dilation)
    assert result.dtype == dtype
    assert result.stride() == expected.stride()
    assert relative_error(result, expected) <= 2 * tolerance(dtype)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["many tiles of columns", "many groups of channels", "9x9, wide"])
def test_same_bits_for_any_number_of_threads(
    isa: str, case: str, dtype: torch.dtype, channels_last: bool
) -> None:
    shape, k, dilation = SHAPES[case]
    x, cotangent = images(shape, shape, dtype=dtype, channels_last=channels_last)
    inputs = [x, *parameters(shape[1], k, dtype)]
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with backend("cpu"):
            results.append(
                with_gradients(
                    lambda *t: depthwise_conv2d(*t, dilation=dilation), inputs, cotangent
                )
            )
    for result in results[1:]:
        for name, a, b in zip(
            ("output", "x", "weight", "bias"), result, results[0], strict=True
        ):  # fmt: skip
            assert torch.equal(a, b), name


# ---- the op with all its options ----------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@every_dtype
@pytest.mark.parametrize("flip", [False, True])
def test_flip_and_addend_by_the_definition(
    isa: str, flip: bool, dtype: torch.dtype, channels_last: bool
) -> None:
    """Turned by 180 degrees and added to something, of any strides; rounded once."""
    for shape, k, dilation in (((2, 19, 9, 70), 7, 1), ((1, 33, 8, 7), 5, 2), ((1, 3, 4, 5), 9, 1)):
        x = strided("dense", shape, dtype, channels_last)
        weight, bias = parameters(shape[1], k, dtype)
        turned = weight.flip(2, 3) if flip else weight
        exact = reference(x.double(), turned.double(), bias.double(), dilation)
        for how, layout in (
            ("dense", channels_last),
            ("dense", not channels_last),
            ("sliced", channels_last),
            ("expanded", channels_last),
        ):
            addend = strided(how, shape, dtype, layout)
            result = OPS.depthwise_conv2d(x, weight, bias, addend, dilation, flip, channels_last)
            assert relative_error(result, exact + addend.double()) <= tolerance(dtype)


@both_layouts
@pytest.mark.parametrize("flip", [False, True])
def test_derivatives_with_flip_and_addend(flip: bool, channels_last: bool) -> None:
    x, addend = images((2, 2, 3, 4), (2, 2, 3, 4), dtype=torch.float64, channels_last=channels_last)
    inputs = [t.requires_grad_() for t in (x, *parameters(2, 3, torch.float64), addend)]

    def call(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor) -> Tensor:
        return OPS.depthwise_conv2d(x, weight, bias, addend, 2, flip, channels_last)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@both_layouts
def test_derivatives_of_the_weights_gradient(channels_last: bool) -> None:
    inputs = images((2, 2, 3, 4), (2, 2, 3, 4), dtype=torch.float64, channels_last=channels_last)
    inputs = [t.requires_grad_() for t in inputs]

    def call(grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.depthwise_conv2d_backward_weight(grad_output, x, 3, 1)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


# ---- machinery ----------------------------------------------------------------------------------


def inputs(dtype: torch.dtype = torch.float32, channels: int = 6, k: int = 5) -> list[Tensor]:
    shapes = ((2, channels, 9, 8), (channels, 1, k, k), (channels,))
    return [torch.randn(s).to(dtype) for s in shapes]


def test_flop_formula() -> None:
    x, weight, bias = inputs()
    once = (
        2 * 25 * 2 * 6 * 9 * 8
    )  # a multiply-add for each tap of each value, as if none is outside
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight, bias, dilation=2)
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight.requires_grad_(), bias.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 2 * once
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x.requires_grad_(), weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * once


def test_a_changed_input_is_noticed() -> None:
    """x is kept for backward: PyTorch refuses to go back through what was overwritten."""
    x, weight, _ = inputs()
    output = depthwise_conv2d(x, weight.requires_grad_())
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
