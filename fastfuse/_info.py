"""``fastfuse.info()``: what is installed, what each op would run here, and why."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastfuse import _cuda, _extension
from fastfuse.backends import (
    DTYPES,
    ENVIRONMENT,
    BackendError,
    backend_refusals,
    requested_backend,
    select,
)
from fastfuse.ops import OPERATIONS
from fastfuse.ops.define import Operation
from fastfuse.ops.layout import memory_format
from fastfuse.ops.policy import Machine, policy_of

__all__ = ["Info", "info", "routes"]

# Settings by which libraries leave instructions unused that the processor has.
LIBRARY_ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Info:
    """Versions, devices, instruction sets and the backend of every op. ``print(info())``."""

    versions: dict[str, str]
    devices: list[str]
    extension: str  # the compiled module's file and build, or why it is missing
    cuda: str  # the library of CUDA C++ kernels, or why it is missing
    isa: str | None  # in force
    supported_isas: list[str]
    machine: Machine
    policy: str  # where the sizes and crossovers of CPUs were measured
    requested_backend: str
    environment: dict[str, str]
    # op -> device -> backend -> None (it would run) or the reason why it would not
    operations: dict[str, dict[str, dict[str, str | None]]] = field(repr=False)

    def backend_of(self, op: str, device: str) -> str:
        """The backend that runs an op on a device, as things are asked for now."""
        refusals, asked = self.operations[op][device], self.requested_backend
        if asked == "auto":
            return next((name for name, reason in refusals.items() if reason is None), "reference")
        if asked == "reference" or refusals.get(asked, "no such kernel") is None:
            return asked
        return f"none ({asked} was asked for and cannot run)"

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"devices: {', '.join(self.devices)}", f"compiled module: {self.extension}"]
        lines.append(f"CUDA kernels: {self.cuda}")
        if self.isa is not None:
            lines.append(f"instruction set: {self.isa} (of {', '.join(self.supported_isas)})")
        lines.append(f"policy: {_described(self.machine)}; measured on {self.policy}")
        lines.append(f"backend: {self.requested_backend}")
        lines += [f"{name}={value}" for name, value in self.environment.items()]
        for op, devices in self.operations.items():
            for device, refusals in devices.items():
                lines.append(f"{op} on {device}: {self.backend_of(op, device)}")
                lines += [f"    {b}: {why or 'runs'}" for b, why in refusals.items()]
        return "\n".join(lines)


def _described(machine: Machine) -> str:
    caches = ", ".join(f"{size >> 10} KiB" for size in (machine.l1, machine.l2, machine.l3))
    return f"{machine.isa} on {machine.cores} cores of {machine.vendor}, caches of {caches}"


def routes(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = True,
    device: str = "cpu",
) -> dict[str, dict[str, str]]:
    """op -> typical call -> what runs it, for images of a shape; nothing is computed.

    Args:
        shape: (N, C, H, W), each at least 1.
        dtype: float64, float32, bfloat16 or float16.

    Raises:
        ValueError: a shape or dtype that no op takes.

    >>> import fastfuse
    >>> with fastfuse.backend("reference"):
    ...     routes((1, 512, 128, 128))["tap_sum"]
    {'': 'reference'}
    """
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"routes: shape must be N, C, H, W, each at least 1, such as 1, 512, 128, 128; "
            f"got {tuple(shape)}"
        )
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"routes: dtype must be one of {names}; got {dtype}")
    if math.prod(shape) * dtype.itemsize >= 1 << 63:
        raise ValueError(
            f"routes: shape must have fewer than 2^63 bytes; got {tuple(shape)} of {dtype}"
        )
    with FakeTensorMode():
        image = torch.empty(
            tuple(shape), dtype=dtype, device=device, memory_format=memory_format(channels_last)
        )
        return {name: _routes_of(op, image) for name, op in OPERATIONS.items()}


def _routes_of(op: Operation, image: Tensor) -> dict[str, str]:
    try:
        return op.routes(image) if op.routes else {"": select(op, image)}
    except BackendError as refusal:
        return {"": f"none ({refusal})"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> Info:
    """What fastfuse found on this machine.

    >>> import fastfuse
    >>> print(fastfuse.info())  # doctest: +ELLIPSIS
    fastfuse ...
    """
    module, policy = _extension.module, policy_of("cpu")
    if module is None:
        extension = str(_extension.failure)
    else:
        extension = (
            f"{module.__file__} ({module.compiler}, {module.build_type}, built with torch "
            f"{module.torch_build_version} for torch >= {module.torch_target_version})"
        )
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return Info(
        versions={
            "fastfuse": _version("fastfuse"),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        devices=["cpu"]
        + [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(len(devices) - 1)],
        extension=extension,
        cuda=str(_cuda.failure) if _cuda.library is None else _cuda.library._name,
        isa=module.isa() if module else None,
        supported_isas=list(module.supported_isas()) if module else [],
        machine=policy.machine or Machine(),
        policy=policy.measured,
        requested_backend=requested_backend(),
        environment={
            name: os.environ[name]
            for name in (*ENVIRONMENT, *LIBRARY_ENVIRONMENT)
            if name in os.environ
        },
        operations={
            name: {d: backend_refusals(operation, torch.empty(0, device=d)) for d in devices}
            for name, operation in OPERATIONS.items()
        },
    )
