"""Loads ``fastfuse/lib/_CUDA.so``, the kernels in CUDA C++, or keeps the reason why it cannot.

The library knows neither Python nor PyTorch: it has a C interface and its own CUDA runtime, and is
loaded beside a PyTorch that has CUDA. Without it CUDA tensors have the Triton kernels.
"""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["failure", "failure_on", "library", "name_of_error"]

FILE = "lib/_CUDA.so"  # not beside modules, of which it is none
MIN_CUDA = 12  # of PyTorch


def _load() -> tuple[ctypes.PyDLL | None, str | None]:
    path, version = Path(__file__).parent / FILE, torch.version.cuda
    if not path.exists():
        return None, (
            f"expected fastfuse/{FILE}; it was not built, for want of an nvcc that compiles it or "
            f"by FASTFUSE_CUDA=OFF"
        )
    if version is None:
        return None, (
            f"expected a PyTorch with CUDA, got {torch.__version__} (fastfuse/{FILE} is built)"
        )
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) < MIN_CUDA:
        return None, f"expected a PyTorch with CUDA {MIN_CUDA} or newer, got {version}"
    try:
        found = ctypes.PyDLL(str(path))  # keeps the interpreter's lock: a launch is short
    except OSError as error:
        return None, f"expected fastfuse/{FILE} to load, got {error}"
    if not hasattr(found, "fastfuse_check_device"):
        return None, f"expected fastfuse/{FILE} as this version builds it, got an older one"
    return found, None


def name_of_error(error: int) -> str:
    """Of a cudaError_t."""
    if library is None:
        return "unknown"
    function = library.fastfuse_error_name
    function.restype = ctypes.c_char_p
    return str(function(ctypes.c_int(error)).decode())


@lru_cache
def failure_on(device: torch.device) -> str | None:
    """Why a device does not run the kernels: the library may be built for others, or with a newer
    CUDA than the driver knows."""
    if library is None:
        return failure
    with torch.cuda.device(device):
        error = library.fastfuse_check_device()
    if error == 0:
        return None
    return f"expected fastfuse/{FILE} to run on {device}, got {name_of_error(error)} ({error})"


library: ctypes.PyDLL | None
failure: str | None
library, failure = _load()
