"""Checks every op on this machine: agreement with its exact definition, and gradcheck.

``python -m fastfuse verify`` prints what :func:`verify` yields. The self-test plants faults in the
results of kernels that work and demands that the same checks catch every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfuse.backends import DTYPES, Operation, backend, explain, requested_backend
from fastfuse.ops import OPERATIONS
from fastfuse.ops.layout import memory_format
from fastfuse.ops.sample import Sample
from fastfuse.tolerances import relative_error, tolerance

__all__ = ["FAULTS", "Check", "Fault", "MismatchError", "check_sample", "self_test", "verify"]

BACKENDS = ("reference", "cpu", "triton", "cuda")


class MismatchError(AssertionError):
    """A result that is not what the definition says."""


@dataclass(frozen=True)
class Fault:
    """A way for a kernel to be wrong, planted by the self-test. ``damage(result, tolerance)``."""

    name: str
    damage: Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Check:
    """One line of the table: ``status`` is "passed", "failed" or "skipped"."""

    op: str
    backend: str
    dtype: str
    layout: str
    status: str
    detail: str


def _one_value_off(x: Tensor, tol: float) -> Tensor:
    y = x.double()
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


def _compare(what: str, result: Tensor, expected: Tensor, tol: float, fault: Fault | None) -> float:
    if fault is not None:
        result = fault.damage(result.contiguous(), tol)
    error = relative_error(result, expected)
    if not error <= tol:
        raise MismatchError(f"{what}: relative error {error:.2e} > {tol:.2e}")
    return error


def check_sample(
    sample: Sample,
    *,
    roundings: int = 1,
    output_fault: Fault | None = None,
    gradient_fault: Fault | None = None,
) -> float:
    """Compares output and gradients with the exact ones; returns the largest relative error.

    ``roundings``: how often a result is rounded to its dtype (fused kernels: once).

    Raises:
        MismatchError: with what differs and by how much.
    """
    inputs = tuple(
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for x in sample.inputs
    )
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    dtype = inputs[0].dtype

    roundings = max(roundings, sample.roundings)
    output, expected = sample.call(*inputs), sample.exact(*doubles)
    if not output.is_contiguous(memory_format=memory_format(sample.channels_last)):
        raise MismatchError(f"{sample.name}: output has the wrong memory format")
    if output.dtype != dtype:
        raise MismatchError(f"{sample.name}: output is {output.dtype}, expected {dtype}")
    worst = _compare(
        f"{sample.name}, output",
        output.detach(),
        expected.detach(),
        tolerance(dtype, reduction=sample.output_reduction, roundings=roundings),
        output_fault,
    )

    generator = torch.Generator().manual_seed(1)
    cotangent = (
        torch.randn(output.shape, generator=generator)
        .to(output)
        .contiguous(memory_format=memory_format(sample.channels_last))
    )
    gradients = torch.autograd.grad(output, inputs, cotangent)
    exact_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
    for i, (gradient, exact) in enumerate(zip(gradients, exact_gradients, strict=True)):
        error = _compare(
            f"{sample.name}, gradient of input {i}",
            gradient,
            exact,
            tolerance(dtype, reduction=sample.reduction_of(i), roundings=roundings),
            gradient_fault,
        )
        worst = max(worst, error)
    return worst


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
    options = {"raise_exception": False, "fast_mode": True}
    if not torch.autograd.gradcheck(call, inputs, **options):
        raise MismatchError(f"{sample.name}: gradcheck")
    if twice and not torch.autograd.gradgradcheck(
        call, inputs, raise_exception=False, fast_mode=True
    ):
        raise MismatchError(f"{sample.name}: gradgradcheck")


def _roundings() -> int:
    """How often the backend in force rounds a result: plain PyTorch after each of its steps."""
    return 4 if requested_backend() == "reference" else 1


def _run(operation: Operation, device: str, dtype: torch.dtype, channels_last: bool) -> str:
    worst, count = 0.0, 0
    for small in (True, False):
        for sample in operation.samples(
            device=device, dtype=dtype, channels_last=channels_last, small=small
        ):
            worst, count = max(worst, check_sample(sample, roundings=_roundings())), count + 1
            if small and dtype == torch.float64:
                gradcheck(sample, twice=operation.twice_differentiable)
    detail = f"{count} samples, error {worst:.1e}"
    if dtype == torch.float64:
        detail += ", gradcheck" + (", gradgradcheck" if operation.twice_differentiable else "")
    return detail


def _run_self_test(
    operation: Operation, device: str, dtype: torch.dtype, channels_last: bool
) -> str:
    caught = 0
    arguments = {"device": device, "dtype": dtype, "channels_last": channels_last}
    sample = next(operation.samples(**arguments))
    for fault in FAULTS:
        for place in ("output_fault", "gradient_fault"):
            try:
                check_sample(sample, roundings=_roundings(), **{place: fault})
            except MismatchError:
                caught += 1
            else:
                raise MismatchError(
                    f"{fault.name} in {place.removesuffix('_fault')} was not caught"
                )
    if dtype == torch.float64:
        try:
            gradcheck(next(operation.samples(**arguments, small=True)), faulty=True)
        except MismatchError:
            caught += 1
        else:
            raise MismatchError("a gradient 1 % off was not caught by gradcheck")
    return f"{caught} planted faults caught"


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
    run: Callable[[Operation, str, torch.dtype, bool], str],
    ops: Iterable[str] | None,
    backends: Iterable[str] | None,
    dtypes: Iterable[torch.dtype] | None,
) -> Iterator[Check]:
    for name in ops or OPERATIONS:
        operation = OPERATIONS[name]
        for which in backends or BACKENDS:
            if which != "reference" and which not in operation.refusals:
                if backends:  # asked for by name
                    has = ", ".join(operation.refusals)
                    reason = f"expected one of its backends: {has}"
                    yield Check(name, which, "", "", "skipped", reason)
                continue
            refusals = {}
            for device in _devices():
                if which != "reference":
                    probe = torch.empty(0, device=device)
                    refusals[device] = explain(operation, probe)[which]
                if refusals.get(device) is not None:
                    continue
                for dtype in dtypes or DTYPES:
                    for channels_last in (False, True):
                        try:
                            with backend(which), _plain_float32():
                                detail = run(operation, device, dtype, channels_last)
                            status = "passed"
                        except MismatchError as mismatch:
                            status, detail = "failed", str(mismatch)
                        except Exception as error:
                            status, detail = "failed", f"{type(error).__name__}: {error}"
                        layout = "channels_last" if channels_last else "contiguous"
                        label = (
                            which if device == "cpu" or which != "reference" else "reference@cuda"
                        )
                        yield Check(
                            name, label, str(dtype).removeprefix("torch."), layout, status, detail
                        )
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
    differences too. What cannot run is yielded as skipped, with its reason.
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
