"""The Triton kernels against the float64 oracle, on CPU tensors under Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from inputs import both_corners, fast_and_slow, integers
from torch import Tensor
from triton_interpreter import INTERPRETING, interpreted

from fastfuse.ops.bilinear import axis_table, interpolate_exactly
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("poisoned", "unsplit")

if INTERPRETING:
    import triton
    import triton.language as tl
    from sampling_kernel import sampling_kernel

    from fastfuse.ops.bilinear_triton import target_range, weight_of
    from fastfuse.ops.upsample_equalize_concat import triton as kernels

    @triton.jit
    def adjoint_kernel(
        first_out, last_out, weight_out, in_size, out_size,
        ALIGN_CORNERS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    ):  # fmt: skip
        DTYPE: tl.constexpr = weight_out.dtype.element_ty
        source = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        mask = source < in_size
        first, last = target_range(source, in_size, out_size, ALIGN_CORNERS, DTYPE)
        tl.store(first_out + source, first, mask=mask)
        tl.store(last_out + source, last, mask=mask)
        target = tl.arange(0, BLOCK_OUT)[None, :]
        source = source[:, None]
        weight = weight_of(target, source, in_size, out_size, ALIGN_CORNERS, DTYPE)
        mask = (source < in_size) & (target < out_size)
        tl.store(weight_out + source * out_size + target, weight, mask=mask)


SIZES = [(1, 1), (1, 7), (7, 1), (2, 4), (4, 2), (7, 7), (3, 17), (17, 3), (31, 97), (97, 31),
         (32, 128), (333, 1000), (6, 512), (512, 6)]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# The target's height and width, and (channels, height, width) of every level.
CASES = {
    "up": ((16, 8), [(16, 16, 8), (8, 8, 4), (5, 2, 1)]),
    "down": ((4, 4), [(8, 8, 8), (4, 12, 10)]),
    "primes": ((7, 11), [(5, 5, 3), (3, 7, 11), (4, 11, 7)]),
    "one axis": ((12, 9), [(4, 12, 5), (4, 6, 9)]),
    "one pixel": ((5, 40), [(4, 1, 1), (2, 5, 40)]),
    "to one pixel": ((1, 1), [(4, 1, 1), (3, 5, 6)]),
    "one channel, many pixels": ((3, 100), [(1, 2, 33)]),
    "many channels": ((4, 4), [(48, 4, 4), (70, 2, 2)]),
}
LAYOUTS = ["contiguous", "channels_last", "sliced"]
# Every case and every dtype with both corners, layouts in turn.
FAST = [
    (case, torch.float32, LAYOUTS[(i + corners) % 3], bool(corners))
    for i, case in enumerate(CASES)
    for corners in range(2)
] + [
    (("up", "primes")[i], dtype, LAYOUTS[(i + j) % 3], bool(i))
    for j, dtype in enumerate(DTYPES[1:])
    for i in range(2)
]
# float16 and float64 differ from the others by loads, stores and the accumulator only.
ALL = [
    values
    for values in product(CASES, DTYPES, LAYOUTS, (False, True))
    if values[0] in ("up", "primes") or values[1] in (torch.float32, torch.bfloat16)
]


def _id(value: object) -> str:
    named = {False: "half", True: "corners"}.get(value, str(value))
    return named.removeprefix("torch.").replace(" ", "_")


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=_id)
every_case = fast_and_slow("case dtype layout align_corners", FAST, ALL, ids=_id)


def _image(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "sliced":
        n, c, h, w = shape
        return torch.randn(n, c + 3, h + 2, 2 * w).to(dtype)[:, 1:-2, 2:, ::2]
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _constants(levels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(levels), torch.rand(levels) + 0.5


def _assert_close(result: Tensor, expected: Tensor, reduction: float = 1.0) -> None:
    error, limit = relative_error(result, expected), tolerance(result.dtype, reduction=reduction)
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=_id)
@both_corners
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s[0]}-{s[1]}")
def test_sampling_rule(sizes: tuple[int, int], align_corners: bool, dtype: torch.dtype) -> None:
    in_size, out_size = sizes
    lower, upper = torch.empty(2, out_size, dtype=torch.int32)
    weight = torch.empty(out_size, dtype=dtype)
    sampling_kernel[(triton.cdiv(out_size, 256),)](
        lower, upper, weight, in_size, out_size, align_corners, 256
    )
    expected = axis_table(in_size, out_size, align_corners=align_corners, dtype=dtype)
    assert torch.equal(lower.long(), expected[0])
    assert torch.equal(upper.long(), expected[1])
    assert torch.equal(weight.double(), expected[2])


@interpreted
@both_corners
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s[0]}-{s[1]}")
def test_adjoint_of_the_sampling_rule(sizes: tuple[int, int], align_corners: bool) -> None:
    """Every reader lies in the range, few others do, and its weight is the forward's."""
    in_size, out_size = sizes
    lower, upper, weight = axis_table(in_size, out_size, align_corners=align_corners)
    dense = torch.zeros(in_size, out_size, dtype=torch.float64)
    target = torch.arange(out_size)
    dense.index_put_((lower, target), 1 - weight, accumulate=True)
    dense.index_put_((upper, target), weight, accumulate=True)

    first, last = torch.empty(2, in_size, dtype=torch.int32)
    result = torch.empty(in_size, out_size)
    adjoint_kernel[(triton.cdiv(in_size, 16),)](
        first, last, result, in_size, out_size, align_corners, 16,
        triton.next_power_of_2(out_size),
    )  # fmt: skip
    assert torch.allclose(result.double(), dense, rtol=0, atol=2**-24)
    inside = (target >= first[:, None]) & (target <= last[:, None])
    assert not (dense > 0)[~inside].any()
    readers = (dense > 0).sum(1)
    assert ((last - first + 1).clamp(min=0) <= readers + 2).all()


@interpreted
@every_case
def test_forward(case: str, dtype: torch.dtype, layout: str, align_corners: bool) -> None:
    size, levels = CASES[case]
    features = [_image((2, *shape), dtype, layout) for shape in levels]
    mean, std = _constants(len(levels))
    channels_last = layout == "channels_last"
    result = kernels.forward(features, *size, mean, std, align_corners, channels_last)
    expected = torch.cat(
        [
            (interpolate_exactly(f, size, align_corners=align_corners) - m) / s
            for f, m, s in zip(features, mean.double(), std.double(), strict=True)
        ],
        dim=1,
    )
    _assert_close(result, expected)
    assert result.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@interpreted
@every_case
def test_backward(case: str, dtype: torch.dtype, layout: str, align_corners: bool) -> None:
    size, levels = CASES[case]
    channels, heights, widths = (list(values) for values in zip(*levels, strict=True))
    offsets = [sum(channels[:i]) for i in range(len(levels))]
    grad_output = _image((2, sum(channels), *size), dtype, layout)
    _, std = _constants(len(levels))
    channels_last = layout == "channels_last"
    results = kernels.backward(
        grad_output, offsets, channels, heights, widths, std, align_corners, channels_last
    )
    slices = grad_output.double().split(channels, dim=1)
    for result, shape, grad, s in zip(results, levels, slices, std.double(), strict=True):
        x = torch.zeros(2, *shape, dtype=torch.float64, requires_grad=True)
        interpolate_exactly(x, size, align_corners=align_corners, coordinates=dtype).backward(grad)
        reduction = max(size[0] * size[1] / (shape[1] * shape[2]), 1)
        _assert_close(result, x.grad / s, reduction)
        assert result.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )


@interpreted
@fast_and_slow(
    "dtype layout parts",
    [(dtype, LAYOUTS[i % 3], (3, 7)[i % 2]) for i, dtype in enumerate(DTYPES)],
    product(DTYPES, LAYOUTS, (3, 7)),
    ids=_id,
)
def test_backward_of_split_rows(
    dtype: torch.dtype, layout: str, parts: int, monkeypatch: pytest.MonkeyPatch, plans_anew: None
) -> None:
    """Of pooled levels, and of one that is not smaller."""
    monkeypatch.setattr(kernels, "splits_of", lambda programs, rows: min(parts, rows))
    heights, channels, offsets = [1, 2, 3, 6, 14], [5, 3, 4, 2, 3], [0, 5, 8, 12, 14]
    grad_output = _image((2, 17, 12, 10), dtype, layout)
    std = _constants(5)[1]
    results = kernels.backward(
        grad_output, offsets, channels, heights, heights, std, False, layout == "channels_last"
    )
    slices = grad_output.double().split(channels, dim=1)
    for result, grad, s in zip(results, slices, std.double(), strict=True):
        x = torch.zeros(result.shape, dtype=torch.float64, requires_grad=True)
        interpolate_exactly(x, (12, 10), coordinates=dtype).backward(grad)
        _assert_close(result, x.grad / s, max(120 / result.shape[2] ** 2, 1))


@interpreted
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@every_dtype
def test_equal_sizes_are_exact(dtype: torch.dtype, channels_last: bool) -> None:
    features = [_image((2, c, 7, 5), dtype, "contiguous") for c in (3, 16)]
    result = kernels.forward(features, 7, 5, None, None, False, channels_last)
    assert torch.equal(result, torch.cat(features, dim=1))
    gradients = kernels.backward(
        result, [0, 3], [3, 16], [7, 7], [5, 5], None, False, channels_last
    )
    assert all(torch.equal(g, f) for g, f in zip(gradients, features, strict=True))


@interpreted
@every_dtype
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """At a ratio of 2 weights are quarters: results are rounded once, from sums that are exact."""
    features = [integers(2, 5, 6, 8, dtype=dtype), integers(2, 3, 3, 4, dtype=dtype)]
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])
    result = kernels.forward(features, 6, 8, mean, std, False, False)
    levels = [interpolate_exactly(f, (6, 8)) for f in features]
    expected = torch.cat(
        [(f - m) / s for f, m, s in zip(levels, mean.double(), std.double(), strict=True)], dim=1
    )
    assert torch.equal(result, expected.to(dtype))
    grad_output = integers(2, 3, 6, 8, dtype=dtype)
    (result,) = kernels.backward(grad_output, [0], [3], [3], [4], std[1:], False, False)
    x = torch.zeros(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    interpolate_exactly(x, (6, 8)).backward(grad_output.double())
    assert x.grad is not None
    assert torch.equal(result, (2 * x.grad).to(dtype))


@interpreted
def test_mixed_strides_and_constants() -> None:
    """Expanded and permuted inputs, mean without std, float64 constants, a strided std."""
    features = [
        torch.randn(1, 4, 3, 5).expand(2, 4, 3, 5),
        torch.randn(2, 1, 1, 1).expand(2, 3, 4, 4),
        torch.randn(6, 6, 2, 4).permute(2, 3, 1, 0),
    ]
    size = (8, 10)
    up = [interpolate_exactly(f, size) for f in features]
    mean = torch.randn(3, dtype=torch.float64)
    expected = torch.cat([u - m for u, m in zip(up, mean, strict=True)], dim=1)
    _assert_close(kernels.forward(features, *size, mean, None, False, False), expected)
    std = (torch.rand(6) + 0.5)[::2]
    expected = torch.cat([u / s for u, s in zip(up, std.double(), strict=True)], dim=1)
    _assert_close(kernels.forward(features, *size, None, std, False, True), expected)


@interpreted
def test_some_levels_of_a_gradient() -> None:
    """Only the levels asked for, from an expanded gradient as sum().backward() makes it."""
    grad_output = torch.ones(()).expand(2, 9, 6, 6)
    (result,) = kernels.backward(grad_output, [4], [3], [3], [3], None, False, False)
    assert torch.equal(result, torch.full((2, 3, 3, 3), 4.0))


@interpreted
def test_nothing_to_do() -> None:
    empty = torch.empty
    assert kernels.forward([empty(0, 3, 2, 2)], 4, 4, None, None, False, True).shape == (0, 3, 4, 4)
    features = [empty(2, 0, 2, 2), torch.ones(2, 3, 2, 2)]
    result = kernels.forward(features, 4, 4, None, None, False, False)
    assert torch.equal(result, torch.ones(2, 3, 4, 4))
    gradients = kernels.backward(result, [0, 0], [0, 3], [2, 2], [2, 2], None, False, False)
    assert [g.shape for g in gradients] == [(2, 0, 2, 2), (2, 3, 2, 2)]
    (gradient,) = kernels.backward(empty(0, 3, 4, 4), [0], [3], [2], [2], None, False, False)
    assert gradient.shape == (0, 3, 2, 2)
