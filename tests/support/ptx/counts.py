"""What a machine's warps do, counted: instructions, sectors of global memory, wavefronts of shared.

A sector is 32 bytes, aligned; an instruction of a warp moves every sector that any of its threads
touches once. Shared memory serves 32 banks of 4 bytes a wavefront: 32 threads of up to 4 bytes, 16
of 8 or 8 of 16 at a time, and as many wavefronts as one bank has different words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ptx.context import WARP
from ptx.parse import Instruction

Array = npt.NDArray[Any]

SECTOR, BANKS, WORD = 32, 32, 4
ROW = 1 << 40  # more than any place


@dataclass
class Traffic:
    """What instructions move; useful bytes are those that threads asked for, each once a warp.

    Of shared memory wavefronts stand in the place of sectors.
    """

    instructions: int = 0  # of warps
    sectors: int = 0
    useful: int = 0  # bytes
    least: int = 0  # sectors or wavefronts that would do

    def add(self, instructions: int, sectors: int, useful: int, least: int) -> None:
        self.instructions += instructions
        self.sectors += sectors
        self.useful += useful
        self.least += least

    @classmethod
    def sum(cls, parts: Iterable[Traffic]) -> Traffic:
        total = cls()
        for part in parts:
            total.add(part.instructions, part.sectors, part.useful, part.least)
        return total


@dataclass
class Counts:
    """An observer of a machine of blocks of ``threads`` threads."""

    threads: int
    executed: Counter[int] = field(default_factory=Counter)  # by line: warps
    # By instruction, with its space.
    traffic: dict[tuple[Instruction, str], Traffic] = field(
        default_factory=lambda: defaultdict(Traffic)
    )
    loaded: list[Array] = field(default_factory=list)  # sectors, below the block's number
    stored: list[Array] = field(default_factory=list)
    _instruction: Instruction | None = None
    _half: tuple[Array, Array] | None = None

    @property
    def instructions(self) -> int:
        """Of warps."""
        return sum(self.executed.values())

    @property
    def loads(self) -> Traffic:
        """Copies to shared memory are too."""
        return self._of("global", ("ld", "cp"))

    @property
    def stores(self) -> Traffic:
        return self._of("global", "st")

    @property
    def shared(self) -> Traffic:
        return self._of("shared", "")

    def _of(self, space: str, name: str | tuple[str, ...]) -> Traffic:
        return Traffic.sum(
            traffic
            for (instruction, where), traffic in self.traffic.items()
            if where == space and instruction.opcode.startswith(name)
        )

    @property
    def sectors_of_blocks(self) -> int:
        """Those that a block loads, each once, and those that it stores."""
        return sum(len(_distinct(np.concatenate(s))) for s in (self.loaded, self.stored) if s)

    def executes(self, instruction: Instruction, threads: Array) -> None:
        self._instruction = instruction
        self.executed[instruction.line] += int(threads.reshape(-1, WARP).any(axis=1).sum())

    def accesses(self, space: str, places: Array, size: int, threads: Array) -> None:
        assert self._instruction is not None
        if len(threads) == 0:  # copies that all write zeros
            return
        if space == "global":
            self._sectors(places, size, threads)
        elif "matrix" not in self._instruction.opcode:
            self._wavefronts(places, size, threads)
        elif self._half is None:  # a matrix is accessed in two halves
            self._half = places, threads
        else:
            halves, self._half = self._half, None
            self._wavefronts(
                np.concatenate([halves[0], places]), 2, np.concatenate([halves[1], threads])
            )

    def _add(self, space: str, *numbers: int) -> None:
        assert self._instruction is not None
        self.traffic[self._instruction, space].add(*numbers)

    def _sectors(self, places: Array, size: int, threads: Array) -> None:
        assert self._instruction is not None
        values = _distinct(threads // WARP * ROW + places // size)  # in order of warps
        warps = values // ROW
        sectors = _changing(warps * ROW + values % ROW * size // SECTOR)
        useful = np.diff(np.flatnonzero(_changes(warps)), append=len(warps)) * size  # of each warp
        least = int((-(-useful // SECTOR)).sum())
        self._add("global", len(useful), len(sectors), int(useful.sum()), least)
        blocks = sectors // ROW // (self.threads // WARP)
        stores = self._instruction.opcode.startswith("st")
        (self.stored if stores else self.loaded).append(_distinct(blocks * ROW + sectors % ROW))

    def _wavefronts(self, places: Array, size: int, threads: Array) -> None:
        together = WARP // max(size // WORD, 1)  # threads of a wavefront
        group = threads // together
        words = _distinct(
            (
                (group * ROW)[:, None] + places[:, None] // WORD + np.arange(max(size // WORD, 1))
            ).ravel()
        )
        banks = np.sort(words // ROW * BANKS + words % BANKS)
        first = np.flatnonzero(_changes(banks))
        times = np.diff(first, append=len(banks))
        groups = np.flatnonzero(_changes(banks[first] // BANKS))
        wavefronts = int(np.maximum.reduceat(times, groups).sum())
        warps = len(_distinct(threads // WARP))
        self._add("shared", warps, wavefronts, len(words) * WORD, len(groups))


def _changes(values: Array) -> Array:
    """A mask of the values that are not the one before."""
    return np.concatenate([[True], values[1:] != values[:-1]])


def _changing(values: Array) -> Array:
    return values[_changes(values)]


def _distinct(values: Array) -> Array:
    """In order; of a few thousand integers a fraction of the time of ``np.unique``."""
    return _changing(np.sort(values))
