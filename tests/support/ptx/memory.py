"""Bytes of global or of shared memory, who may access them, and who did."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Who accesses: a block, how many barriers it has passed, a warp.
BLOCK_SHIFT, EPOCH_SHIFT = 32, 6
SEVERAL_WARPS = (1 << EPOCH_SHIFT) - 1  # a warp's number that no warp has
NOBODY, SEVERAL_BLOCKS = -1, -2
GUARD = 4096  # bytes between allocations that nobody may access
ALIGNMENT = 256  # of allocations, as a device's allocator gives it


class AccessError(Exception):
    """What is wrong with one of the accesses of an instruction, and with which."""

    def __init__(self, reason: str, index: int) -> None:
        super().__init__(reason)
        self.reason, self.index = reason, index


def who(block: Array, epoch: Array, warp: Array) -> Array:
    return block << BLOCK_SHIFT | epoch << EPOCH_SHIFT | warp


def _unordered(one: Array, other: Array) -> Array:
    """Whether nothing orders two accesses: other warps between two barriers, or other blocks."""
    same_epoch = one >> EPOCH_SHIFT == other >> EPOCH_SHIFT
    same_block = one >> BLOCK_SHIFT == other >> BLOCK_SHIFT
    different = np.where(same_block, same_epoch & (one != other), True)
    return (one != NOBODY) & (other != NOBODY) & different


def _joined(one: Array, other: Array) -> Array:
    """Those that read something last, when ``one`` reads what ``other`` has read."""
    several = np.where(
        one >> BLOCK_SHIFT == other >> BLOCK_SHIFT, one | SEVERAL_WARPS, SEVERAL_BLOCKS
    )
    return np.where(_unordered(one, other), several, one)


class Memory:
    """Reads and writes many places at once; each is checked.

    Accesses have sizes of powers of two from ``cell`` to 16 bytes: what may be accessed, what is
    written and who accessed it is told by the cell.
    """

    def __init__(
        self, data: Array, valid: Array, written: Array, cell: int, is_shared: bool
    ) -> None:
        padding = 0, -len(data) % 16
        self.data = np.pad(data, padding)
        self._cell, self._is_shared = cell, is_shared
        self._valid, self._written = (
            np.logical_and.reduce(np.pad(mask, padding).reshape(-1, cell), axis=1)
            for mask in (valid, written)
        )
        self._writer = np.full(len(self._valid), NOBODY)
        self._reader = self._writer.copy()
        self._pending = np.zeros(len(self._valid), bool)  # an asynchronous copy is to write it

    @property
    def written_bytes(self) -> Array:
        return np.repeat(self._written, self._cell)

    def load(self, places: Array, size: int, who: Array) -> Array:
        """The bytes at places, # [places, size]"""
        cells = self._cells(places, size)
        _check(~self._pending[cells], "reads what an asynchronous copy still brings")
        _check(self._written[cells], "reads what nobody wrote")
        who = who[:, None]
        _check(~_unordered(self._writer[cells], who), "reads in a race with a write")
        readers = _joined(who, self._reader[cells])
        self._reader[cells] = readers
        other = self._reader[cells] != readers  # of another warp in the same instruction
        self._reader[cells[other]] = _joined(readers, self._reader[cells])[other]
        return self.data.reshape(-1, size)[places // size]

    def store(self, places: Array, size: int, values: Array, who: Array) -> None:
        """Stores bytes, # [places, size]. Several may write the same."""
        cells = self._cells(places, size)
        who = who[:, None]
        _check(~self._pending[cells], "writes where an asynchronous copy does")
        _check(~self._is_read_by_others(cells, who), "writes in a race with a read")
        data, rows = self.data.reshape(-1, size), places // size
        same = (data[rows] == values).all(axis=1, keepdims=True)
        _check(~_unordered(self._writer[cells], who) | same, "writes in a race with a write")
        data[rows] = values
        _check(data[rows] == values, "writes where another thread writes something else")
        self._writer[cells] = who
        self._written[cells] = True

    def begin_copies(self, places: Array, size: int, who: Array) -> None:
        """Until they end nobody may access their bytes."""
        cells = self._cells(places, size)
        who = who[:, None]
        _check(~self._pending[cells], "copies to where another copy does")
        _check(~self._is_read_by_others(cells, who), "copies in a race with a read")
        _check(~_unordered(self._writer[cells], who), "copies in a race with a write")
        self._pending[cells] = True

    def end_copies(self, places: Array, size: int, values: Array, who: Array) -> None:
        self._pending[self._cells(places, size)] = False
        self.store(places, size, values, who)

    def _is_read_by_others(self, cells: Array, who: Array) -> Array:
        """In global memory by other blocks: Triton lets several warps of a block read an element
        that one of them stores, and the others drop what they read."""
        readers = self._reader[cells]
        unordered = _unordered(readers, who)
        if self._is_shared:
            return unordered
        return unordered & (readers >> BLOCK_SHIFT != who >> BLOCK_SHIFT)

    def _cells(self, places: Array, size: int) -> Array:
        inside = (places >= 0) & (places + size <= len(self.data))
        _check(inside, "is out of bounds")
        _check(places % size == 0, f"is not aligned to {size} bytes")
        cells = places[:, None] // self._cell + np.arange(size // self._cell)
        _check(self._valid[cells], "is out of bounds")
        return cells


def _check(good: Array, reason: str) -> None:
    if not good.all():
        of_access = good.reshape(len(good), -1).all(1)
        raise AccessError(reason, int(of_access.argmin()))


class Layout:
    """Allocations of a memory, far from each other."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[tuple[int, Array, Array, Array]] = []

    def place(self, data: Array, valid: Array, written: Array, misalignment: int = 0) -> int:
        """Where the bytes begin; so many bytes after what ``ALIGNMENT`` divides."""
        begin = -(-(self.size + GUARD) // ALIGNMENT) * ALIGNMENT + misalignment
        self.size = begin + len(data)
        self._pieces.append((begin, data, valid, written))
        return begin

    def memory(self, cell: int, is_shared: bool = False) -> Memory:
        data, valid, written = np.zeros(self.size, np.uint8), *np.zeros((2, self.size), bool)
        for begin, *piece in self._pieces:
            for whole, part in zip((data, valid, written), piece, strict=True):
                whole[begin : begin + len(part)] = part
        return Memory(data, valid, written, cell, is_shared)
