"""Checks every op on this machine: agreement with its exact definition, and gradcheck.

``python -m fastfuse verify`` prints what :func:`verify` yields. The self-test plants faults in the
results of kernels that work and demands that the same checks catch every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfuse.backends import BACKENDS, DTYPES, backend, backend_refusals, requested_backend
from fastfuse.ops import OPERATIONS
from fastfuse.ops.define import Operation, Sample
from fastfuse.ops.layout import memory_format
from fastfuse.tolerances import relative_error, tolerance

__all__ = [
    "FAULTS",
    "Check",
    "Deviation",
    "Fault",
    "MismatchError",
    "check_sample",
    "self_test",
    "verify",
]


class MismatchError(AssertionError):
    """A result that is not what the definition says."""


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the exact one, and how far it may be, relative to the latter."""

    what: str
    error: float
    tolerance: float

    @property
    def within(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        sign = "<=" if self.within else ">"
        return f"{self.what}: relative error {self.error:.2e} {sign} {self.tolerance:.2e}"


@dataclass(frozen=True)
class Fault:
    """A way for a kernel to be wrong, planted by the self-test. ``damage(result, tolerance)``."""

    name: str
    damage: Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Check:
    """One line of the table.

    ``status`` is "passed", "failed", "coarse" (PyTorch's own rounding is beyond the tolerance, see
    :func:`check_sample`) or "skipped".
    """

    op: str
    backend: str
    dtype: str
    layout: str
    status: str
    detail: str


def _one_value_off(x: Tensor, tol: float) -> Tensor:
    y = x.to(torch.float64, copy=True)
    y.view(-1)[y.numel() // 2] += 3 * tol * y.abs().max()  # the error left by rounding is below tol
    return y


def _last_row_missing(x: Tensor, tol: float) -> Tensor:
    y = x.clone()
    y[:, :, -1] = 0
    return y


def _last_column_missing(x: Tensor, tol: float) -> Tensor:
    y = x.clone()
    y[..., -1] = 0
    return y


def _first_channel_missing(x: Tensor, tol: float) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


def _rescaled(x: Tensor, tol: float) -> Tensor:
    return x.double() * (1 + 3 * tol)


def _not_a_number(x: Tensor, tol: float) -> Tensor:
    y = x.clone()
    y.view(-1)[-1] = torch.nan
    return y


FAULTS = (
    Fault("one value off", _one_value_off),
    Fault("last row missing", _last_row_missing),
    Fault("last column missing", _last_column_missing),
    Fault("first channel missing", _first_channel_missing),
    Fault("rescaled", _rescaled),
    Fault("not a number", _not_a_number),
)


@dataclass(frozen=True)
class _Result:
    """An output or a gradient beside the exact one."""

    what: str
    value: Tensor
    exact: Tensor
    tolerance: float

    def deviation(self, fault: Fault | None = None) -> Deviation:
        value = self.value
        if fault is not None:
            value = fault.damage(value.contiguous(), self.tolerance)
        return Deviation(self.what, relative_error(value, self.exact), self.tolerance)


def _results(sample: Sample, roundings: int) -> list[_Result]:
    """The output and the gradient of every input."""
    wanted = sample.differentiable
    inputs = tuple(
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_(wanted)
        for x in sample.inputs
    )
    doubles = tuple(x.detach().double().requires_grad_(wanted) for x in inputs)
    dtype = inputs[0].dtype

    def result(what: str, value: Tensor, exact: Tensor, reduction: float) -> _Result:
        limit = tolerance(dtype, reduction=reduction, roundings=max(roundings, sample.roundings))
        return _Result(f"{sample.name}, {what}", value.detach(), exact.detach(), limit)

    output, exact = sample.call(*inputs), sample.exact(*doubles)
    if not output.is_contiguous(memory_format=memory_format(sample.channels_last)):
        raise MismatchError(f"{sample.name}: output has the wrong memory format")
    if output.dtype != dtype:
        raise MismatchError(f"{sample.name}: output is {output.dtype}, expected {dtype}")
    results = [result("output", output, exact, sample.output_reduction)]
    if not sample.differentiable:
        return results

    generator = torch.Generator().manual_seed(1)
    cotangent = (
        torch.randn(output.shape, generator=generator, device="cpu")
        .to(output)
        .contiguous(memory_format=memory_format(sample.channels_last))
    )
    gradients = torch.autograd.grad(output, inputs, cotangent)
    exact_gradients = torch.autograd.grad(exact, doubles, cotangent.double())
    for i, (gradient, exact_gradient) in enumerate(zip(gradients, exact_gradients, strict=True)):
        reduction = sample.reduction_of(i)
        results.append(result(f"gradient of input {i}", gradient, exact_gradient, reduction))
    return results


def check_sample(sample: Sample, *, roundings: int = 1) -> Deviation:
    """Compares output and gradients with the exact ones; returns the largest deviation.

    ``roundings``: how often a result is rounded to its dtype (fused kernels: once).

    A deviation is beyond its tolerance only for the reference backend in bfloat16 and float16: some
    of PyTorch's kernels accumulate in these dtypes on some processors. The same code is held to its
    tolerance in float32 and float64.

    Raises:
        MismatchError: with what differs and by how much.
    """
    return _largest_deviation(_results(sample, roundings))


def _largest_deviation(results: Sequence[_Result]) -> Deviation:
    may_be_coarse = requested_backend() == "reference" and results[0].value.dtype.itemsize == 2
    deviations = [result.deviation() for result in results]
    for deviation in deviations:
        if not (deviation.within or (may_be_coarse and math.isfinite(deviation.error))):
            raise MismatchError(str(deviation))
    return max(deviations, key=_severity)


def _severity(deviation: Deviation) -> float:
    return deviation.error / deviation.tolerance


class _WrongGradient(torch.autograd.Function):
    """The identity with a gradient one percent off."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 1.01


def gradcheck(sample: Sample, *, twice: bool = True, faulty: bool = False) -> None:
    """First and, if asked for, second derivatives against finite differences, in float64."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in sample.inputs)
    call = (lambda *x: _WrongGradient.apply(sample.call(*x))) if faulty else sample.call
    # Fast mode sums gradients up, and those of a softmax cancel: a fault would hide there.
    options = {"raise_exception": False, "fast_mode": not faulty}
    if not torch.autograd.gradcheck(call, inputs, **options):
        raise MismatchError(f"{sample.name}: gradcheck")
    if (
        twice
        and not faulty
        and not torch.autograd.gradgradcheck(call, inputs, raise_exception=False, fast_mode=True)
    ):
        raise MismatchError(f"{sample.name}: gradgradcheck")


def _roundings() -> int:
    """How often the backend in force rounds a result: plain PyTorch after each of its steps."""
    return 4 if requested_backend() == "reference" else 1


def _run(
    operation: Operation, device: str, dtype: torch.dtype, channels_last: bool
) -> tuple[str, str]:
    deviations = []
    for small in (True, False):
        for sample in operation.samples(
            device=device, dtype=dtype, channels_last=channels_last, small=small
        ):
            deviations.append(check_sample(sample, roundings=_roundings()))
            if small and dtype == torch.float64 and sample.differentiable:
                gradcheck(sample, twice=operation.twice_differentiable)
    worst = max(deviations, key=_severity)
    if not worst.within:
        return "coarse", f"PyTorch itself: {worst}"
    detail = f"{len(deviations)} samples, error {worst.error:.1e}, tolerance {worst.tolerance:.1e}"
    if dtype == torch.float64 and operation.differentiable:
        detail += ", gradcheck" + (", gradgradcheck" if operation.twice_differentiable else "")
    return "passed", detail


def _run_self_test(
    operation: Operation, device: str, dtype: torch.dtype, channels_last: bool
) -> tuple[str, str]:
    arguments = {"device": device, "dtype": dtype, "channels_last": channels_last}
    results = _results(next(operation.samples(**arguments)), _roundings())
    healthy = _largest_deviation(results)
    if not healthy.within:  # faults would be caught whether they are seen or not
        return "coarse", f"PyTorch itself: {healthy}"
    caught = 0
    for fault in FAULTS:
        for place, result in zip(("output", "gradient"), results, strict=False):
            if result.deviation(fault).within:
                raise MismatchError(f"{fault.name} in {place} was not caught")
            caught += 1
    if dtype == torch.float64 and operation.differentiable:
        try:
            gradcheck(next(operation.samples(**arguments, small=True)), faulty=True)
        except MismatchError:
            caught += 1
        else:
            raise MismatchError("a gradient 1 % off was not caught by gradcheck")
    return "passed", f"{caught} planted faults caught"


@contextmanager
def _plain_float32() -> Iterator[None]:
    """Convolutions on GPUs without TF32, whose inputs have the digits of float16."""
    usual, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = usual


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _checks(
    run: Callable[[Operation, str, torch.dtype, bool], tuple[str, str]],
    ops: Iterable[str] | None,
    backends: Iterable[str] | None,
    dtypes: Iterable[torch.dtype] | None,
) -> Iterator[Check]:
    for name in ops or OPERATIONS:
        operation = OPERATIONS[name]
        for which in backends or BACKENDS[1:]:  # without auto
            if which != "reference" and which not in operation.backends:
                if backends:  # asked for by name
                    has = ", ".join(operation.backends)
                    reason = f"expected one of its backends: {has}"
                    yield Check(name, which, "", "", "skipped", reason)
                continue
            refusals = {}
            for device in _devices():
                if which != "reference":
                    probe = torch.empty(0, device=device)
                    refusals[device] = backend_refusals(operation, probe)[which]
                if refusals.get(device) is not None:
                    continue
                for dtype in dtypes or DTYPES:
                    kind = str(dtype).removeprefix("torch.")
                    if which != "reference":
                        probe = torch.empty(0, dtype=dtype, device=device)
                        refusal = backend_refusals(operation, probe)[which]
                        if refusal is not None:  # of this dtype
                            yield Check(name, which, kind, "", "skipped", refusal)
                            continue
                    for channels_last in (False, True):
                        try:
                            with backend(which), _plain_float32():
                                status, detail = run(operation, device, dtype, channels_last)
                        except MismatchError as mismatch:
                            status, detail = "failed", str(mismatch)
                        except Exception as error:
                            status, detail = "failed", f"{type(error).__name__}: {error}"
                        layout = "channels_last" if channels_last else "contiguous"
                        label = (
                            which if device == "cpu" or which != "reference" else "reference@cuda"
                        )
                        yield Check(name, label, kind, layout, status, detail)
            if refusals and all(refusals.values()):
                reason = refusals[_devices()[-1]] or ""
                yield Check(name, which, "", "", "skipped", reason)


def verify(
    *,
    ops: Iterable[str] | None = None,
    backends: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
) -> Iterator[Check]:
    """Checks ops on the backends, dtypes and layouts this machine has (default: all of them).

    Every output and gradient is compared with the exact float64 one under the tolerances of
    ``fastfuse.tolerances``; in float64 first and second derivatives are held against finite
    differences too. What cannot run is yielded as skipped, with its reason; where PyTorch's own
    bfloat16 or float16 is beyond its tolerance, the reference backend is yielded as coarse.
    """
    yield from _checks(_run, ops, backends, dtypes)


def self_test(
    *,
    ops: Iterable[str] | None = None,
    backends: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
) -> Iterator[Check]:
    """Plants faults in results and passes where :func:`verify`'s checks catch all of them."""
    yield from _checks(_run_self_test, ops, backends, dtypes)
