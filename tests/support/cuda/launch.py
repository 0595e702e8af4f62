"""Launches of the package's CUDA C++ on CPU tensors: emulated, or as nvcc's PTX.

with Launcher(seed=3) as launcher:  # or arch="sm_90a"
    out = fastfuse.ops.tap_sum.cuda.forward(...)
assert launcher.launched == ["fastfuse_tap_sum"]
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
from ptx.storages import FreshMemory, storages
from torch import Tensor

from cuda.emulation import Call
from cuda.proof import emulated, run_ptx
from cuda.sources import INCLUDES, ROOT, Program
from fastfuse import _cuda, backends
from fastfuse.ops import launch_cuda

Argument = Tensor | tuple[Tensor, ...] | None  # a tuple: levels, of which a function takes a list


class Launcher(ExitStack):
    """While entered, launches of this process are emulated in the order of a seed, or run as PTX.

    Tensors that it is not entered for are taken to be written. ``programs`` may have edited ones.
    """

    def __init__(
        self, seed: int | None = None, arch: str | None = None, programs: Sequence[Program] = ()
    ) -> None:
        super().__init__()
        if (seed is None) == (arch is None):
            raise ValueError(f"expected a seed or an arch; got {seed} and {arch}")
        self.launched: list[str] = []  # functions of the C interface
        self._seed, self._arch = seed, arch
        self._programs = {program.name: program for program in programs}
        self._fresh = FreshMemory()

    def __enter__(self) -> Launcher:
        patch = self.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(backends, "_requested", "cuda")
        patch.setattr(_cuda, "library", _Library(self._program))
        patch.setattr(launch_cuda.Launch, "_launch", lambda launch, a: self.launch(launch, a))
        for module in _users():
            patch.setattr(module, "pointers", tuple)
        self.enter_context(self._fresh)
        return self

    def launch(self, launch: launch_cuda.Launch, arguments: Sequence[Argument]) -> None:
        program = self._program(launch.function)
        groups = [a if isinstance(a, tuple) else (a,) for a in arguments]
        tensors = [t for group in groups for t in group if isinstance(t, Tensor)]
        pointers = [self._pointer(argument) for argument in arguments]

        def call(library: ctypes.CDLL) -> int:
            function = getattr(library, launch.function)
            function.argtypes = [ctypes.c_void_p] * (len(pointers) + 2)
            return int(function(ctypes.addressof(launch.sizes), *pointers, None))

        self.launched.append(launch.function)
        self._run(program, call, tensors)

    def _program(self, function: str) -> Program:
        name = _program_of(function)
        return self._programs.get(name, Program(name))

    def _address(self, tensor: Tensor) -> int:
        return tensor.data_ptr()

    def _pointer(self, argument: Argument) -> Any:
        if isinstance(argument, tuple):
            return (ctypes.c_void_p * launch_cuda.MAX_LEVELS)(*map(self._address, argument))
        return self._address(argument) if isinstance(argument, Tensor) else argument

    def _run(self, program: Program, call: Call, tensors: Sequence[Tensor]) -> None:
        emulator = emulated(program)
        memory = storages([t for t in tensors if t.numel() > 0], self._fresh.written)
        if self._seed is not None:
            emulator.run(call, memory, self._seed)
        elif self._arch is not None:
            for made in emulator.launches(call):
                run_ptx(program, self._arch, made, memory)


class _Library:
    """What has the functions that launch nothing."""

    def __init__(self, program_of: Callable[[str], Program]) -> None:
        self._program_of = program_of

    def __getattr__(self, name: str) -> Any:
        return getattr(emulated(self._program_of(name)).library, name)


def _users() -> list[Any]:
    """Modules that give lists of levels to functions."""
    for path in (ROOT / "fastfuse" / "ops").glob("*/cuda.py"):
        importlib.import_module(f"fastfuse.ops.{path.parent.name}.cuda")
    return [
        module
        for module in list(sys.modules.values())
        if getattr(module, "pointers", None) is launch_cuda.pointers
    ]


@cache
def _program_of(function: str) -> str:
    """The .cu file that defines it."""
    (path,) = [
        path
        for directory in INCLUDES
        for path in (directory / "cuda").glob("*.cu")
        if f" {function}(" in path.read_text(encoding="utf-8")
    ]
    return path.stem
