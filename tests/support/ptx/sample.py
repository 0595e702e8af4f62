"""Some blocks of a large grid, run to be counted: on tensors that need no memory.

A tensor of the meta device has values that repeat. Of global memory bounds and alignment alone are
checked: what blocks that do not run would have written is not there, and nobody races with them.
Shared memory is checked as ever. Nothing of the results is kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptx.counts import Counts
from ptx.machine import Machine
from ptx.memory import ALIGNMENT, GUARD, AccessError
from ptx.parse import Kernel

Array = npt.NDArray[Any]

PERIOD = 1 << 12  # bytes after which the values of a meta tensor repeat


def spread(programs: int, count: int) -> Array:
    """Numbers of ``count`` programs: one of each part of the grid, in no step with its axes."""
    if programs <= count:
        return np.arange(programs)
    generator = random.Random(programs)
    ends = [programs * part // count for part in range(count + 1)]
    return np.array([generator.randrange(*ends[part : part + 2]) for part in range(count)])


def _values(tensor: Tensor) -> Array:
    """Bytes of its storage, or of a period of them."""
    if tensor.device.type != "meta":
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        return whole.numpy()
    count = PERIOD // tensor.element_size()
    if not tensor.is_floating_point():
        return np.zeros(PERIOD, np.uint8)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator).to(tensor.dtype)
    return values.view(torch.uint8).numpy()


class SampledMemory:
    """Storages of tensors, which are read; what is written is checked and dropped."""

    def __init__(self) -> None:
        self._addresses: dict[int, int] = {}
        self._tensors: list[Tensor] = []  # live on: numbers of storages are not given again
        self._begins: list[int] = []
        self._sizes: list[int] = []
        self._data: list[Array] = []
        self.read: set[int] = set()  # numbers of storages
        self.written: set[int] = set()
        self._next = GUARD

    def place(self, tensor: Tensor) -> int:
        """Where a storage begins."""
        begin = -(-self._next // ALIGNMENT) * ALIGNMENT
        size = tensor.untyped_storage().nbytes()
        self._begins.append(begin)
        self._sizes.append(size)
        self._data.append(_values(tensor))
        self._next = begin + size + GUARD
        return begin

    def address(self, tensor: Tensor) -> int:
        """Where a machine has it; its storage is placed when it is first asked for."""
        if (name := storage(tensor)) not in self._addresses:
            self._addresses[name] = Machine.GLOBAL_BASE + self.place(tensor)
            self._tensors.append(tensor)
        return self._addresses[name] + int(tensor.storage_offset()) * tensor.element_size()

    def names(self, numbers: set[int]) -> set[int]:
        """Storages (by ``storage``) that were placed by their address, of ``read``, ``written``."""
        names = list(self._addresses)
        return {names[i] for i in numbers}

    def load(self, places: Array, size: int, who: Array) -> Array:
        numbers, offsets = self._found(places, size)
        bytes_ = np.zeros((len(places), size), np.uint8)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            rows = self._data[number]
            # A period is a multiple of every size, and a storage is as long as it is.
            at = (offsets[here, None] + np.arange(size)) % len(rows)
            bytes_[here] = rows[at]
            self.read.add(number)
        return bytes_

    def store(self, places: Array, size: int, values: Array, who: Array) -> None:
        numbers, _ = self._found(places, size)
        self.written.update(np.unique(numbers).tolist())

    def _found(self, places: Array, size: int) -> tuple[Array, Array]:
        """The storages that places lie in, and where."""
        numbers = np.searchsorted(self._begins, places, side="right") - 1
        offsets = places - np.take(self._begins, numbers)
        inside = (numbers >= 0) & (offsets + size <= np.take(self._sizes, numbers))
        for good, reason in (
            (inside, "is out of bounds"),
            (places % size == 0, f"is not aligned to {size} bytes"),
        ):
            if not good.all():
                raise AccessError(reason, int(good.argmin()))
        return numbers, offsets


def storage(tensor: Tensor) -> int:
    """A number that views of one storage share; those of meta tensors have no address."""
    return int(tensor.untyped_storage()._cdata)


def count(
    kernel: Kernel,
    values: Sequence[Tensor | int | bytes],
    grid: tuple[int, int, int],
    blocks: Array,
    shared_size: int,
    memory: SampledMemory | None = None,
) -> tuple[Counts, set[int], set[int]]:
    """What blocks do, and which storages (by ``storage``) are read and written.

    Bytes may have addresses of the ``memory``.
    """
    memory = memory or SampledMemory()
    memory.read, memory.written = set(), set()
    arguments = [memory.address(v) if isinstance(v, Tensor) else v for v in values]
    arguments += [0] * (len(kernel.parameters) - len(arguments))
    counts = Counts(kernel.threads)
    Machine(kernel, arguments, grid, blocks, memory, shared_size, counts).run()
    return counts, memory.names(memory.read), memory.names(memory.written)
