"""upsample_cross_entropy's CUDA kernels against PyTorch in float64: emulated, and as PTX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda.emulation import EmulationError
from cuda.examples import skip_without_nvcc
from cuda.launch import Launcher
from cuda.mutations import without_barrier
from cuda.resources import resources
from cuda.sources import Program, Texts
from inputs import STRIDES, fast_and_slow, of_strides
from torch import Tensor

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.upsample_cross_entropy import cuda as kernels
from fastfuse.tolerances import relative_error, tolerance

PROGRAM = "upsample_cross_entropy"
IGNORED = 999
# Logits (N, C, h, w) and the ratio of the target's sides.
CASES = {
    "a class": ((1, 1, 3, 2), 4),
    "one pixel": ((3, 2, 1, 1), 8),
    "odd classes": ((2, 5, 3, 4), 2),
    "two tiles": ((1, 9, 2, 9), 4),
    "four tiles": ((1, 19, 9, 10), 4),
    "split rows": ((2, 33, 8, 3), 2),
    "warps of classes": ((1, 150, 3, 9), 4),
    "many classes": ((1, 300, 2, 2), 4),
    "low tiles": ((1, 190, 9, 2), 8),
    "tall": ((1, 21, 17, 1), 8),
    "high tiles": ((140, 3, 17, 1), 2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Results = list[tuple[str, tuple[Tensor, ...]]]  # of each way that a call was run


@dataclass
class Runs:
    """The ways in which calls are run."""

    seeds: Sequence[int] = range(2)
    archs: Sequence[str] = ("sm_90a",)
    programs: Sequence[Program] = ()

    def of(self, function: Callable[..., Any], *arguments: Any) -> Results:
        ways: list[dict[str, Any]] = [{"seed": seed} for seed in self.seeds]
        ways += [{"arch": arch} for arch in self.archs]
        found: Results = []
        for way in ways:
            with Launcher(**way, programs=self.programs) as launcher:
                result = function(*arguments)
            assert launcher.launched, "Triton runs it"
            found.append((str(way), result if isinstance(result, tuple) else (result,)))
        return found


@pytest.fixture
def runs() -> Runs:
    skip_without_nvcc()
    return Runs()


def _target(shape: tuple[int, ...], ratio: int) -> Tensor:
    """A quarter is ignored."""
    target = torch.randint(shape[1], (shape[0], ratio * shape[2], ratio * shape[3]))
    return target.masked_fill(torch.rand(target.shape) < 0.25, IGNORED)


def _exact(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logsumexp and the gradient of the logits."""
    exact = logits.double().detach().contiguous().requires_grad_()
    size = (target.shape[1], target.shape[2])
    upsampled = interpolate_exactly(exact, size, coordinates=torch.float32)
    weight = None if weight is None else weight.double()
    loss = F.cross_entropy(
        upsampled, target, weight, ignore_index=IGNORED, label_smoothing=label_smoothing,
        reduction="none",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, exact, grad.double())
    return loss.detach(), upsampled.logsumexp(1).detach(), gradient


def _assert_right(
    runs: Runs, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
    smoothing: float, channels_last: bool,
) -> None:  # fmt: skip
    expected = _exact(grad, logits, target, weight, smoothing)
    options = (IGNORED, smoothing, False)
    found = runs.of(kernels.forward, logits, target, weight, *options)
    # The loss is a difference of values as large as logits, its gradient one of probabilities.
    scale = max(logits.abs().max().item() / max(expected[0].max().item(), 1), 1)
    for way, (loss, logsumexp) in found:
        assert relative_error(loss, expected[0]) <= tolerance(torch.float32) * scale, way
        assert relative_error(logsumexp, expected[1]) <= tolerance(torch.float32), way
    found += runs.of(
        kernels.backward, grad, logits, target, weight, logsumexp, *options, channels_last
    )
    readers = 4 * target[0].numel() / logits[0, 0].numel()
    size = expected[2].abs().max().item() if logits.shape[1] > 1 else 0  # one class: zero
    size = max(size, grad.abs().max().item())
    for way, results in found:
        if len(results) == 1:
            error = (results[0].double() - expected[2]).abs().max().item()
            assert error <= tolerance(logits.dtype, reduction=readers) * size, way
    emulated = [results for way, results in found if "seed" in way]
    for seeds in (emulated[: len(runs.seeds)], emulated[len(runs.seeds) :]):
        for results in seeds[1:]:  # the same bits in any order of threads
            assert all(map(torch.equal, results, seeds[0]))


@fast_and_slow(
    "case dtype",
    [(case, DTYPES[i % 3]) for i, case in enumerate(CASES) if case != "high tiles"],
    [(case, dtype) for case in CASES for dtype in DTYPES],
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", "_"),
)
def test_values_and_gradients(runs: Runs, case: str, dtype: torch.dtype) -> None:
    """Layouts, weights, smoothing and expanded gradients in turn."""
    shape, ratio = CASES[case]
    for i, layout in enumerate(STRIDES):
        turn = len(case) + i
        smoothing = (0.0, 0.1, 0.3)[turn % 3]
        weight = torch.rand(shape[1]) if turn % 4 else None
        logits, target = 3 * of_strides(shape, dtype, layout), _target(shape, ratio)
        logits = logits.to(dtype)
        grad = torch.randn(target.shape)
        if i == 1:
            grad = grad[:1, :1, :1].expand_as(grad)
        runs.archs = ["sm_90a"] if layout == "channels_last" else []
        _assert_right(runs, grad, logits, target, weight, smoothing, i > 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_orders_of_threads(runs: Runs, case: str) -> None:
    shape, ratio = CASES[case]
    runs.seeds, runs.archs = range(20), ["sm_80"]
    logits, target = of_strides(shape, torch.float32, "channels_last"), _target(shape, ratio)
    _assert_right(runs, torch.randn(target.shape), logits, target, None, 0.1, True)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_without_a_barrier(runs: Runs, number: int) -> None:
    """A race is found wherever one is left out, which proves that the emulation sees them."""
    runs.programs, runs.archs = [Program(PROGRAM, without_barrier(number))], []
    shape = (2, 33, 9, 10)
    logits, target = of_strides(shape, torch.float32, "channels_last"), _target(shape, 2)
    with pytest.raises(EmulationError):
        _assert_right(runs, torch.randn(target.shape), logits, target, None, 0.1, True)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_target_that_is_no_class(runs: Runs, ratio: int) -> None:
    """NaN for this pixel, in every class of the source pixels it reads, and nowhere else."""
    for label in (-1, 5, 2**32):
        shape = (1, 5, 3, 4)
        logits, target = torch.randn(shape), _target(shape, ratio)
        target[0, -1, -1] = label
        wrong = torch.zeros(target.shape, dtype=torch.bool)
        wrong[0, -1, -1] = True
        found = runs.of(kernels.forward, logits, target, None, IGNORED, 0.1, False)
        for way, (loss, _) in found:
            assert torch.equal(loss.isnan(), wrong), way
        logsumexp = found[0][1][1]
        grad = torch.ones(()).expand_as(loss)
        wrong = torch.zeros(logits.shape, dtype=torch.bool)
        wrong[:, :, -1, -1] = True
        for way, (result,) in runs.of(
            kernels.backward, grad, logits, target, None, logsumexp, IGNORED, 0.1, False, False
        ):
            assert torch.equal(result.isnan(), wrong), way


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_ignored_pixels(runs: Runs, ratio: int) -> None:
    logits = torch.randn(1, 3, 2, 2)
    target = torch.full((1, 2 * ratio, 2 * ratio), IGNORED)
    found = runs.of(kernels.forward, logits, target, None, IGNORED, 0.1, False)
    for way, (loss, _) in found:
        assert not loss.any(), way
    logsumexp = found[0][1][1]
    grad = torch.ones_like(loss)
    for way, (result,) in runs.of(
        kernels.backward, grad, logits, target, None, logsumexp, IGNORED, 0.1, False, True
    ):
        assert not result.any(), way


def _far_apart(logits: Tensor) -> Tensor:
    """Neighbours that are certain of different classes."""
    logits = torch.full_like(logits, -300)
    logits[:, 0, :, ::2] = 0
    logits[:, 1, :, 1::2] = 0
    return logits


def _offset(logits: Tensor) -> Tensor:
    """By another number in each pixel."""
    return logits + 300 * torch.randn_like(logits[:, :1])


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize(
    "change",
    [lambda x: 30 * x, lambda x: 1e4 * x, _far_apart, _offset, lambda x: x + 1e5],
    ids=["sharp", "large", "far apart", "offset", "all offset"],
)
def test_large_logits(runs: Runs, change: Callable[[Tensor], Tensor], ratio: int) -> None:
    """What exponentials as products cannot have, or could not without care."""
    runs.archs = runs.archs if ratio == 4 else []
    shape = (1, 9, 4, 5)
    logits, target = change(torch.randn(shape)), _target(shape, ratio)
    grad = torch.randn(target.shape)
    expected = _exact(grad, logits, target, None, 0.1)
    for way, (loss, logsumexp) in runs.of(
        kernels.forward, logits, target, None, IGNORED, 0.1, False
    ):
        size = max(expected[0].max().item(), 1)
        assert (loss - expected[0]).abs().max().item() <= 2 * tolerance(torch.float32) * size, way
        assert relative_error(logsumexp, expected[1]) <= tolerance(torch.float32), way
    # exp of a difference of large numbers
    bound = 4 * 2**-24 * max(logits.abs().max().item(), 10)
    for way, (result,) in runs.of(
        kernels.backward, grad, logits, target, None, logsumexp, IGNORED, 0.1, False, True
    ):
        assert relative_error(result, expected[2]) <= bound, way


def test_infinite_logits(runs: Runs) -> None:
    """A class that is out of the question, one that is certain, and NaN."""
    logits = torch.randn(4, 9, 2, 3)
    logits[0, 3] = -math.inf
    logits[1, 4] = math.inf
    logits[2, 5] = math.nan
    logits[3] = -math.inf
    target = torch.randint(3, (4, 8, 12))
    grad = torch.ones(target.shape)
    others = [0, 1, 2, 4, 5, 6, 7, 8]  # as if there were no such class
    expected = _exact(grad[:1], logits[:1, others], target[:1], None, 0.0)
    found = runs.of(kernels.forward, logits, target, None, IGNORED, 0.0, False)
    for way, (loss, _) in found:
        assert relative_error(loss[:1], expected[0]) <= tolerance(torch.float32), way
        assert loss[1:].isnan().all(), way
    logsumexp = found[0][1][1]
    for way, (result,) in runs.of(
        kernels.backward, grad, logits, target, None, logsumexp, IGNORED, 0.0, False, False
    ):
        assert relative_error(result[:1, others], expected[2]) <= 8 * tolerance(torch.float32), way
        assert not result[0, 3].any(), way
        assert result[1:].isnan().all(), way


def test_exponentials_that_are_approximated(runs: Runs) -> None:
    """A device's exponentials are up to 2 units in the last place off: all of them, here."""

    def approximated(texts: Texts) -> Texts:
        name, exact = "cuda/upsample_cross_entropy_cells.cuh", "return std::exp2(x);"
        assert exact in texts[name]
        return {**texts, name: texts[name].replace(exact, "return std::exp2(x) * (1 + 0x1p-22f);")}

    runs.programs, runs.archs = [Program(PROGRAM, approximated)], []
    for ratio in (2, 4, 8):
        shape = (1, 50, 3, 4)
        logits, target = of_strides(shape, torch.float32, "channels_last"), _target(shape, ratio)
        _assert_right(runs, torch.randn(target.shape), logits, target, None, 0.0, True)


def test_what_is_left_to_triton() -> None:
    plan = kernels._launch
    device, stride = torch.device("cpu"), (20, 1, 10, 5)
    loss = (-100, 0.0)  # ignore_index, label_smoothing

    def covered(shape: tuple[int, ...], size: tuple[int, int], corners: bool = False,
                dtype: torch.dtype = torch.float32) -> bool:  # fmt: skip
        name = "upsample_cross_entropy"
        args = (device, dtype, shape, stride, size, (4, 4, 1), *loss, corners, True)
        return plan(name, *args) is not None

    assert covered((1, 5, 2, 2), (4, 4))
    assert covered((1, 1024, 2, 2), (16, 16))
    assert not covered((1, 1025, 2, 2), (4, 4))
    assert not covered((1, 5, 2, 2), (4, 4), corners=True)
    assert not covered((1, 5, 2, 2), (4, 8))
    assert not covered((1, 5, 2, 2), (2, 2))
    assert not covered((1, 5, 2, 2), (6, 6))
    assert not covered((1, 5, 2, 2), (4, 4), dtype=torch.float64)
    name, shape = "upsample_cross_entropy_backward", (1, 5, 16, 2**27)  # offsets of 15 rows
    grad = (2**31, 2**27, 1)
    args = (device, torch.float32, shape, stride, (32, 2**28), grad, *loss, False, True)
    assert plan(name, *args) is None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_registers(arch: str) -> None:
    """None is spilled."""
    skip_without_nvcc()
    found = resources(Program(PROGRAM), arch)
    assert len(found) == 27  # dtypes by ratios: forward of two layouts, and backward
    for name, kernel in found.items():
        assert kernel.spills == kernel.stack == 0, name
