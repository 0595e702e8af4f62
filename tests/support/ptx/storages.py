"""Memory of CPU tensors, in the place of a device's: what is there, and kernels that run on it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptx.machine import Machine, run
from ptx.memory import ALIGNMENT, Layout
from ptx.parse import Kernel

Array = npt.NDArray[Any]


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


class Storage:
    """The memory of some tensors, and masks of its bytes."""

    def __init__(self, views: Sequence[Tensor], written: Array) -> None:
        self.address, self.size = _address(views[0]), views[0].untyped_storage().nbytes()
        self.data: Array = np.ctypeslib.as_array(
            (ctypes.c_uint8 * self.size).from_address(self.address)
        )
        self.valid = np.logical_or.reduce([_elements(view) for view in views])
        self.written = written

    def forget(self) -> None:
        """Becomes as fresh memory is: all ones are NaN of every type."""
        self.data[self.valid] = 0xFF
        self.written[:] = False


def _elements(tensor: Tensor) -> Array:
    """A mask of the bytes of its storage that are its elements'."""
    mask, size = np.zeros(tensor.untyped_storage().nbytes(), bool), tensor.element_size()
    if tensor.numel() > 0:
        begin = mask[tensor.storage_offset() * size :]
        strides = (*(stride * size for stride in tensor.stride()), 1)
        np.lib.stride_tricks.as_strided(begin, (*tensor.shape, size), strides)[...] = True
    return mask


def all_written(tensor: Tensor) -> Array:
    return np.ones(tensor.untyped_storage().nbytes(), bool)


def storages(
    tensors: Iterable[Tensor], written: Callable[[Tensor], Array] = all_written
) -> list[Storage]:
    """Those of tensors, which may be views of the same."""
    views: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        views.setdefault(_address(tensor), []).append(tensor)
    return [Storage(of_one, written(of_one[0])) for of_one in views.values()]


def run_on(
    memory: Sequence[Storage],
    kernel: Kernel,
    arguments: Sequence[int | bytes],
    grid: Sequence[int],
    shared_size: int,
) -> None:
    """Runs a kernel, whose arguments have addresses of the memory; that has the results."""
    layout = Layout()
    places = [
        layout.place(storage.data, storage.valid, storage.written, storage.address % ALIGNMENT)
        for storage in memory
    ]

    def moved(address: int) -> int:
        for storage, place in zip(memory, places, strict=True):
            if 0 <= address - storage.address < max(storage.size, 1):
                return Machine.GLOBAL_BASE + place + address - storage.address
        return address

    def argument(value: int | bytes) -> int | bytes:
        if isinstance(value, int):
            return moved(value)
        count = len(value) // 8
        words = np.array([moved(word) for word in np.frombuffer(value, np.uint64, count).tolist()])
        return words.astype(np.uint64).tobytes() + value[8 * count :]

    after = run(kernel, [argument(value) for value in arguments], grid, layout, shared_size)
    for storage, place in zip(memory, places, strict=True):
        there = slice(place, place + storage.size)
        storage.data[:] = after.data[there]
        storage.written |= after.written_bytes[there]
