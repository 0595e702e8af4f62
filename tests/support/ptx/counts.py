"""What a machine's warps do, counted: instructions, sectors of global memory, wavefronts of shared.

A sector is 32 bytes, aligned; an instruction of a warp moves every sector that any of its threads
touches once. Shared memory serves 32 banks of 4 bytes a wavefront: 32 threads of up to 4 bytes, 16
of 8 or 8 of 16 at a time, and as many wavefronts as one bank has different words.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ptx.instructions import WARP
from ptx.parse import Instruction

Array = npt.NDArray[Any]

SECTOR, BANKS, WORD = 32, 32, 4
ROW = 1 << 40  # more than any place


@dataclass
class Traffic:
    """Of loads or of stores; useful bytes are those that threads asked for, each once a warp."""

    instructions: int = 0  # of warps
    sectors: int = 0
    useful: int = 0  # bytes
    least: int = 0  # sectors or wavefronts that would do

    def add(self, instructions: int, sectors: int, useful: int, least: int) -> None:
        self.instructions += instructions
        self.sectors += sectors
        self.useful += useful
        self.least += least


@dataclass
class Counts:
    """An observer of a machine of blocks of ``threads`` threads."""

    threads: int
    executed: Counter[int] = field(default_factory=Counter)  # by line: warps
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    shared: Traffic = field(default_factory=Traffic)  # wavefronts instead of sectors
    loaded: set[int] = field(default_factory=set)  # sectors, with the block in upper bits
    stored: set[int] = field(default_factory=set)
    _instruction: Instruction | None = None
    _half: tuple[Array, Array] | None = None

    @property
    def instructions(self) -> int:
        """Of warps."""
        return sum(self.executed.values())

    def executes(self, instruction: Instruction, threads: Array) -> None:
        self._instruction = instruction
        self.executed[instruction.line] += int(threads.reshape(-1, WARP).any(axis=1).sum())

    def accesses(self, space: str, places: Array, size: int, threads: Array) -> None:
        assert self._instruction is not None
        if space == "global":
            self._global(places, size, threads, self._instruction.opcode.startswith("st"))
        elif "matrix" not in self._instruction.opcode:
            self._wavefronts(places, size, threads)
        elif self._half is None:  # a matrix is accessed in two halves
            self._half = places, threads
        else:
            halves, self._half = self._half, None
            self._wavefronts(
                np.concatenate([halves[0], places]), 2, np.concatenate([halves[1], threads])
            )

    def _global(self, places: Array, size: int, threads: Array, stores: bool) -> None:
        warps = threads // WARP
        sectors = np.unique(warps * ROW + places // SECTOR)
        asked = np.unique(warps * ROW + places // size)
        of_warps = np.unique(asked // ROW, return_counts=True)[1] * size
        (self.stores if stores else self.loads).add(
            len(of_warps), len(sectors), len(asked) * size, int((-(-of_warps // SECTOR)).sum())
        )
        blocks = threads // self.threads
        (self.stored if stores else self.loaded).update(
            np.unique(blocks * ROW + places // SECTOR).tolist()
        )

    def _wavefronts(self, places: Array, size: int, threads: Array) -> None:
        together = WARP // max(size // WORD, 1)  # threads of a wavefront
        group = threads // together
        words = np.unique(
            (group * ROW)[:, None] + places[:, None] // WORD + np.arange(max(size // WORD, 1))
        )
        of_bank, times = np.unique(words // ROW * BANKS + words % BANKS, return_counts=True)
        groups, first = np.unique(of_bank // BANKS, return_index=True)
        wavefronts = int(np.maximum.reduceat(times, first).sum())
        warps = len(np.unique(threads // WARP))
        self.shared.add(warps, wavefronts, len(words) * WORD, len(groups))
