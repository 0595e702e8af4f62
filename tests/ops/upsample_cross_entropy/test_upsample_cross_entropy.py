"""upsample_cross_entropy: values, gradients, values that are not finite, inputs, determinism,
memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import ISAS, both_corners, both_layouts, every_dtype, images, wide
from logits import strided, zero_times_infinity
from memory import peak_of, reads_proc
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, upsample_cross_entropy
from fastfuse.backends import DTYPES
from fastfuse.ops.bilinear import axis_table, interpolate_exactly
from fastfuse.ops.policy import use_isa
from fastfuse.tolerances import tolerance

OP = "upsample_cross_entropy"
INF, NAN = math.inf, math.nan
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def targets(shape: tuple[int, ...], classes: int, ignored: int | None = None) -> Tensor:
    """A quarter is ignored."""
    target = torch.randint(classes, shape)
    return target if ignored is None else target.masked_fill(torch.rand(shape) < 0.25, ignored)


def exact(
    logits: Tensor,
    target: Tensor,
    *,
    coordinates: torch.dtype,
    align_corners: bool = False,
    weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """By PyTorch in float64, at the coordinates of a dtype."""
    up = interpolate_exactly(
        logits.double(),
        (target.shape[1], target.shape[2]),
        align_corners=align_corners,
        coordinates=coordinates,
    )
    return F.cross_entropy(up, target, None if weight is None else weight.double(), **options)


def with_gradient(
    call: Callable[..., Tensor], logits: Tensor, *args: Any, cotangent: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = call(leaf, *args, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, cotangent.to(loss.dtype))[0]


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    """Loss and gradient, of random cotangents if nothing is reduced."""
    dtype, classes = logits.dtype, logits.shape[1]
    reduced = options.get("reduction", "mean") != "none"
    cotangent = torch.ones(()) if reduced else torch.randn(target.shape)
    loss, gradient = with_gradient(
        upsample_cross_entropy, logits, target, cotangent=cotangent, **options
    )
    expected, slopes = with_gradient(
        exact, logits.double(), target, cotangent=cotangent, coordinates=dtype, **options
    )
    assert loss.dtype == wide(dtype)
    assert (gradient.dtype, gradient.shape) == (dtype, logits.shape)
    # Values are rounded relative to the largest logit.
    magnitude = max(logits.double().abs().max().item(), 1.0)
    pixels = target.numel() if options.get("reduction") == "sum" else 1
    error = 4 * tolerance(wide(dtype)) * magnitude * pixels
    torch.testing.assert_close(loss.double(), expected, rtol=error / pixels, atol=error)
    ratio = max(target[0].numel() / logits[0, 0].numel(), 1)
    precision = 4 * magnitude * tolerance(wide(dtype), reduction=classes * ratio)
    # Relative to the largest gradient, but that is a difference, of terms as large as these.
    terms = cotangent.abs().max().item() * ratio
    if options.get("reduction", "mean") == "mean":
        terms /= (target != options["ignore_index"]).sum().item()
    limit = (precision + tolerance(dtype)) * slopes.abs().max().item() + precision * terms
    assert (gradient.double() - slopes).abs().max() <= limit


# ---- values -------------------------------------------------------------------------------------


@both_corners
@every_reduction
@pytest.mark.parametrize("ignored", [-100, 2, -(2**63)])
def test_is_what_a_user_would_write(
    any_backend: str, ignored: int, reduction: str, align_corners: bool
) -> None:
    """Argument for argument; an ignored class is still one of those that are smoothed over."""
    weights = (None, torch.tensor([0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 0.1]).double())
    (x,) = images((2, 7, 4, 5), dtype=torch.float64)
    for size in ((9, 11), (4, 5), (2, 3)):
        target = targets((2, *size), 7, ignored)
        cotangent = torch.randn(2, *size) if reduction == "none" else torch.ones(())
        for smoothing in (0, 0.1, 1):
            for weight in weights:
                options: Any = {
                    "ignore_index": ignored,
                    "label_smoothing": smoothing,
                    "reduction": reduction,
                    "weight": weight,
                }

                def plain(x: Tensor, target: Tensor, **options: Any) -> Tensor:
                    up = F.interpolate(
                        x, target.shape[1:], mode="bilinear", align_corners=align_corners
                    )
                    return F.cross_entropy(up, target, **options)

                mine = with_gradient(
                    upsample_cross_entropy, x, target, cotangent=cotangent,
                    align_corners=align_corners, **options,
                )  # fmt: skip
                theirs = with_gradient(plain, x, target, cotangent=cotangent, **options)
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.walks_memory
@settings(max_examples=80, deadline=None)
@given(
    classes=st.one_of(st.integers(1, 40), st.integers(1, 1000)),
    source=st.tuples(st.integers(1, 7), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 30)),
    batch=st.integers(1, 3),
    align_corners=st.booleans(),
    layout=st.sampled_from(["nchw", "nhwc", "sliced", "sliced nhwc", "transposed", "expanded"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    scale=st.sampled_from([1e-6, 1.0, 20.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
)
@backend("cpu")
def test_any_logits(
    classes: int,
    source: tuple[int, int],
    size: tuple[int, int],
    batch: int,
    align_corners: bool,
    layout: str,
    dtype: torch.dtype,
    isa: str,
    scale: float,
    reduction: str,
    smoothing: float,
    weighted: bool,
) -> None:
    """Random classes, sizes, ratios, strides, magnitudes, options and instruction sets."""
    x = strided((batch, classes, *source), layout, dtype, scale)
    target = targets((batch, *size), classes, 255 if classes < 255 else -1)
    target[0, 0, 0] = 0  # one counts
    options: dict[str, Any] = {"ignore_index": 255 if classes < 255 else -1}
    if weighted:
        options["weight"] = (torch.rand(classes) + 0.5).to(wide(dtype))
    with use_isa(isa):
        check(
            x, target, align_corners=align_corners, reduction=reduction,
            label_smoothing=smoothing, **options,
        )  # fmt: skip


@every_reduction
def test_one_class_costs_nothing(any_backend: str, reduction: str) -> None:
    x = torch.randn(2, 1, 3, 4, requires_grad=True)
    target = targets((2, 7, 9), 1, -100)
    for smoothing in (0.0, 0.3):
        loss = upsample_cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_counts(any_backend: str, weighted: bool, smoothing: float) -> None:
    """The mean is nan, the sum 0, whether all pixels are ignored or all weigh nothing."""
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    ignored = torch.full((2, 6, 9), 255)
    weight = torch.zeros(5) if weighted else None
    options: Any = {"weight": weight, "label_smoothing": smoothing, "ignore_index": 255}
    for target in [ignored, *([ignored % 5] if weighted else [])]:
        assert upsample_cross_entropy(x, target, **options).isnan()
        for reduction in ("sum", "none"):
            loss = upsample_cross_entropy(x, target, reduction=reduction, **options)
            assert not loss.any()
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert not gradient.any()


def test_the_gradient_of_a_mean_of_nothing(any_backend: str) -> None:
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    upsample_cross_entropy(x, torch.full((2, 6, 9), -100)).backward()
    assert not x.grad.any() or x.grad.isnan().all()


@both_layouts
def test_ignored_images(any_backend: str, channels_last: bool) -> None:
    """An image all of which is ignored changes nothing, and gets no gradient."""
    (x,) = images((3, 19, 4, 5), channels_last=channels_last)
    target = targets((3, 9, 10), 19, -100)
    target[1] = -100
    one = torch.ones(())
    for smoothing in (0.0, 0.1):
        options: Any = {"cotangent": one, "label_smoothing": smoothing}
        loss, gradient = with_gradient(upsample_cross_entropy, x, target, **options)
        others, slopes = with_gradient(upsample_cross_entropy, x[::2], target[::2], **options)
        torch.testing.assert_close(loss, others)
        assert not gradient[1].any()
        torch.testing.assert_close(gradient[::2], slopes)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2])
def test_weights_of_another_dtype(any_backend: str, dtype: torch.dtype) -> None:
    """They are taken to the accumulation dtype, whose values of eighths are exact."""
    weight = torch.tensor([0.0, 0.125, 1.0, 2.0, 0.5])
    for logits_dtype in DTYPES:
        (x,) = images((1, 5, 3, 4), dtype=logits_dtype)
        target = targets((1, 7, 5), 5)
        loss = upsample_cross_entropy(x, target, weight=weight.to(dtype), label_smoothing=0.1)
        expected = upsample_cross_entropy(
            x, target, weight=weight.to(wide(logits_dtype)), label_smoothing=0.1
        )
        assert torch.equal(loss, expected)


def test_weights_of_any_strides(any_backend: str) -> None:
    x, target = torch.randn(1, 9, 3, 4), targets((1, 7, 5), 9)
    for weight in (torch.rand(27)[1::3], torch.rand(()).expand(9), torch.rand(9).flip(0)):
        loss = upsample_cross_entropy(x, target, weight=weight)
        torch.testing.assert_close(loss, upsample_cross_entropy(x, target, weight=weight.clone()))


def test_a_numpy_like_number_is_a_smoothing(any_backend: str) -> None:
    from fractions import Fraction

    x, target = torch.randn(1, 9, 3, 4), targets((1, 7, 5), 9)
    expected = upsample_cross_entropy(x, target, label_smoothing=0.25)
    assert torch.equal(upsample_cross_entropy(x, target, label_smoothing=Fraction(1, 4)), expected)


# ---- large values, and values that are not finite -----------------------------------------------


@both_layouts
@pytest.mark.parametrize("magnitude", [1e29, 1e30, 1.1e30, 1e36, 1e38])
def test_huge_values(isa: str, magnitude: float, channels_last: bool) -> None:
    """Each class far above the next: losses are differences, probabilities 0 and 1."""
    for classes in (2, 5, 16, 19):
        levels = torch.linspace(-1, 1, classes)[torch.randperm(classes), None, None]
        x = (levels + (torch.rand(classes, 3, 4) - 0.5) / (2 * classes)).mul(magnitude)[None]
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        target, ones = targets((1, 7, 9), classes), torch.ones(1, 7, 9)
        with backend("cpu"):
            loss, gradient = with_gradient(
                upsample_cross_entropy, x, target, cotangent=ones, reduction="none"
            )
        expected, slopes = with_gradient(
            exact, x.double(), target, cotangent=ones, reduction="none", coordinates=x.dtype
        )
        assert (loss.double() - expected).abs().max() <= 2e-6 * magnitude
        torch.testing.assert_close(gradient.double(), slopes, rtol=1e-5, atol=1e-5)


def test_the_difference_of_huge_values_is_infinite(any_backend: str) -> None:
    """As in PyTorch: 6e38 is too much for float32."""
    x = torch.tensor([3e38, -3e38]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    target = torch.tensor([[[0, 1], [1, 0]]])
    loss, gradient = with_gradient(
        upsample_cross_entropy, x, target, cotangent=torch.ones(1, 2, 2), reduction="none"
    )
    assert torch.equal(loss, torch.tensor([[[0, INF], [INF, 0]]]))
    assert torch.equal(gradient[0, 0], target[0].float())


@pytest.mark.parametrize(
    ("value", "smoothing"),
    [
        *((value, 0.0) for value in (1e2, 1e4, 1e6, 1e8, 1e30)),
        (1e8, 0.1),
        (1e38, 1.0),
    ],
)
def test_equal_logits_however_large(value: float, smoothing: float) -> None:
    """As many as classes are equally probable, and the loss is log(C): exactly interpolated here,
    and what PyTorch computes."""
    x, target = torch.full((1, 8, 2, 2), value), targets((1, 4, 4), 8)
    with backend("cpu"):
        loss, gradient = with_gradient(
            upsample_cross_entropy, x, target, cotangent=torch.ones(()), label_smoothing=smoothing
        )
    torch.testing.assert_close(loss.item(), math.log(8), rtol=1e-5, atol=0)
    assert gradient.sum(1).abs().max() <= 1e-5
    _, slopes = with_gradient(
        exact,
        x.double(),
        target,
        cotangent=torch.ones(()),
        label_smoothing=smoothing,
        coordinates=x.dtype,
    )
    torch.testing.assert_close(gradient.double(), slopes, rtol=1e-4, atol=1e-6)


def test_float16_that_overflows(any_backend: str) -> None:
    """Losses beyond its range are float32; a gradient beyond it is infinite, as PyTorch's."""
    (x,) = images((1, 8, 2, 2), dtype=torch.float16)
    x = (x.sign() * 65504).to(torch.float16)
    target = targets((1, 8, 8), 8)
    loss, gradient = with_gradient(
        upsample_cross_entropy, x, target, cotangent=torch.ones(()), reduction="sum"
    )
    assert loss.isfinite()
    assert loss > 65504
    torch.testing.assert_close(
        loss.double(), exact(x, target, reduction="sum", coordinates=x.dtype), rtol=1e-4, atol=1e-4
    )
    assert gradient.isfinite().all()
    _, gradient = with_gradient(
        upsample_cross_entropy, x, target, cotangent=torch.tensor(1e6), reduction="sum"
    )
    assert gradient.isinf().any()
    assert not gradient.isnan().any()


def as_pytorch(x: Tensor, target: Tensor, **options: Any) -> None:
    found = []
    for name in ("cpu", "reference"):
        with backend(name):
            torch.manual_seed(2)
            cotangent = torch.rand(target.shape) + 0.5
            found.append(
                with_gradient(
                    upsample_cross_entropy, x, target, cotangent=cotangent, reduction="none",
                    **options,
                )
            )  # fmt: skip
    (loss, gradient), (expected, slopes) = found
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    # PyTorch adds 0 times a pixel's gradient to a row whose weight is 0; that row does not count.
    lower, upper, weight = axis_table(
        x.shape[2], target.shape[1], align_corners=options["align_corners"]
    )
    if ((lower < upper) & (weight == 0)).any():
        gradient = gradient.where(slopes.isfinite(), slopes)
    torch.testing.assert_close(gradient, slopes, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.walks_memory
@settings(max_examples=80, deadline=None)
@given(
    classes=st.integers(1, 40),
    source=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 30)),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    isa=st.sampled_from(ISAS),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    values=st.lists(
        st.tuples(st.sampled_from([INF, -INF, NAN]), st.integers(0, 10**6)), min_size=1, max_size=6
    ),
)
@backend("cpu")
def test_nan_and_infinity_anywhere(
    classes: int,
    source: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
    channels_last: bool,
    isa: str,
    smoothing: float,
    weighted: bool,
    values: list[tuple[float, int]],
) -> None:
    """Losses and gradients are infinite and NaN where PyTorch's are, the others right."""
    assume(source[1] != size[1])  # which has tests of its own, as have infinities times 0
    (x,) = images((2, classes, *source), channels_last=channels_last)
    exactly = any(
        zero_times_infinity(*sizes, align_corners) for sizes in zip(source, size, strict=True)
    )
    for value, where in values:
        if exactly and not math.isfinite(value):
            continue
        n, rest = where % 2, where // 2
        x[n, rest % classes, rest % source[0], rest % source[1]] = value
    weight = torch.rand(classes) + 0.1 if weighted else None
    target = targets((2, *size), classes)
    with use_isa(isa):
        as_pytorch(x, target, align_corners=align_corners, label_smoothing=smoothing, weight=weight)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("size", [(4, 5), (9, 5)], ids=["one size", "one width"])
def test_of_one_width_neighbours_stay_apart(size: tuple[int, int], value: float) -> None:
    x = torch.randn(1, 11, 4, 5)
    x[0, 3, 2, 3] = value
    target = targets((1, *size), 11)
    with backend("cpu"):
        loss = upsample_cross_entropy(x, target, reduction="none")
    clean = exact(x.nan_to_num(0, 0, 0), target, reduction="none", coordinates=x.dtype)
    torch.testing.assert_close(loss[..., :3].double(), clean[..., :3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("height", [3, 6])
def test_of_one_width_an_infinite_cotangent_stays_apart(height: int) -> None:
    x, target = torch.randn(1, 4, 3, 5), targets((1, height, 5), 4)
    cotangent = torch.zeros(1, height, 5)
    cotangent[0, 1, 2] = INF
    with backend("cpu"):
        _, gradient = with_gradient(
            upsample_cross_entropy, x, target, cotangent=cotangent, reduction="none"
        )
    assert not gradient[..., [0, 1, 3, 4]].any()


def test_infinity_on_the_last_row() -> None:
    x = torch.zeros(1, 3, 4, 4)
    x[0, 1, -1] = -INF
    with backend("cpu"):
        as_pytorch(x, torch.zeros(1, 8, 9, dtype=torch.int64), align_corners=True)


@pytest.mark.parametrize("why", ["weight", "cotangent"])
def test_nothing_times_nan(why: str) -> None:
    x, target = torch.randn(1, 5, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    x[0, 3] = NAN
    weight = torch.tensor([0.0 if why == "weight" else 1.0, 1, 1, 1, 1])
    cotangent = torch.full((1, 4, 4), 1.0 if why == "weight" else 0.0)
    with backend("cpu"):
        loss, gradient = with_gradient(
            upsample_cross_entropy, x, target, cotangent=cotangent, reduction="none", weight=weight
        )
    assert loss.isnan().all()
    assert gradient.isnan().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_ignored_pixels_are_not_read(isa: str, value: float) -> None:
    """Whatever their logits: loss 0, no gradient. (PyTorch's gradient is 0 * NaN.)"""
    x = torch.randn(2, 9, 4, 4)
    x[1] = value
    target = targets((2, 8, 8), 9)
    target[1] = -100
    for smoothing in (0.0, 0.1):
        with backend("cpu"):
            loss, gradient = with_gradient(
                upsample_cross_entropy, x, target, cotangent=torch.ones(()),
                label_smoothing=smoothing,
            )  # fmt: skip
        torch.testing.assert_close(
            loss.double(),
            exact(x[:1], target[:1], label_smoothing=smoothing, coordinates=x.dtype),
            rtol=1e-5,
            atol=1e-5,
        )
        assert not gradient[1].any()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("mask", [-1e4, -1e30, -3e38])
def test_masked_classes(any_backend: str, mask: float) -> None:
    """Classes that are as good as -inf everywhere: the loss of the others."""
    x = torch.randn(2, 20, 4, 6)
    masked = x.clone()
    masked[:, 5:] = mask
    for size in ((9, 13), (3, 4), (4, 6)):
        target = targets((2, *size), 5, -100)
        loss, gradient = with_gradient(
            upsample_cross_entropy, masked, target, cotangent=torch.ones(())
        )
        expected, slopes = with_gradient(
            upsample_cross_entropy, x[:, :5], target, cotangent=torch.ones(())
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient[:, :5], slopes, rtol=1e-5, atol=1e-7)
        assert gradient[:, 5:].abs().max() <= 1e-30


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.walks_memory
@every_dtype
@pytest.mark.parametrize("layout", ["sliced", "sliced nhwc", "transposed", "expanded"])
def test_any_strides(isa: str, layout: str, dtype: torch.dtype) -> None:
    """To the bit those of dense copies of either layout."""
    with backend("cpu"):
        for shape in ((2, 20, 6, 9), (1, 3, 1, 17), (3, 1, 5, 1)):
            x = strided(shape, layout, dtype)
            target = targets((shape[0], 11, 19), shape[1], -100)
            results = [
                with_gradient(
                    upsample_cross_entropy, t, target, cotangent=torch.ones(()), label_smoothing=0.1
                )
                for t in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last))
            ]
            for loss, gradient in results[1:]:
                assert torch.equal(loss, results[0][0])
                assert torch.equal(gradient, results[0][1])


@pytest.mark.walks_memory
def test_targets_of_any_strides(any_backend: str) -> None:
    x = torch.randn(2, 6, 3, 4)
    big = targets((4, 14, 20), 6, -100)
    for target in (
        big[::2, 1:12:2, 3:18:3],
        big[:2].transpose(1, 2),
        big[:1, :, :1].expand(2, -1, 9),
        big[0, 0, 0].clamp(0).expand(2, 7, 5),
        big.unflatten(0, (2, 2))[:, 1],
        big[:2].flip(2),
    ):
        assert torch.equal(
            *(
                with_gradient(upsample_cross_entropy, x, t, cotangent=torch.ones(()))[1]
                for t in (target, target.clone(memory_format=torch.contiguous_format))
            )
        )


@pytest.mark.walks_memory
@both_layouts
def test_cotangents_of_any_strides(any_backend: str, channels_last: bool) -> None:
    """Of reduction="none": expanded, sliced, transposed, of zeros."""
    (x,) = images((2, 9, 4, 5), channels_last=channels_last)
    leaf = x.requires_grad_()
    loss = upsample_cross_entropy(leaf, targets((2, 11, 11), 9, -100), reduction="none")
    for cotangent in (
        torch.ones(()).expand_as(loss),
        torch.randn(11).expand_as(loss),
        torch.randn(2, 1, 1).expand_as(loss),
        torch.randn(11, 1).expand_as(loss),
        torch.randn(2, 15, 33)[:, 3:14, ::3],
        torch.randn_like(loss).transpose(1, 2),
        torch.randn(11, 11, 2).permute(2, 0, 1),
        torch.zeros_like(loss),
    ):
        gradient, expected = (
            torch.autograd.grad(loss, leaf, c, retain_graph=True)[0]
            for c in (cotangent, cotangent.clone(memory_format=torch.contiguous_format))
        )
        assert torch.equal(gradient, expected)
        assert gradient.any() == cotangent.any()


def test_an_infinite_cotangent_stays_where_it_is(any_backend: str) -> None:
    """It reaches the source pixels that its pixel reads, and no others."""
    x, target = torch.randn(1, 9, 5, 6), targets((1, 10, 12), 9)
    cotangent = torch.rand(1, 10, 12)
    clean = with_gradient(upsample_cross_entropy, x, target, cotangent=cotangent, reduction="none")[
        1
    ]
    cotangent[0, 3, 4] = INF  # which lies between rows 1 and 2, columns 1 and 2
    _, gradient = with_gradient(
        upsample_cross_entropy, x, target, cotangent=cotangent, reduction="none"
    )
    assert not gradient[..., 1:3, 1:3].isfinite().any()
    gradient[..., 1:3, 1:3] = clean[..., 1:3, 1:3] = 0
    torch.testing.assert_close(gradient, clean)


@every_reduction
def test_no_images(any_backend: str, reduction: str) -> None:
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    target = torch.zeros(0, 7, 9, dtype=torch.int64)
    for weight in (None, torch.rand(3)):
        loss = upsample_cross_entropy(x, target, reduction=reduction, weight=weight)
        if reduction == "none":
            assert loss.shape == (0, 7, 9)
        else:
            assert loss.isnan() if reduction == "mean" else loss == 0
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.shape == x.shape


@both_layouts
def test_gradient_has_the_logits_layout(channels_last: bool) -> None:
    (x,) = images((2, 5, 3, 4), channels_last=channels_last)
    with backend("cpu"):
        _, gradient = with_gradient(
            upsample_cross_entropy, x, targets((2, 7, 9), 5), cotangent=torch.ones(())
        )
    assert gradient.stride() == x.stride()


def test_every_value_is_written(poisoned: None) -> None:
    """Losses, gradients, and what belongs to ignored pixels and images."""
    for shape, size in (((2, 70, 3, 4), (7, 9)), ((2, 3, 20, 40), (7, 5)), ((2, 1, 1, 1), (1, 33))):
        for channels_last in (False, True):
            (x,) = images(shape, channels_last=channels_last)
            target = targets((2, *size), shape[1], -100)
            for ignored in (target, target.index_fill(0, torch.tensor([0]), -100)):
                for smoothing in (0.0, 0.1):
                    loss, gradient = with_gradient(
                        upsample_cross_entropy, x, ignored, cotangent=torch.ones(2, *size),
                        reduction="none", label_smoothing=smoothing,
                    )  # fmt: skip
                    assert loss.isfinite().all()
                    assert gradient.isfinite().all()


def test_arguments_stay(any_backend: str) -> None:
    x, weight, target = torch.randn(2, 9, 3, 5), torch.rand(9), targets((2, 7, 9), 9, -100)
    before = [t.clone() for t in (x, weight, target)]
    with_gradient(upsample_cross_entropy, x, target, weight=weight, cotangent=torch.ones(()))
    for tensor, copy in zip((x, weight, target), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("changed", [0, 1])
def test_what_is_kept_for_backward_may_not_change(changed: int) -> None:
    x, target = torch.randn(1, 3, 4, 4), targets((1, 8, 8), 3)
    leaf = x.requires_grad_()
    arguments = leaf * 1, target
    with backend("cpu"):
        loss = upsample_cross_entropy(*arguments)
    with torch.no_grad():
        arguments[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _x(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 3, 4, 4))


def _t(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 5, 6), dtype=torch.int64)


def _call(**options: Any) -> Callable[[], Any]:
    logits, target = options.pop("logits", _x()), options.pop("target", _t())
    return lambda: upsample_cross_entropy(logits, target, **options)


BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "logits not a tensor": (_call(logits=3.0), TypeError, r"logits must be a tensor; got float"),
    "logits of rank 3": (
        _call(logits=_x(3, 4, 4)),
        ValueError,
        r"logits must have 4 dimensions \(N, C, H, W\); got shape \(3, 4, 4\)",
    ),
    "logits of integers": (
        _call(logits=_x().int()),
        ValueError,
        r"logits must be float64, float32, bfloat16 or float16; got int32",
    ),
    "sparse logits": (
        _call(logits=_x().to_sparse()),
        ValueError,
        r"logits must be a dense tensor; got layout torch.sparse_coo",
    ),
    "no class": (
        _call(logits=_x(2, 0, 4, 4)),
        ValueError,
        r"logits must have at least 1 class; got shape \(2, 0, 4, 4\)",
    ),
    "no width": (
        _call(logits=_x(2, 3, 4, 0)),
        ValueError,
        r"logits must be at least 1 pixel high and wide; got shape \(2, 3, 4, 0\)",
    ),
    "target not a tensor": (_call(target=[0]), TypeError, r"target must be a tensor; got list"),
    "target of rank 4": (
        _call(target=_t(2, 1, 5, 6)),
        ValueError,
        r"target must have shape \(N, H, W\) with N = 2; got shape \(2, 1, 5, 6\)",
    ),
    "target of another batch": (
        _call(target=_t(1, 5, 6)),
        ValueError,
        r"target must have shape \(N, H, W\) with N = 2; got shape \(1, 5, 6\)",
    ),
    "target without height": (
        _call(target=_t(2, 0, 6)),
        ValueError,
        r"target must be at least 1 pixel high and wide; got shape \(2, 0, 6\)",
    ),
    "target of int32": (_call(target=_t().int()), ValueError, r"target must be int64; got int32"),
    "target of bool": (_call(target=_t().bool()), ValueError, r"target must be int64; got bool"),
    "target of probabilities": (
        _call(target=_x(2, 5, 6)),
        ValueError,
        r"target must be int64; got float32",
    ),
    "sparse target": (
        _call(target=_t().to_sparse()),
        ValueError,
        r"target must be a dense tensor; got layout torch.sparse_coo",
    ),
    "target elsewhere": (
        _call(target=_t().to("meta")),
        ValueError,
        r"target must be on the logits' device cpu; got one on meta",
    ),
    "weight not a tensor": (
        _call(weight=[1.0, 1.0, 1.0]),
        TypeError,
        r"weight must be a tensor; got list",
    ),
    "weight too short": (
        _call(weight=_x(2)),
        ValueError,
        r"weight must have one value per class, shape \(3,\); got shape \(2,\)",
    ),
    "weight of rank 2": (
        _call(weight=_x(3, 1)),
        ValueError,
        r"weight must have one value per class, shape \(3,\); got shape \(3, 1\)",
    ),
    "weight of integers": (
        _call(weight=_t(3)),
        ValueError,
        r"weight must be a floating-point tensor; got int64",
    ),
    "sparse weight": (
        _call(weight=torch.ones(3).to_sparse()),
        ValueError,
        r"weight must be a dense tensor; got layout torch.sparse_coo",
    ),
    "weight elsewhere": (
        _call(weight=_x(3).to("meta")),
        ValueError,
        r"weight must be on the input's device cpu; got one on meta",
    ),
    "weight with a gradient": (
        _call(weight=_x(3).requires_grad_()),
        ValueError,
        r"weight must be constant; got a tensor that requires grad",
    ),
    "ignore_index not an int": (
        _call(ignore_index=1.5),
        TypeError,
        r"ignore_index must be an int; got float",
    ),
    "ignore_index none": (
        _call(ignore_index=None),
        TypeError,
        r"ignore_index must be an int; got NoneType",
    ),
    "ignore_index a bool": (
        _call(ignore_index=True),
        TypeError,
        r"ignore_index must be an int; got bool",
    ),
    "ignore_index too large": (
        _call(ignore_index=2**63),
        ValueError,
        r"ignore_index must be an int of 64 bits; got 9223372036854775808",
    ),
    "label_smoothing not a number": (
        _call(label_smoothing="0.1"),
        TypeError,
        r"label_smoothing must be a number; got str",
    ),
    "label_smoothing a tensor": (
        _call(label_smoothing=torch.tensor(0.1)),
        TypeError,
        r"label_smoothing must be a number; got Tensor",
    ),
    "label_smoothing negative": (
        _call(label_smoothing=-0.1),
        ValueError,
        r"label_smoothing must be in \[0, 1\]; got -0.1",
    ),
    "label_smoothing above 1": (
        _call(label_smoothing=1.5),
        ValueError,
        r"label_smoothing must be in \[0, 1\]; got 1.5",
    ),
    "label_smoothing nan": (
        _call(label_smoothing=NAN),
        ValueError,
        r"label_smoothing must be in \[0, 1\]; got nan",
    ),
    "reduction unknown": (
        _call(reduction="batchmean"),
        ValueError,
        r"reduction must be one of mean, sum, none; got 'batchmean'",
    ),
    "reduction none": (
        _call(reduction=None),
        ValueError,
        r"reduction must be one of mean, sum, none; got None",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(any_backend: str, case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith(f"{OP}: ")


@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wrong", [3, 255, -1, -101, 2**40, -(2**63), 2**63 - 1])
def test_target_out_of_range(
    any_backend: str, wrong: int, smoothing: float, reduction: str
) -> None:
    """Its first pixel is named, whichever thread meets it first, and its value."""
    target = targets((3, 33, 31), 3, -100)
    target[1, 29, 5] = target[2, 7, 7] = target[1, 29, 30] = wrong
    for weight in (None, torch.rand(3)):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with pytest.raises(RuntimeError) as raised:
                upsample_cross_entropy(
                    torch.randn(3, 3, 9, 9), target, weight=weight, label_smoothing=smoothing,
                    reduction=reduction,
                )  # fmt: skip
            assert str(raised.value) == (
                f"{OP}: target must be classes from 0 to 2 or ignore_index = -100; "
                f"got {wrong} at [1, 29, 5]"
            )


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("x", "target", "weight", "message"),
    [
        (_x().int(), _t(), None, "got Int"),
        (_x(3, 4, 4), _t(), None, "4 dimensions"),
        (_x(2, 0, 4, 4), _t(), None, "at least 1 class"),
        (_x(2, 3, 4, 0), _t(), None, "at least 1"),
        (_x(), _t(1, 5, 6), None, "target must be an int64 CPU tensor"),
        (_x(), _t().int(), None, "target must be an int64 CPU tensor"),
        (_x(), _t(2, 5), None, "target must be an int64 CPU tensor"),
        (_x(), _t(2, 0, 6), None, "at least 1"),
        (_x(), _t(), _x(2), "weight must be a CPU tensor"),
        (_x(), _t(), _x(3).double(), "weight must be a CPU tensor"),
        (_x(), _t(), _x(3, 1), "weight must be a CPU tensor"),
    ],
)
def test_the_ops_themselves_guard_memory(
    x: Tensor, target: Tensor, weight: Tensor | None, message: str
) -> None:
    """Called past the public function, they refuse instead of reading beyond their inputs."""
    ops = torch.ops.fastfuse
    options = -100, 0.0, False
    with pytest.raises(RuntimeError, match=message):
        ops.upsample_cross_entropy(x, target, weight, *options)
    if x.numel() == 0 or target.numel() == 0:  # nothing is read
        return
    grad = torch.zeros(target.shape)
    with pytest.raises(RuntimeError, match=message):
        ops.upsample_cross_entropy_backward(grad, x, target, weight, grad, *options, False)


@pytest.mark.walks_memory
def test_backward_itself_guards_memory() -> None:
    """Cotangents and log-sum-exps of another shape or dtype; targets out of range count for
    nothing, for they may have changed since."""
    op = torch.ops.fastfuse.upsample_cross_entropy_backward
    good, options = torch.ones(2, 5, 6), (-100, 0.0, False, False)
    for bad in (torch.ones(2, 6, 5), torch.ones(5, 6), good.double()):
        with pytest.raises(RuntimeError, match="grad must have target's shape"):
            op(bad, _x(), _t(), None, good, *options)
        with pytest.raises(RuntimeError, match="logsumexp must have target's shape"):
            op(good, _x(), _t(), None, bad, *options)
    assert not op(good, _x(), _t() + 2**40, None, good, *options).any()


# ---- derivatives --------------------------------------------------------------------------------


@both_layouts
@both_corners
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@backend("cpu")
def test_gradcheck(smoothing: float, align_corners: bool, channels_last: bool) -> None:
    weight = torch.tensor([0.0, 1.0, 0.3, 2.0, 0.7], dtype=torch.float64)
    for source, size in (((2, 3), (5, 7)), ((4, 5), (2, 3)), ((3, 4), (3, 4))):
        (x,) = images((2, 5, *source), dtype=torch.float64, channels_last=channels_last)
        target = targets((2, *size), 5, 2)
        for reduction in ("mean", "sum", "none"):

            def call(x: Tensor, target: Tensor = target, reduction: str = reduction) -> Tensor:
                return upsample_cross_entropy(
                    x, target, weight=weight, ignore_index=2, label_smoothing=smoothing,
                    reduction=reduction, align_corners=align_corners,
                )  # fmt: skip

            assert torch.autograd.gradcheck(call, (x.requires_grad_(),), fast_mode=True)


def test_second_derivatives_are_the_reference_backends() -> None:
    x, target = torch.randn(1, 3, 2, 2).double().requires_grad_(), targets((1, 4, 5), 3)
    with backend("cpu"):
        loss = upsample_cross_entropy(x, target)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(NotImplementedError, match=rf"{OP}: .*backend\('reference'\)"):
            torch.autograd.grad(gradient.sum(), x)
    with backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: upsample_cross_entropy(x, target), (x,))


def test_frozen_logits_get_no_gradient() -> None:
    with backend("cpu"):
        assert not upsample_cross_entropy(_x(), _t()).requires_grad


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.walks_memory
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """From run to run, of losses and gradients."""
    (x,) = images((3, 35, 13, 26), dtype=dtype, channels_last=channels_last)
    target = targets((3, 52, 41), 35, -100)
    cotangent = torch.randn(3, 52, 41)
    results = []
    for threads in (1, 2, 3, 5, 5):
        torch.set_num_threads(threads)
        with backend("cpu"):
            results.append(
                with_gradient(
                    upsample_cross_entropy, x, target, cotangent=cotangent, reduction="none",
                    label_smoothing=0.1,
                )
            )  # fmt: skip
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(2, 300, 301), (1, 100, 1000), (33, 40, 40), (1, 3, 12000)])
def test_reductions_too(shape: tuple[int, int, int], weighted: bool) -> None:
    """So many pixels that PyTorch's own sum of all depends on the number of threads."""
    x, target = torch.randn(shape[0], 5, 10, 10), targets(shape, 5, -100)
    weight = torch.rand(5) if weighted else None
    for reduction in ("mean", "sum"):
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with backend("cpu"):
                results.append(
                    with_gradient(
                        upsample_cross_entropy, x, target, cotangent=torch.ones(()),
                        weight=weight, reduction=reduction,
                    )
                )  # fmt: skip
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@both_layouts
@every_dtype
def test_a_batch_is_its_images(isa: str, dtype: torch.dtype, channels_last: bool) -> None:
    """To the bit, and if one has values that are not finite."""
    (x,) = images((3, 19, 5, 9), dtype=dtype, channels_last=channels_last)
    x[1, 3, 2, 2] = NAN
    target, cotangent = targets((3, 11, 13), 19, -100), torch.randn(3, 11, 13)
    with backend("cpu"):
        whole = with_gradient(
            upsample_cross_entropy, x, target, cotangent=cotangent, reduction="none"
        )
        for i in range(3):
            one = with_gradient(
                upsample_cross_entropy, x[i : i + 1], target[i : i + 1],
                cotangent=cotangent[i : i + 1], reduction="none",
            )  # fmt: skip
            for a, b in zip(whole, one, strict=True):
                torch.testing.assert_close(a[i : i + 1], b, rtol=0, atol=0, equal_nan=True)


# ---- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "upsampling"),
    [((3, 4), 0), ((3, 8), 4 * 3 * 8), ((6, 8), 4 * (3 * 8 + 6 * 8))],
    ids=["same", "along x", "both"],
)
def test_flops(size: tuple[int, int], upsampling: int) -> None:
    """The upsampling and 2 for each exponential; twice that in backward."""
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    expected = 2 * 5 * (upsampling + 2 * size[0] * size[1])
    with backend("cpu"):
        with FlopCounterMode(display=False) as counter:
            loss = upsample_cross_entropy(x, targets((2, *size), 5))
        assert counter.get_total_flops() == expected
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == 2 * expected


def test_two_numbers_a_pixel_at_most_are_kept_for_backward() -> None:
    x, target = torch.randn(1, 50, 8, 8, requires_grad=True), targets((1, 32, 32), 50)
    kept: list[Tensor] = []
    with (
        backend("cpu"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        upsample_cross_entropy(x, target)
    given = (x.data_ptr(), target.data_ptr())
    assert sum(t.numel() for t in kept if t.data_ptr() not in given) <= 2 * target.numel()


@reads_proc
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_upsampled_logits_are_never_stored(layout: str) -> None:
    """The gradient takes 10 MiB, as a copy of the logits may, and a number per pixel 1 or 2;
    upsampled logits would take 150."""
    before = f"""
x = torch.randn(1, 150, 128, 128).contiguous(memory_format=torch.{layout}).requires_grad_()
target, weight = torch.randint(150, (1, 512, 512)), torch.rand(150)
def step(x, target):
    with fastfuse.backend("cpu"):
        fastfuse.upsample_cross_entropy(x, target, weight=weight, label_smoothing=0.1).backward()
step(x.detach()[..., :8, :8].clone().requires_grad_(), target[:, :32, :32])
"""
    assert peak_of("step(x, target)", before=before) < 32 << 20
