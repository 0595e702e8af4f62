"""Which backend runs an op, and why.

``reference`` is plain PyTorch and always there; ``cpu`` is C++ for CPU tensors; ``triton`` is for
CUDA tensors, and so is ``cuda``: CUDA C++ for what it covers of a call, Triton for the rest.
``auto`` takes the first backend of an op that does not refuse the input and falls back to the
reference with one logged line per reason. A backend asked for by name runs or raises
:class:`BackendError`.

Environment variables, read once at import:

=====================  =============================================================================
``FASTFUSE_BACKEND``   the backend at start (default ``auto``)
``FASTFUSE_ISA``       the instruction set of the CPU kernels (default: the fastest supported)
``FASTFUSE_EXTENSION`` path of another build of the compiled module, such as a sanitizer build
=====================  =============================================================================
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import ContextDecorator
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastfuse import _cuda, _extension

__all__ = [
    "BACKENDS",
    "ENVIRONMENT",
    "BackendError",
    "Dispatched",
    "accumulation_dtype",
    "backend",
    "backend_refusals",
    "cpu_refusal",
    "cuda_refusal",
    "is_tracing",
    "requested_backend",
    "select",
    "triton_refusal",
    "wants_gradients",
]

# PyTorch's dispatch keys of the fused backends.
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "triton": "CUDA"}
BACKENDS = ("auto", "reference", *DISPATCH_KEYS)
ENVIRONMENT = ("FASTFUSE_BACKEND", "FASTFUSE_ISA", "FASTFUSE_EXTENSION")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums of a dtype are kept: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


logger = logging.getLogger("fastfuse")

Refusal = Callable[[Tensor], "str | None"]


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return name


# A plain module global: Dynamo guards on it, so that compiled code follows the choice.
_at_start = _checked(os.environ.get("FASTFUSE_BACKEND") or "auto", "FASTFUSE_BACKEND")
_requested = _at_start
_entered: list[backend] = []


def requested_backend() -> str:
    return _requested


def is_transformed() -> bool:
    """Whether torch.func differentiates or vectorizes what is computed."""
    return torch._C._are_functorch_transforms_active()


def is_differentiated_otherwise() -> bool:
    """Whether torch.func or forward mode differentiates what is computed: by definitions alone."""
    return is_transformed() or forward_ad._current_level >= 0


def wants_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether what is computed of some tensors is recorded for backward."""
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return wanted and torch.is_grad_enabled()


def is_tracing() -> bool:
    """Whether torch.jit.trace records this call, with every branch on a size as it is now."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


# Of branches on sizes that stand in this package: checks, and choices that ask is_tracing.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fastfuse\.")


class backend(ContextDecorator):  # noqa: N801  (used like a function)
    """Run fastfuse's ops on one backend within a ``with`` block or a decorated function.

    The choice is process-wide, not per thread. Backward runs on forward's backend.

    Args:
        name: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: for an unknown name.

    >>> import torch, fastfuse
    >>> x = torch.randn(1, 2, 4, 4)
    >>> with fastfuse.backend("reference"):
    ...     y = fastfuse.upsample_equalize_concat([x], size=(8, 8))
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")

    def __enter__(self) -> backend:
        global _requested
        _entered.append(self)
        _requested = self.name
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _requested
        _entered.remove(self)  # not always the last: other threads enter and leave too
        _requested = _entered[-1].name if _entered else _at_start


def _common_refusal(tensor: Tensor) -> str | None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}"
    if is_transformed():
        return "expected plain tensors, got tensors inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "expected no forward-mode differentiation, got a call inside a dual level"
    return None


def cpu_refusal(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"expected CPU tensors, got {tensor.device}"
    if _extension.module is None:
        return f"expected the compiled module fastfuse._C, got {_extension.failure}"
    return _common_refusal(tensor)


_MIN_CAPABILITY = (8, 0)  # the oldest one the kernels are compiled for in the tests
_MIN_TRITON = (3, 6)  # that of the oldest PyTorch, and the oldest one the kernels are tested under


@lru_cache
def _gpu_failure(device: torch.device) -> str | None:
    """What a device or its software lacks; it does not change."""
    if torch.version.hip is not None:
        return f"expected an NVIDIA GPU, got ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"expected compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    found = ""
    try:
        version = str(getattr(importlib.import_module("triton"), "__version__", "no version"))
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < _MIN_TRITON:
            found = version
    except ImportError as error:
        found = f"{type(error).__name__}: {error}"
    if found:
        return (
            f"expected the package triton 3.6 or newer (pip install 'fastfuse[gpu]'), got {found}"
        )
    return None


def _constant_gpu_failure(device: torch.device) -> str | None:
    return _gpu_failure(device)


def _constant_library_failure(device: torch.device) -> str | None:
    return _cuda.failure_on(device)


# Dynamo cannot trace them, and takes the answers as they are.
# torch.compiler.assume_constant_result says the same, and imports Dynamo.
for _constant in (_constant_gpu_failure, _constant_library_failure):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_refusal(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return f"expected CUDA tensors, got {tensor.device}"
    return _constant_gpu_failure(tensor.device) or _common_refusal(tensor)


def cuda_refusal(tensor: Tensor) -> str | None:
    """What it does not cover of a call Triton's kernels run, so it needs what they need."""
    refusal = triton_refusal(tensor)
    if refusal is None:
        refusal = _constant_library_failure(tensor.device)
    if refusal is None and tensor.dtype == torch.float64:
        return "expected dtype float32, bfloat16, float16, got float64"
    return refusal


# What tensors a backend refuses: None ("I can run this tensor"), or a sentence that says why not.
_REFUSALS: dict[str, Refusal] = {
    "cpu": cpu_refusal,
    "cuda": cuda_refusal,
    "triton": triton_refusal,
}


class Dispatched(Protocol):
    """An op as the dispatcher sees it."""

    @property
    def name(self) -> str: ...
    @property
    def backends(self) -> tuple[str, ...]:
        """Its fused ones, fastest first."""

    @property
    def takes_size(self) -> bool:
        """Whether calls name a size, which torch.jit.trace would make a constant."""


def backend_refusals(operation: Dispatched, tensor: Tensor) -> dict[str, str | None]:
    """Every fused backend of an op with its refusal of `tensor`, None where it would run."""
    return {name: _REFUSALS[name](tensor) for name in operation.backends}


def select(operation: Dispatched, tensor: Tensor) -> str:
    """The backend that runs ``operation`` on inputs like ``tensor``."""
    if _requested == "reference":
        return "reference"
    if operation.takes_size and is_tracing():
        if _requested == "auto":
            return "reference"
        raise BackendError(
            f"{operation.name}: backend {_requested!r} cannot run: expected no torch.jit.trace, "
            f"which would make the size a constant; torch.export keeps sizes open, and backend "
            f"'auto' traces PyTorch's own functions"
        )
    if _requested != "auto":
        if _requested in operation.backends:
            reason = _REFUSALS[_requested](tensor) or ""
        else:
            reason = f"expected one of its backends ({', '.join(operation.backends)}, reference)"
        if reason:
            raise BackendError(f"{operation.name}: backend {_requested!r} cannot run: {reason}")
        return _requested
    for name in operation.backends:
        if _REFUSALS[name](tensor) is None:
            return name
    if not torch.compiler.is_compiling():
        _log_fallback(operation, tensor)
    return "reference"


_logged: set[str] = set()


def _log_fallback(operation: Dispatched, tensor: Tensor) -> None:
    refusals = backend_refusals(operation, tensor)
    reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
    line = f"{operation.name} runs on the reference backend ({reasons})"
    if line not in _logged:
        _logged.add(line)
        logger.warning(line)
