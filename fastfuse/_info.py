"""``fastfuse.info()``: what is installed, what each op would run here, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

import torch

from fastfuse import _extension
from fastfuse.backends import ENVIRONMENT, explain, requested_backend
from fastfuse.ops import OPERATIONS

__all__ = ["Info", "info"]


@dataclass(frozen=True)
class Info:
    """Versions, devices, instruction sets and the backend of every op. ``print(info())``."""

    versions: dict[str, str]
    devices: list[str]
    extension: str  # the compiled module's file and build, or why it is missing
    isa: str | None  # in force
    supported_isas: list[str]
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
        if self.isa is not None:
            lines.append(f"instruction set: {self.isa} (of {', '.join(self.supported_isas)})")
        lines.append(f"backend: {self.requested_backend}")
        lines += [f"{name}={value}" for name, value in self.environment.items()]
        for op, devices in self.operations.items():
            for device, refusals in devices.items():
                lines.append(f"{op} on {device}: {self.backend_of(op, device)}")
                lines += [f"    {b}: {why or 'runs'}" for b, why in refusals.items()]
        return "\n".join(lines)


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
    module = _extension.module
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
        isa=module.isa() if module else None,
        supported_isas=list(module.supported_isas()) if module else [],
        requested_backend=requested_backend(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        operations={
            name: {d: explain(operation, torch.empty(0, device=d)) for d in devices}
            for name, operation in OPERATIONS.items()
        },
    )
