"""upsample_add: values, inputs, derivatives, determinism, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import both_layouts, every_dtype, images, streaming_from
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, upsample_add
from fastfuse.ops.upsample_add.samples import exact
from fastfuse.tolerances import relative_error, tolerance

# ---- values -------------------------------------------------------------------------------------


def test_reference_is_what_a_user_would_write(any_backend: str) -> None:
    x, skip = images((2, 6, 4, 4), (2, 6, 8, 8), dtype=torch.float64)
    expected = skip + F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample_add(x, skip), expected, rtol=0, atol=1e-14)


@both_layouts
@every_dtype
def test_equal_sizes_are_a_plain_sum(isa: str, dtype: torch.dtype, channels_last: bool) -> None:
    x, skip = images((2, 7, 5, 9), (2, 7, 5, 9), dtype=dtype, channels_last=channels_last)
    with backend("cpu"):
        output = upsample_add(x, skip)
    if isa == "avx512_bf16" and dtype == torch.bfloat16:  # takes subnormal values for zero
        torch.testing.assert_close(output, x + skip, rtol=0, atol=torch.finfo(dtype).tiny)
    else:
        assert torch.equal(output, x + skip)
    assert output.data_ptr() not in (x.data_ptr(), skip.data_ptr())


@pytest.mark.walks_memory
@pytest.mark.parametrize("align_corners", [False, True])
def test_random_sizes(align_corners: bool) -> None:
    """Any channels, sizes and ratios: values and gradients."""
    generator = torch.Generator().manual_seed(3)
    for trial in range(24):
        dtype, channels_last = (torch.float64, torch.float32)[trial % 2], trial % 4 > 1
        n, c, h, w, height, width = (
            int(torch.randint(1, most, (), generator=generator)) for most in (4, 70, 20, 40, 40, 40)
        )
        shapes = ((n, c, h, w), (n, c, height, width))
        x, skip = images(*shapes, dtype=dtype, channels_last=channels_last)
        leaves = [t.requires_grad_() for t in (x, skip)]
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        with backend("cpu"):
            output = upsample_add(*leaves, align_corners=align_corners)
        expected = exact(*doubles, align_corners, dtype)
        assert relative_error(output.detach(), expected.detach()) <= tolerance(dtype), shapes
        cotangent = torch.randn_like(output)
        gradients = torch.autograd.grad(output, leaves, cotangent)
        exact_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
        for gradient, other in zip(gradients, exact_gradients, strict=True):
            assert relative_error(gradient, other) <= tolerance(dtype, reduction=1600), shapes


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_stores_write_the_same_bits(
    isa: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """The output of all images bypasses the caches, that of one does not."""
    batch = 3
    x, skip = images(
        (batch, 32, 16, 32), (batch, 32, 32, 64), dtype=dtype, channels_last=channels_last
    )
    with backend("cpu"), streaming_from(skip.nbytes):
        whole = upsample_add(x, skip)
        for i in range(batch):
            assert torch.equal(whole[i], upsample_add(x[i : i + 1], skip[i : i + 1])[0])


def test_narrow_dtypes_are_rounded_once() -> None:
    """The upsampled value keeps its digits until the sum."""
    for dtype in (torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        x = torch.tensor([1.0, 1.0 + eps], dtype=dtype).reshape(1, 1, 1, 2)
        skip = torch.full((1, 1, 1, 4), -1.0, dtype=dtype)
        expected = torch.tensor([0.0, 0.25 * eps, 0.75 * eps, eps], dtype=dtype)
        with backend("cpu"):
            assert torch.equal(upsample_add(x, skip).flatten(), expected)


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@every_dtype
def test_any_strides(dtype: torch.dtype, channels_last: bool) -> None:
    """Sliced, transposed, expanded and mixed inputs equal their dense copies."""
    a, b = images((2, 40, 12, 16), (4, 80, 24, 28), dtype=dtype, channels_last=channels_last)
    other = torch.contiguous_format if channels_last else torch.channels_last
    variants = {
        "sliced": (a[:, 3:23, 4:12, ::2], b[::2, 1:41:2, 2:23, 3:20]),
        "transposed": (a.transpose(2, 3), b[:2, 40:].transpose(2, 3)),
        "expanded": (a[:, :1].expand(-1, 7, -1, -1), b[:1, :1, :, :1].expand(2, 7, -1, 20)),
        "mixed layouts": (a, b[:2, :40].contiguous(memory_format=other)),
        "rows apart": (a[:, :, ::2], b[:2, :40, :6, :16]),  # of the same size
    }
    for name, (x, skip) in variants.items():
        with backend("cpu"):
            result = upsample_add(x, skip)
            dense = upsample_add(x.contiguous(), skip.contiguous())
        assert relative_error(result, dense) <= tolerance(dtype), name


@pytest.mark.walks_memory
@both_layouts
def test_gradients_of_any_strides(channels_last: bool) -> None:
    """grad_output may be expanded, sliced or in the other layout."""
    x, skip = images((2, 20, 6, 8), (2, 20, 12, 16), channels_last=channels_last)
    leaves = [x.requires_grad_(), skip.requires_grad_()]
    output = upsample_add(*leaves)
    dense = torch.randn(2, 20, 12, 16)
    for cotangent in (
        torch.ones(()).expand_as(output),
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        torch.randn(2, 24, 12, 32)[:, 2:22, :, ::2],
    ):
        gradients = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        plain = cotangent.clone(memory_format=torch.contiguous_format)
        expected = torch.autograd.grad(output, leaves, plain, retain_graph=True)
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


def test_memory_format_is_that_of_x(any_backend: str) -> None:
    x, skip = images((2, 4, 4, 4), (2, 4, 8, 8))
    x_last, skip_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, skip))
    one_pixel = torch.randn(2, 4, 1, 1)
    for first, second, channels_last in (
        (x, skip_last, False),
        (x_last, skip, True),
        (one_pixel, skip_last, True),
        (one_pixel, skip, False),
    ):
        output = upsample_add(first, second)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.walks_memory
@both_layouts
def test_every_value_is_written(channels_last: bool) -> None:
    """With new memory filled with NaN, none is left in output or gradients."""
    torch.use_deterministic_algorithms(True)
    try:
        for x, skip in (((2, 70, 3, 4), (2, 70, 7, 9)), ((1, 3, 50, 40), (1, 3, 7, 5))):
            leaves = [t.requires_grad_() for t in images(x, skip, channels_last=channels_last)]
            assert torch.empty(3).isnan().all()
            output = upsample_add(*leaves)
            assert not output.isnan().any()
            for gradient in torch.autograd.grad(output.sum(), leaves):
                assert not gradient.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.walks_memory
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no images", "no channels"])
def test_empty_inputs(any_backend: str, shape: tuple[int, int]) -> None:
    leaves = [t.requires_grad_() for t in images((*shape, 2, 3), (*shape, 4, 7))]
    output = upsample_add(*leaves)
    assert output.shape == (*shape, 4, 7)
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (8, 9)], ids=["same", "up"])
def test_frozen_inputs(size: tuple[int, int]) -> None:
    """Only what is asked for is computed, and second derivatives are right too."""

    def derivatives(*wanted: int) -> list[Tensor]:
        torch.manual_seed(1)
        pair = images((2, 5, 4, 6), (2, 5, *size), dtype=torch.float64)
        leaves = [pair[i].requires_grad_() for i in wanted]
        first = torch.autograd.grad((upsample_add(*pair) ** 3).sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for wanted in ((0,), (1,), (0, 1)):
        fused = derivatives(*wanted)
        with backend("reference"):
            plain = derivatives(*wanted)
        for mine, theirs in zip(fused, plain, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_gradients_share_no_memory_with_each_other() -> None:
    """Leaves accumulate in place."""
    x, skip = (t.requires_grad_() for t in images((1, 3, 4, 4), (1, 3, 4, 4)))
    upsample_add(x, skip).sum().backward()
    assert x.grad is not None
    x.grad.zero_()
    assert torch.equal(skip.grad, torch.ones_like(skip))


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, dtype: torch.dtype, channels_last: bool
) -> None:
    x, skip = images((2, 35, 30, 26), (2, 35, 60, 52), dtype=dtype, channels_last=channels_last)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.detach().requires_grad_()
        output = upsample_add(leaf, skip)
        torch.manual_seed(1)
        results.append([output, *torch.autograd.grad(output, leaf, torch.randn_like(output))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- memory -------------------------------------------------------------------------------------


def test_nothing_is_kept_for_backward() -> None:
    x, skip = (t.requires_grad_() for t in images((1, 8, 8, 8), (1, 8, 16, 16)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = upsample_add(x, skip)
    assert not kept
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, skip, cotangent)
    assert gradient.data_ptr() == cotangent.data_ptr()  # passed on, not copied


@pytest.mark.slow
def test_more_than_2_to_the_31_values() -> None:
    (x,) = images((1, 2100, 1, 1), dtype=torch.bfloat16)
    output = upsample_add(x, torch.ones(1, 2100, 1024, 1024, dtype=torch.bfloat16))
    assert output.numel() > 2**31
    for channel in (0, 1047, 2099):
        assert (output[0, channel] == x[0, channel] + 1).all()


# ---- machinery ----------------------------------------------------------------------------------


def test_flop_formula() -> None:
    x, skip = images((2, 6, 4, 4), (2, 6, 8, 8))
    # x: 4 rows of 8 values, y: 8 rows of 8 values, a multiply-add per weight, 2 weights; and a sum
    interpolation = 2 * 6 * 4 * (4 * 8 + 8 * 8)
    with FlopCounterMode(display=False) as counter:
        upsample_add(x, skip)
    assert counter.get_total_flops() == interpolation + 2 * 6 * 64
    with FlopCounterMode(display=False) as counter:
        upsample_add(x.requires_grad_(), skip).sum().backward()
    assert counter.get_total_flops() == 2 * interpolation + 2 * 6 * 64
