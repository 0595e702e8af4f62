"""upsample_cross_entropy's Triton kernels against PyTorch in float64, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from inputs import STRIDES, fast_and_slow, of_strides
from torch import Tensor
from triton_interpreter import INTERPRETING, interpreted

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("poisoned")

if INTERPRETING:
    from fastfuse.ops.upsample_cross_entropy import triton as kernels

IGNORED = 255
# Logits (N, C, h, w) and the target's size.
CASES = {
    "ratio 2": ((2, 5, 3, 4), (6, 8)),
    "ratio 4": ((1, 7, 2, 3), (8, 12)),
    "ratio 8": ((1, 3, 2, 1), (16, 8)),
    "down": ((1, 4, 12, 10), (4, 4)),
    "up and down": ((1, 3, 3, 9), (8, 4)),
    "primes": ((1, 3, 5, 3), (11, 7)),
    "one axis": ((1, 4, 6, 3), (6, 5)),
    "from one pixel": ((2, 4, 1, 1), (3, 8)),
    "to one pixel": ((2, 3, 5, 6), (1, 1)),
    "one class": ((1, 1, 3, 3), (6, 6)),
    "many classes": ((1, 37, 2, 1), (3, 2)),
    "many rows": ((1, 2, 9, 1), (13, 2)),
    "wide": ((1, 2, 1, 33), (2, 37)),
    "the same size": ((2, 9, 5, 4), (5, 4)),
}
# What they do to the kernels, others do too.
SUBSUMED = ("ratio 2", "ratio 8", "up and down", "one axis", "from one pixel", "wide")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _target(shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """A quarter is ignored."""
    target = torch.randint(shape[1], (shape[0], *size))
    return target.masked_fill(torch.rand(target.shape) < 0.25, IGNORED)


def _exact(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logsumexp and the gradient of the logits."""
    exact = logits.double().detach().requires_grad_()
    upsampled = interpolate_exactly(
        exact,
        tuple(target.shape[1:]),
        align_corners=align_corners,
        coordinates=torch.promote_types(logits.dtype, torch.float32),
    )
    loss = F.cross_entropy(
        upsampled,
        target,
        None if weight is None else weight.double(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    (gradient,) = torch.autograd.grad(loss, exact, grad.double())
    return loss.detach(), upsampled.logsumexp(1).detach(), gradient


@interpreted
@fast_and_slow(
    "case dtype",
    [(case, DTYPES[i % 2]) for i, case in enumerate(CASES) if case not in SUBSUMED],
    [(case, DTYPES[i % 2]) for i, case in enumerate(CASES)] + [("ratio 2", d) for d in DTYPES],
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", "_"),
)
def test_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    """Layouts, corners, weights, smoothing and expanded gradients in turn."""
    shape, size = CASES[case]
    accumulation = torch.promote_types(dtype, torch.float32)
    readers = 4 * max(size[0] / shape[2], 1) * max(size[1] / shape[3], 1)
    for i, layout in enumerate(STRIDES):
        turn = len(case) + i
        align_corners, smoothing = turn % 2 == 0, (0.0, 0.1, 0.3)[turn % 3]
        weight = torch.rand(shape[1]).to(accumulation) if turn % 4 else None
        logits, target = of_strides(shape, dtype, layout), _target(shape, size)
        grad = torch.randn(target.shape).to(accumulation)
        if i == 1:
            grad = grad[:1, :1, :1].expand_as(grad)
        loss, logsumexp = kernels.forward(logits, target, weight, IGNORED, smoothing, align_corners)
        result = kernels.backward(
            grad, logits, target, weight, logsumexp, IGNORED, smoothing, align_corners, i > 0
        )
        expected = _exact(grad, logits, target, weight, smoothing, align_corners)
        # The loss is a difference of values as large as logits, its gradient one of probabilities.
        scale = max(logits.abs().max().item(), 1) / max(expected[0].max().item(), 1)
        grad_scale = max(grad.abs().max() / expected[2].abs().max().clamp(min=1e-30), 1)
        assert loss.dtype == logsumexp.dtype == accumulation
        assert relative_error(loss, expected[0]) <= tolerance(accumulation) * scale, layout
        assert relative_error(logsumexp, expected[1]) <= tolerance(accumulation), layout
        assert result.dtype == dtype
        memory_format = torch.channels_last if i > 0 else torch.contiguous_format
        assert result.is_contiguous(memory_format=memory_format)
        if shape[1] == 1:  # probabilities are one
            assert result.abs().max().item() <= tolerance(accumulation, reduction=readers)
        else:
            error = relative_error(result, expected[2])
            assert error <= tolerance(dtype, reduction=readers) * grad_scale, (layout, error)


@interpreted
@pytest.mark.parametrize("size", [(3, 4), (6, 8)], ids=["same size", "ratio 2"])
def test_a_target_that_is_no_class(size: tuple[int, int]) -> None:
    """NaN for this pixel, in every class of the source pixels it reads, and nowhere else."""
    for label in (-1, 5, 2**32):
        logits, target = torch.randn(1, 5, 3, 4), _target((1, 5), size)
        target[0, -1, -1] = label
        loss, logsumexp = kernels.forward(logits, target, None, IGNORED, 0.1, False)
        wrong = torch.zeros(target.shape, dtype=torch.bool)
        wrong[0, -1, -1] = True
        assert torch.equal(loss.isnan(), wrong)
        grad = torch.ones(()).expand_as(loss)
        result = kernels.backward(grad, logits, target, None, logsumexp, IGNORED, 0.1, False, False)
        wrong = torch.zeros(logits.shape, dtype=torch.bool)
        wrong[:, :, -1, -1] = True
        assert torch.equal(result.isnan(), wrong)


@interpreted
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_pixels(ignore_index: int) -> None:
    """An ignored class too; where all are ignored, all is zero."""
    logits, target = torch.randn(1, 3, 2, 2), torch.randint(3, (1, 4, 4))
    target[0, :2] = ignore_index
    loss, logsumexp = kernels.forward(logits, target, None, ignore_index, 0.0, True)
    expected = F.cross_entropy(
        interpolate_exactly(logits, (4, 4), align_corners=True),
        target,
        ignore_index=ignore_index,
        reduction="none",
    )
    assert relative_error(loss, expected) <= 2 * tolerance(torch.float32)
    target.fill_(ignore_index)
    loss, logsumexp = kernels.forward(logits, target, None, ignore_index, 0.1, True)
    result = kernels.backward(
        torch.ones_like(loss), logits, target, None, logsumexp, ignore_index, 0.1, True, False
    )
    assert not loss.any()
    assert not result.any()


@interpreted
@fast_and_slow("layout", [("channels_last",)], [(layout,) for layout in STRIDES])
def test_infinite_logits(layout: str) -> None:
    """A class that is out of the question, one that is certain, and NaN: as in PyTorch."""
    for size in ((2, 3), (4, 6)):
        logits = of_strides((4, 9, 2, 3), torch.float32, layout)
        logits[0, 3] = -math.inf
        logits[1, 4] = math.inf
        logits[2, 5] = math.nan
        logits[3] = -math.inf
        target = torch.randint(3, (4, *size))
        target[0, 0, 0] = 3
        grad = torch.ones(target.shape)
        loss, logsumexp = kernels.forward(logits, target, None, IGNORED, 0.0, False)
        result = kernels.backward(grad, logits, target, None, logsumexp, IGNORED, 0.0, False, False)
        expected = _exact(grad, logits, target, None, 0.0, False)
        torch.testing.assert_close(loss, expected[0].float(), equal_nan=True)
        assert result[1:].isnan().all()
        if size == (2, 3):  # elsewhere -inf has weight zero, which makes it NaN
            assert relative_error(result[0], expected[2][0]) <= tolerance(torch.float32)


@interpreted
def test_large_logits() -> None:
    logits, target = 1e4 * torch.randn(1, 5, 2, 3), _target((1, 5), (4, 6))
    loss, logsumexp = kernels.forward(logits, target, None, IGNORED, 0.1, False)
    grad = torch.ones_like(loss)
    expected = _exact(grad, logits, target, None, 0.1, False)
    result = kernels.backward(grad, logits, target, None, logsumexp, IGNORED, 0.1, False, False)
    assert relative_error(loss, expected[0]) <= 2 * tolerance(torch.float32)
    assert relative_error(result, expected[2]) <= 1e-3  # exp of a difference of large numbers


@interpreted
def test_nothing_to_do() -> None:
    logits, target = torch.empty(0, 3, 2, 2), torch.empty(0, 4, 4, dtype=torch.int64)
    loss, logsumexp = kernels.forward(logits, target, None, IGNORED, 0.0, False)
    result = kernels.backward(loss, logits, target, None, logsumexp, IGNORED, 0.0, False, True)
    assert (loss.shape, result.shape) == (target.shape, logits.shape)
