"""Calls of the kernels in CUDA C++.

A function of the library takes a struct of what follows from shapes, pointers, and a stream. An
op's launcher plans the struct once for each combination of shapes (``launch_triton.planned``) as a
:class:`Launch`, or plans None, where the kernels do not cover what is asked: Triton's run it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastfuse import _cuda
from fastfuse.backends import requested_backend
from fastfuse.ops.launch_triton import OnDevice
from fastfuse.ops.policy import policy_of

__all__ = [
    "ALIGNMENT", "DTYPES", "MAX_BLOCKS", "MAX_LEVELS", "ImageStrides", "Launch", "are_aligned",
    "are_vectors", "channels_last_strides", "dense", "is_preferred", "pointers",
]  # fmt: skip

# As csrc/cuda/runtime.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALIGNMENT = 16  # bytes of the widest access
MAX_LEVELS = 8
MAX_BLOCKS = 65535  # of a grid's second and third dimension

_Levels = ctypes.c_void_p * MAX_LEVELS


class ImageStrides(ctypes.Structure):
    """Of an image in channels_last, in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("image", "row", "pixel")]

    @classmethod
    def of(cls, stride: Sequence[int]) -> ImageStrides:
        return cls(stride[0], stride[2], stride[3])


def is_preferred(op: str, device: torch.device) -> bool:
    """Whether CUDA C++ runs an op where it covers it: asked for by name, or by the policy."""
    if _cuda.library is None:
        return False
    if device.type == "cuda" and _cuda.failure_on(device) is not None:
        return False
    return requested_backend() == "cuda" or op in policy_of("cuda").cuda_ops


def channels_last_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Of a dense image."""
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels


def are_vectors(channels: int, stride: Sequence[int], vector: int) -> bool:
    """Whether so many channels can be accessed at once, everywhere in an image."""
    return stride[1] == 1 and not any(n % vector for n in (channels, *stride[:1], *stride[2:]))


def are_aligned(*tensors: Tensor | None) -> bool:
    return not any(t is not None and t.data_ptr() % ALIGNMENT for t in tensors)


def dense(tensor: Tensor | None) -> Tensor | None:
    """A small tensor, such as a parameter, without gaps and where the widest access may start:
    those that are parts of others, as optimizers flatten them, start anywhere."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if are_aligned(tensor) else tensor.clone()


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Of the levels of a call."""
    return _Levels(*[tensor.data_ptr() for tensor in tensors])


@cache
def _function(name: str, arguments: int) -> Any:
    function = getattr(_cuda.library, name)
    function.argtypes = [ctypes.c_void_p] * (arguments + 2)  # sizes before, the stream behind them
    return function


class Launch(OnDevice):
    """A call of a function of the library but for its tensors, with which it is called.

    Args:
        function: its name.
        sizes: its struct.
        device: whose current stream runs it.
    """

    __slots__ = ("_address", "function", "sizes")

    def __init__(self, function: str, sizes: ctypes.Structure, device: torch.device) -> None:
        super().__init__(device)
        self.function, self.sizes = function, sizes
        self._address = ctypes.addressof(sizes)

    def _launch(self, tensors: tuple[Any, ...]) -> None:
        """Of tensors, None, or :func:`pointers`."""
        arguments = [t.data_ptr() if isinstance(t, Tensor) else t for t in tensors]
        stream = _current_stream(self.device)
        error = _function(self.function, len(arguments))(self._address, *arguments, stream)
        if error:
            raise RuntimeError(
                f"{self.function}: expected a launch, got {_cuda.name_of_error(error)} "
                f"({error}) on {self.device}"
            )


def _current_stream(device: torch.device) -> int:
    if device.type != "cuda":  # emulated
        return 0
    return int(torch._C._cuda_getCurrentRawStream(device.index))
