"""Runs blocks of a kernel: an element of every array is a thread, warps and blocks side by side.

Threads that branch apart run in groups, the one that is furthest back first, and are one group
again where they meet. Where they need others of their warp or block they wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ptx.arithmetic import UNSIGNED
from ptx.context import WARP, Lanes, Step, partners
from ptx.copies import Copies
from ptx.instructions import step
from ptx.memory import AccessError, Layout, Memory, who
from ptx.parse import BITS, Instruction, Kernel, PTXError

Array = npt.NDArray[Any]

MAX_STEPS = 10**6  # more instructions than any test's kernel runs
SPACES = {"global", "shared", "param"}
PARAMETER_ALIGNMENT = 16
CELL = 4  # bytes; asynchronous copies have as many or more


class GlobalMemory(Protocol):
    """What instructions do with it, at places of threads; ``Memory`` checks all of that."""

    def load(self, places: Array, size: int, who: Array) -> Array: ...

    def store(self, places: Array, size: int, values: Array, who: Array) -> None: ...


class Observer(Protocol):
    """Is told what a machine does, before it does so."""

    def executes(self, instruction: Instruction, threads: Array) -> None:
        """An instruction, for a mask of threads; its guard may be false of them."""

    def accesses(self, space: str, places: Array, size: int, threads: Array) -> None:
        """``size`` bytes at places of a space, by threads, given by their numbers."""


class Machine:
    """Blocks of a kernel, given by their numbers, that run at once.

    ``arguments`` are bits, as an integer or as bytes. Registers, like shared memory, are all ones
    before they are written: NaN of every type, addresses of nothing. An array of registers has a
    value of every thread, or one if that is all threads'.
    """

    GLOBAL_BASE, SHARED_BASE, PARAMETER_BASE = 1 << 36, 1 << 24, 1 << 20

    def __init__(
        self,
        kernel: Kernel,
        arguments: Sequence[int | bytes],
        grid: tuple[int, int, int],
        blocks: Array,
        memory: GlobalMemory,
        shared_size: int,
        observer: Observer | None = None,
    ) -> None:
        if kernel.threads % WARP:
            raise PTXError(f"{kernel.name}: {kernel.threads} threads are no whole warps")
        self.kernel, self.memory, self._observer = kernel, memory, observer
        self.lanes = len(blocks) * kernel.threads
        lane = np.arange(self.lanes)
        self._block, self._thread = lane // kernel.threads, lane % kernel.threads
        self._warp = lane // WARP
        self._number = blocks[self._block]
        block = (*kernel.block, 1, 1)[:3]
        self.special = {
            name: np.asarray(value).reshape(-1).astype(np.uint32)
            for name, value in {
                "%laneid": self._thread % WARP,
                **_by_axis("%tid", _along(self._thread, block)),
                **_by_axis("%ntid", block),
                **_by_axis("%ctaid", _along(self._number, grid)),
                **_by_axis("%nctaid", grid),
            }.items()
        }
        self.symbols = {name: self.SHARED_BASE + offset for name, offset in kernel.symbols.items()}
        parameters = b""
        for (name, size), argument in zip(kernel.parameters.items(), arguments, strict=True):
            parameters += bytes(-len(parameters) % PARAMETER_ALIGNMENT)
            self.symbols[name] = self.PARAMETER_BASE + len(parameters)
            parameters += _bytes(argument, size)
        self.parameters: Array = np.frombuffer(parameters, np.uint8)
        self.registers: dict[str, Array] = {
            name: ~np.zeros(1, UNSIGNED[bits]) for name, bits in kernel.registers.items()
        }
        shared_size += kernel.shared_bytes
        self._shared_size = shared_size
        self.copies = Copies(self)
        self._epoch = np.zeros(len(blocks), np.int64)  # barriers that a block has passed
        shared = Layout()
        self._shared_places = np.array(
            [
                shared.place(
                    ~np.zeros(shared_size, np.uint8),
                    np.ones(shared_size, bool),
                    np.zeros(shared_size, bool),
                )
                for _ in blocks
            ]
        )
        self._shared = shared.memory(_cell(kernel, "shared"), is_shared=True)
        self._steps: dict[int, Step] = {}

    # What instructions ask for

    def of_all(self, values: Array) -> Array:
        """An element of every thread."""
        return np.ascontiguousarray(np.broadcast_to(values, self.lanes))

    def load(self, space: str, addresses: Array, size: int, lanes: Lanes) -> Array:
        """The bytes at the threads' addresses, # [threads, size]"""
        memory, places, threads = self._access(space, addresses, size, lanes)
        bytes_ = np.zeros((self.lanes, size), np.uint8)
        try:
            bytes_[threads] = memory.load(places, size, self._who(threads))
        except AccessError as bad:
            raise self._fault(bad, space, addresses, threads) from None
        return bytes_

    def store(self, space: str, addresses: Array, values: Array, lanes: Lanes) -> None:
        """Stores bytes, # [threads, size]"""
        memory, places, threads = self._access(space, addresses, values.shape[1], lanes)
        values = np.ascontiguousarray(values[threads])
        try:
            memory.store(places, values.shape[1], values, self._who(threads))
        except AccessError as bad:
            raise self._fault(bad, space, addresses, threads) from None

    def pass_barrier(self, lanes: Lanes) -> None:
        self._epoch[np.unique(self._block if lanes is None else self._block[lanes])] += 1

    def _access(
        self, space: str, addresses: Array, size: int, lanes: Lanes
    ) -> tuple[GlobalMemory, Array, Array]:
        """The memory, places in it, and the threads that access them."""
        threads = np.arange(self.lanes) if lanes is None else np.flatnonzero(lanes)
        addresses = addresses[threads]
        is_global = self._is_global(space, addresses)
        offsets = addresses - (self.GLOBAL_BASE if is_global else self.SHARED_BASE)
        if self._observer is not None:
            self._observer.accesses(space, offsets, size, threads)
        if is_global:
            return self.memory, offsets, threads
        inside = (offsets >= 0) & (offsets < self._shared_size)
        places = self._shared_places[self._block[threads]] + offsets
        return self._shared, np.where(inside, places, -16), threads

    def _is_global(self, space: str, addresses: Array) -> bool:
        if space != "generic":
            return space == "global"
        are_global = addresses >= self.GLOBAL_BASE
        if are_global.any() != are_global.all():
            raise PTXError("threads access different spaces at once")
        return bool(are_global.any())

    def _who(self, threads: Array) -> Array:
        block = self._block[threads]
        warp = self._thread[threads] // WARP
        return who(self._number[threads], self._epoch[block], warp)

    def _fault(self, bad: AccessError, space: str, addresses: Array, threads: Array) -> PTXError:
        thread = threads[bad.index]
        base = self.GLOBAL_BASE if self._is_global(space, addresses) else self.SHARED_BASE
        return PTXError(
            f"thread {self._thread[thread]} of block {self._number[thread]} {bad.reason}, "
            f"at {space} address {addresses[thread] - base:#x}"
        )

    def begin_copies(self, addresses: Array, size: int, lanes: Lanes) -> None:
        """Asynchronous ones, to shared memory."""
        _, places, threads = self._access("shared", addresses, size, lanes)
        try:
            self._shared.begin_copies(places, size, self._who(threads))
        except AccessError as bad:
            raise self._fault(bad, "shared", addresses, threads) from None

    def end_copies(self, addresses: Array, values: Array, threads: Array) -> None:
        """Of threads by their numbers; an element is a copy."""
        places = self._shared_places[self._block[threads]] + addresses - self.SHARED_BASE
        self._shared.end_copies(places, values.shape[1], values, self._who(threads))

    # Control

    def run(self) -> None:
        """Until all threads have ended."""
        groups = {0: np.ones(self.lanes, bool)}  # threads by the instruction they are at
        waiting: dict[int, Array] = {}  # those that need others
        steps = 0
        with np.errstate(all="ignore"):
            while groups:
                at = min(groups)
                threads = groups.pop(at) | waiting.pop(at, False)
                instruction = self.kernel.instructions[at]
                late = self._without_partners(instruction, threads)
                if late is not None and late.any():
                    waiting[at] = late
                    threads = threads & ~late
                try:
                    for to, some in self._execute(at, instruction, threads):
                        groups[to] = groups[to] | some if to in groups else some
                except PTXError as fault:
                    raise PTXError(f"{self.kernel.name}, {instruction}: {fault}") from None
                steps += 1
                if steps > MAX_STEPS:
                    raise PTXError(f"{self.kernel.name} does not end in {MAX_STEPS} instructions")
        for at, threads in waiting.items():
            first = int(threads.argmax())
            raise PTXError(
                f"{self.kernel.name}, {self.kernel.instructions[at]}: "
                f"thread {self._thread[first]} of block {self._number[first]} waits for others "
                "that never come"
            )

    def _without_partners(self, instruction: Instruction, threads: Array) -> Lanes:
        """Those of threads that need others which are not here."""
        scope = None if threads.all() else partners(instruction)
        if scope is None:
            return None
        of = self._block if scope == "block" else self._warp
        incomplete = np.zeros(of[-1] + 1, bool)
        incomplete[of[~threads]] = True
        return threads & incomplete[of]

    def _execute(
        self, at: int, instruction: Instruction, threads: Array
    ) -> Iterator[tuple[int, Array]]:
        """Does an instruction for threads; where they go from there."""
        if self._observer is not None:
            self._observer.executes(instruction, threads)
        active = threads
        if instruction.guard:
            predicate = self.registers[instruction.guard.lstrip("!")]
            active = threads & (predicate ^ instruction.guard.startswith("!"))
        if instruction.opcode in ("bra", "bra.uni"):
            (label,) = instruction.operands
            yield from self._go(self.kernel.labels[label], active)
            yield from self._go(at + 1, threads & ~active)
        elif instruction.opcode in ("ret", "exit"):
            yield from self._go(at + 1, threads & ~active)
        else:
            if at not in self._steps:
                self._steps[at] = step(self, instruction)
            if active.any():
                self._steps[at](None if active.all() else active)
            yield from self._go(at + 1, threads)

    @staticmethod
    def _go(to: int, threads: Array) -> Iterator[tuple[int, Array]]:
        if threads.any():
            yield to, threads


def _along(numbers: Array, sizes: Sequence[int]) -> tuple[Array, ...]:
    """Coordinates of numbered threads or blocks."""
    x, y, _ = sizes
    return numbers % x, numbers // x % y, numbers // (x * y)


def _by_axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}.{axis}": value for axis, value in zip("xyz", values, strict=True)}


def _bytes(argument: int | bytes, size: int) -> bytes:
    if isinstance(argument, bytes):
        if len(argument) != size:
            raise PTXError(f"an argument has {len(argument)} bytes; the kernel takes {size}")
        return argument
    return (argument & (1 << 8 * size) - 1).to_bytes(size, "little")


def _cell(kernel: Kernel, space: str) -> int:
    """The fewest bytes that one value of a space has."""
    smallest = CELL
    for instruction in kernel.instructions:
        name, *modifiers = instruction.opcode.split(".")
        if "matrix" in name:
            smallest = min(smallest, 2)
        elif name in ("ld", "st") and (space in modifiers or not SPACES & set(modifiers)):
            smallest = min(smallest, BITS[modifiers[-1]] // 8)
    return smallest


def run(
    kernel: Kernel,
    arguments: Sequence[int | bytes],
    grid: Sequence[int],
    layout: Layout,
    shared_size: int = 0,
    lanes: int = 1 << 13,
) -> Memory:
    """Global memory after all blocks of a grid ran, about ``lanes`` threads at a time."""
    x, y, z = (*grid, 1, 1)[:3]
    memory = layout.memory(_cell(kernel, "global"))
    blocks, at_once = np.arange(x * y * z), max(lanes // kernel.threads, 1)
    for first in range(0, len(blocks), at_once):
        some = blocks[first : first + at_once]
        Machine(kernel, arguments, (x, y, z), some, memory, shared_size).run()
    return memory
