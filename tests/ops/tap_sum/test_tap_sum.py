"""tap_sum: values, inputs, derivatives, determinism, and the ops that write to given memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import both_corners, both_layouts, every_dtype, images, streaming_from
from torch import Tensor

from fastfuse import backend, tap_sum
from fastfuse.ops.tap_sum.samples import exact
from fastfuse.tolerances import relative_error, tolerance

# ---- values -------------------------------------------------------------------------------------


@both_layouts
@both_corners
@pytest.mark.parametrize("padding", [None, 0, 1, 3])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_of_products_is_the_convolution_of_the_upsampled(
    any_backend: str, k: int, padding: int | None, align_corners: bool, channels_last: bool
) -> None:
    for source, size in (
        ((5, 4), (10, 16)),
        ((7, 11), (9, 13)),
        ((8, 9), (5, 6)),
        ((1, 1), (5, 5)),
    ):
        (x,) = images((2, 6, *source), dtype=torch.float64, channels_last=channels_last)
        weight, bias = torch.randn(3, 6, k, k).double(), torch.randn(6).double()
        products = weight.permute(2, 3, 0, 1).reshape(k * k * 3, 6)
        up = F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
        shifted = up - bias[:, None, None]
        result = tap_sum(
            F.conv2d(x, products[:, :, None, None]),
            size,
            kernel_size=k,
            offsets=-(products @ bias),
            padding=padding,
            align_corners=align_corners,
        )
        expected = F.conv2d(shifted, weight, padding=k // 2 if padding is None else padding)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


@pytest.mark.walks_memory
@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(0, 20),
    source=st.tuples(st.integers(1, 20), st.integers(1, 30)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    batch=st.integers(0, 3),
    k=st.sampled_from([1, 3, 5]),
    padding=st.integers(0, 5),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_levels(
    channels: int,
    source: tuple[int, int],
    size: tuple[int, int],
    batch: int,
    k: int,
    padding: int,
    align_corners: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    """Random channels (none too), sizes, ratios and paddings: values, gradients and shapes."""
    padding = max(padding, (k - min(size) + 1) // 2)  # something must be left
    (taps,) = images((batch, k * k * channels, *source), dtype=dtype, channels_last=channels_last)
    leaves = [taps.requires_grad_(), torch.randn(taps.shape[1], dtype=dtype, requires_grad=True)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    how = {"kernel_size": k, "padding": padding, "align_corners": align_corners}
    with backend("cpu"):
        output = tap_sum(leaves[0], size, offsets=leaves[1], **how)
    expected = exact(*doubles, size, **how, coordinates=dtype)
    assert relative_error(output.detach(), expected.detach()) <= tolerance(dtype, reduction=k * k)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    exact_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact_gradient) <= tolerance(dtype, reduction=1600)


# (N, C, h, w), size, kernel size
SHAPES = {
    "odd primes": ((2, 13, 7, 11), (29, 31), 3),
    "odd primes, down": ((1, 5, 37, 41), (23, 17), 3),
    "one channel": ((2, 1, 5, 3), (10, 12), 3),
    "one pixel": ((2, 6, 1, 1), (1, 1), 3),
    "to one pixel": ((2, 6, 5, 4), (1, 1), 3),
    "one row": ((1, 3, 1, 9), (1, 27), 5),
    "several tiles of channels and columns": ((1, 520, 3, 45), (5, 90), 3),
    "many channels": ((1, 1030, 2, 2), (4, 3), 1),
}


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_by_the_definition(
    isa: str, case: str, dtype: torch.dtype, channels_last: bool
) -> None:
    (batch, channels, *source), size, k = SHAPES[case]
    shape = (batch, k * k * channels, *source)
    (taps,) = images(shape, dtype=dtype, channels_last=channels_last)
    offsets = torch.randn(shape[1]).to(dtype).requires_grad_()
    leaves = [taps.requires_grad_(), offsets]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    with backend("cpu"):
        output = tap_sum(taps, size, kernel_size=k, offsets=offsets)
    expected = exact(*doubles, size, k, k // 2, False, dtype)
    assert relative_error(output.detach(), expected.detach()) <= tolerance(dtype)
    (cotangent,) = images(tuple(output.shape), dtype=dtype, channels_last=channels_last)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    exact_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact_gradient) <= tolerance(dtype, reduction=1600)


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_stores_write_the_same_bits(
    isa: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """All images together bypass the caches, one of them does not."""
    batch = 3
    (taps,) = images((batch, 9 * 32, 16, 32), dtype=dtype, channels_last=channels_last)
    (grad,) = images((batch, 32, 64, 64), dtype=dtype, channels_last=channels_last)

    def both(taps: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        leaf = taps.detach().requires_grad_()
        output = tap_sum(leaf, (64, 64), kernel_size=3)
        return output, torch.autograd.grad(output, leaf, grad)[0]

    with streaming_from(min(taps.nbytes, grad.nbytes)):
        whole = both(taps, grad)
        for i in range(batch):
            for all_of_them, one in zip(whole, both(taps[i : i + 1], grad[i : i + 1]), strict=True):
                assert torch.equal(all_of_them[i : i + 1], one)


@both_layouts
def test_what_is_outside_is_not_read(isa: str, channels_last: bool) -> None:
    """An infinity reaches only the values that read it: zero padding is not a factor of 0."""
    (taps,) = images((1, 9 * 5, 3, 3), channels_last=channels_last)
    taps[:, :5, 0, 0] = torch.inf  # tap (0, 0) is outside in the first row and column
    with backend("cpu"):
        result = tap_sum(taps, (6, 6), kernel_size=3)
    expected = exact(taps, None, (6, 6), 3, 1, False, torch.float32)
    assert torch.equal(result.isinf(), expected.isinf())
    assert result[:, :, 0].isfinite().all()
    assert not result.isnan().any()


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@every_dtype
def test_any_strides(dtype: torch.dtype, channels_last: bool) -> None:
    """Sliced, transposed, expanded and offset inputs equal their dense copies."""
    (x,) = images((4, 60, 24, 32), dtype=dtype, channels_last=channels_last)
    offsets = torch.randn(90).to(dtype)[::2]
    for name, taps in {
        "sliced": x[::2, 3:48, 4:16, 1::2],
        "channel step": x[:, 1::2][:, :27],
        "transposed": x[:2, :45].transpose(2, 3),
        "permuted": x[:2, :45].permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        "expanded channels": x[:2, :1].expand(-1, 45, -1, -1),
        "expanded pixels": x[:2, :45, :1, :1].expand(-1, -1, 5, 6),
        "expanded batch": x[:1, :45].expand(2, -1, -1, -1),
    }.items():
        o = offsets[: taps.shape[1]]
        with backend("cpu"):
            result = tap_sum(taps, (17, 19), kernel_size=3, offsets=o)
            dense = tap_sum(taps.contiguous(), (17, 19), kernel_size=3, offsets=o.clone())
        assert relative_error(result, dense) <= tolerance(dtype), name


@pytest.mark.walks_memory
@both_layouts
def test_gradients_of_any_strides(channels_last: bool) -> None:
    """grad_output may be expanded, sliced or in the other layout."""
    (taps,) = images((2, 45, 6, 8), channels_last=channels_last)
    leaves = [taps.requires_grad_(), torch.randn(45, requires_grad=True)]
    output = tap_sum(taps, (12, 16), kernel_size=3, offsets=leaves[1])
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
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


def test_memory_format_is_the_inputs(any_backend: str) -> None:
    (taps,) = images((2, 36, 8, 8))
    last = taps.contiguous(memory_format=torch.channels_last)
    for x, expected in (
        (taps, torch.contiguous_format),
        (last, torch.channels_last),
        (last[:, 9:27, 1:5, 2:6], torch.channels_last),
        (torch.randn(2, 36, 1, 1), torch.contiguous_format),
    ):
        output = tap_sum(x, (8, 8), kernel_size=3)
        assert output.is_contiguous(memory_format=expected)


@both_layouts
def test_output_is_new_memory(any_backend: str, channels_last: bool) -> None:
    (x,) = images((2, 7, 5, 9), channels_last=channels_last)
    result = tap_sum(x, (5, 9), kernel_size=1)
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


@pytest.mark.walks_memory
@both_layouts
def test_every_value_is_written(isa: str, channels_last: bool) -> None:
    """With new memory filled with NaN, none is left in output or gradients."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape, size, k, padding in (
            ((2, 63, 7, 9), (14, 20), 3, 1),
            ((1, 27, 50, 40), (7, 5), 3, 1),  # source pixels that nobody reads
            ((1, 27, 3, 4), (5, 6), 3, 6),  # output pixels that read nothing
            ((1, 75, 4, 4), (9, 8), 5, 0),
        ):
            (taps,) = images(shape, channels_last=channels_last)
            leaves = [taps.requires_grad_(), torch.randn(shape[1], requires_grad=True)]
            output = tap_sum(taps, size, kernel_size=k, offsets=leaves[1], padding=padding)
            assert not output.isnan().any()
            for gradient in torch.autograd.grad(output.sum(), leaves):
                assert not gradient.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("shape", [(0, 27, 4, 4), (2, 0, 4, 4)], ids=["no images", "no channels"])
def test_empty_inputs(any_backend: str, shape: Sequence[int], channels_last: bool) -> None:
    (taps,) = images(tuple(shape), channels_last=channels_last)
    leaves = [taps.requires_grad_(), torch.randn(shape[1], requires_grad=True)]
    output = tap_sum(taps, (8, 6), kernel_size=3, offsets=leaves[1])
    assert output.shape == (shape[0], shape[1] // 9, 8, 6)
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), ()])
def test_frozen_inputs(wanted: tuple[int, ...]) -> None:
    """Gradients with the other input frozen equal those of both."""

    def derivatives(which: Sequence[int]) -> list[Tensor]:
        torch.manual_seed(1)
        inputs = [torch.randn(2, 27, 3, 4).double(), torch.randn(27).double()]
        leaves = [inputs[i].requires_grad_() for i in which]
        output = tap_sum(inputs[0], (5, 7), kernel_size=3, offsets=inputs[1])
        assert output.requires_grad == bool(leaves)
        if not leaves:
            return []
        first = torch.autograd.grad((output**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    some, both = derivatives(wanted), derivatives([0, 1])
    for mine, i in zip(some, wanted, strict=False):
        assert torch.equal(mine, both[i])
    with backend("reference"):
        for mine, theirs in zip(some, derivatives(wanted), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_no_tensor_is_kept_for_backward() -> None:
    taps, offsets = torch.randn(2, 27, 3, 4).requires_grad_(), torch.randn(27).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tap_sum(taps, (6, 8), kernel_size=3, offsets=offsets)
    assert not kept


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 9 * 33, 31, 26), (60, 52)), ((2, 9 * 70, 7, 9), (56, 63)), ((2, 9 * 40, 1, 1), (30, 31))],
    ids=["ratio 2", "ratio 8", "one pixel"],
)
def test_same_bits_for_any_number_of_threads(
    isa: str, shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    (taps,) = images(shape, dtype=dtype, channels_last=channels_last)
    leaves = [taps.requires_grad_(), torch.randn(shape[1]).to(dtype).requires_grad_()]
    (cotangent,) = images((2, shape[1] // 9, *size), dtype=dtype, channels_last=channels_last)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        output = tap_sum(taps, size, kernel_size=3, offsets=leaves[1])
        results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    for result in results[1:]:
        for name, a, b in zip(("output", "taps", "offsets"), result, results[0], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("dtype", "channels", "k", "source", "size"),
    [(torch.float64, 264, 3, 10, 96), (torch.float32, 336, 5, 10, 128)],
    ids=["float64", "float32"],
)
def test_tiles_of_some_channels_are_streamed(
    isa: str, dtype: torch.dtype, channels: int, k: int, source: int, size: int
) -> None:
    """Large outputs whose channels are whole cache lines, and are not when they are halved."""
    (taps,) = images((1, k * k * channels, source, source), dtype=dtype, channels_last=True)
    with streaming_from(0):
        last = tap_sum(taps, (size, size), kernel_size=k)
    contiguous = tap_sum(taps.contiguous(), (size, size), kernel_size=k)
    assert relative_error(last, contiguous) <= tolerance(dtype)


@pytest.mark.walks_memory
def test_gradients_of_some_channels_are_streamed(isa: str) -> None:
    (taps,) = images((1, 9 * 344, 30, 30), dtype=torch.float64, channels_last=True)
    (gradient,) = images((1, 344, 60, 60), dtype=torch.float64, channels_last=True)
    arguments = (30, 30, 60, 60, 3, 1, False)
    with streaming_from(0):
        last = torch.ops.fastfuse.tap_sum_backward(gradient, *arguments, True)
    contiguous = torch.ops.fastfuse.tap_sum_backward(gradient.contiguous(), *arguments, False)
    assert last.shape == taps.shape
    assert relative_error(last, contiguous) <= tolerance(torch.float64)
