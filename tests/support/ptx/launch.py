"""Launches of Triton kernels on CPU tensors: compiled for a GPU, and their PTX run by the machine.

The PTX is kept under .cache/ by a hash of the source; the assembler is left out.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction
from triton_offline import kept, specialised

from ptx.machine import Machine, run
from ptx.memory import ALIGNMENT, Layout
from ptx.parse import Kernel, parse

Array = npt.NDArray[Any]

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "triton_ptx"


class FreshMemory(TorchDispatchMode):
    """Which bytes of storages nobody has written since they were made by an ``empty``."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[int, Array] = {}  # by address

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        before = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        named = zip(func._schema.arguments, args, strict=False)
        changed = [value for argument, value in named if argument.is_write]
        changed += [
            kwargs[a.name] for a in func._schema.arguments if a.is_write if a.name in kwargs
        ]
        for tensor in tree_leaves(changed):
            self._written.pop(_address(tensor), None)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or _address(tensor) in before:
                continue
            if "empty" in func.__name__:
                size = tensor.untyped_storage().nbytes()
                self._written[_address(tensor)] = np.zeros(size, bool)
            else:
                self._written.pop(_address(tensor), None)
        return result

    def written(self, tensor: Tensor) -> Array:
        """A mask of its storage's bytes; what is set there stays."""
        size = tensor.untyped_storage().nbytes()
        return self._written.get(_address(tensor), np.ones(size, bool))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Array:
    """Those of its storage."""
    size = tensor.untyped_storage().nbytes()
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(_address(tensor)))


def _elements(tensor: Tensor) -> Array:
    """A mask of the bytes of its storage that are its elements'."""
    mask, size = np.zeros(tensor.untyped_storage().nbytes(), bool), tensor.element_size()
    if tensor.numel() > 0:
        begin = mask[tensor.storage_offset() * size :]
        strides = (*(stride * size for stride in tensor.stride()), 1)
        np.lib.stride_tricks.as_strided(begin, (*tensor.shape, size), strides)[...] = True
    return mask


class Launcher(ExitStack):
    """While entered, launches of this process run as on a GPU of an architecture.

    Nothing is assembled meanwhile. ``edit`` is what tests do to the PTX.
    """

    def __init__(self, arch: int, edit: Callable[[str], str] = lambda ptx: ptx) -> None:
        super().__init__()
        self._target = GPUTarget("cuda", arch, 32)
        self._edit = edit
        self._kernels: dict[str, tuple[Kernel, int]] = {}
        self._fresh = FreshMemory()

    def __enter__(self) -> Launcher:
        def run(kernel: Any, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> None:
            self.launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, grid)

        patch = self.enter_context(pytest.MonkeyPatch.context())
        # Triton's own cache may not have what is not assembled.
        patch.setenv("TRITON_CACHE_DIR", self.enter_context(TemporaryDirectory()))
        patch.setattr(CUDABackend, "make_cubin", lambda *_: b"")
        patch.setattr(JITFunction, "run", run)
        self.enter_context(self._fresh)
        return self

    def launch(self, kernel: Any, arguments: dict[str, Any], grid: Sequence[int]) -> None:
        source, remaining, options = specialised(kernel, arguments)
        code, shared_size = self._compiled(source, options)
        storages: dict[int, list[Tensor]] = {}  # their views
        for _, value in remaining:
            if isinstance(value, Tensor):
                storages.setdefault(_address(value), []).append(value)
        layout = Layout()
        places = {
            address: layout.place(
                _bytes(views[0]),
                np.logical_or.reduce([_elements(view) for view in views]),
                self._fresh.written(views[0]),
                address % ALIGNMENT,
            )
            for address, views in storages.items()
        }

        def bits(value: Any) -> int:
            if not isinstance(value, Tensor):
                return value
            offset = int(value.storage_offset()) * value.element_size()
            return Machine.GLOBAL_BASE + places[_address(value)] + offset

        values = [bits(value) for _, value in remaining]
        values += [0] * (len(code.parameters) - len(values))  # memory that no kernel asks for
        memory = run(code, values, grid, layout, shared_size)
        for address, (view, *_) in storages.items():
            data, written = _bytes(view), self._fresh.written(view)
            there = slice(places[address], places[address] + len(data))
            data[:] = memory.data[there]
            written |= memory.written_bytes[there]

    def _compiled(self, source: Any, options: dict[str, Any]) -> tuple[Kernel, int]:
        """The kernel and how many bytes of shared memory it has."""
        launched = f"{triton.__version__} {self._target} {source.hash()} {sorted(options.items())}"
        key = hashlib.sha256(launched.encode()).hexdigest()

        def compiled() -> dict[str, Any]:
            kernel = triton.compile(source, target=self._target, options=options)
            return {"ptx": kernel.asm["ptx"], "shared": kernel.metadata.shared}

        if key not in self._kernels:
            made = kept(CACHE / f"{key}.json", compiled)
            self._kernels[key] = parse(self._edit(made["ptx"])), made["shared"]
        return self._kernels[key]
