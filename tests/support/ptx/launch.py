"""Launches of Triton kernels on CPU tensors: compiled for a GPU, and their PTX run by the machine.

The PTX is kept under .cache/ by a hash of the source; the assembler is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction
from triton_offline import kept, specialised

from ptx.parse import Kernel, parse
from ptx.storages import FreshMemory, run_on, storages

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "triton_ptx"


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
        tensors = [value for _, value in remaining if isinstance(value, Tensor)]
        values = [v.data_ptr() if isinstance(v, Tensor) else v for _, v in remaining]
        values += [0] * (len(code.parameters) - len(values))  # memory that no kernel asks for
        run_on(storages(tensors, self._fresh.written), code, values, grid, shared_size)

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
