"""Calls of a C interface whose kernels g++ built: they run on CPU tensors, checked."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ptx.storages import Storage

# Calls a function of the library with pointers of tensors; gives its error, 0 for none.
Call = Callable[[ctypes.CDLL], int]
VARIABLE = re.compile(r"_Z(GV)?ZN8fastfuse4cuda")


class EmulationError(Exception):
    """What is wrong with a kernel, and where."""


@dataclass(frozen=True)
class Launch:
    """Of a kernel by its mangled name; the bytes of its arguments."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[bytes, ...]

    @classmethod
    def parse(cls, line: str) -> Launch:
        kernel, *words = line.split()
        numbers = list(map(int, words[:7]))
        grid, block = (numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5])
        return cls(kernel, grid, block, numbers[6], tuple(map(bytes.fromhex, words[7:])))


class Emulator:
    """A library that g++ built."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.library = ctypes.CDLL(str(path))
        for name in ("launches", "fault"):
            getattr(self.library, f"fastfuse_emulator_{name}").restype = ctypes.c_char_p
        self.library.fastfuse_emulator_fault_offset.restype = ctypes.c_size_t
        symbols = subprocess.run(
            ["nm", "-f", "sysv", "--defined-only", path], capture_output=True, text=True, check=True
        )
        rows = [[word.strip() for word in line.split("|")] for line in symbols.stdout.splitlines()]
        self._variables = [  # static ones of functions, and their guards: where, size, which
            (int(row[1], 16), int(row[4], 16), int(found[1] is not None))
            for row in rows
            if len(row) == 7 and row[6] == ".bss" and (found := VARIABLE.match(row[0]))
        ]

    def run(self, call: Call, memory: Iterable[Storage], seed: int) -> None:
        """Threads and blocks in order (seed 0), in reverse (1) or at random."""
        self._begin(memory, seed, records_only=False)
        error = call(self.library)
        if fault := self.library.fastfuse_emulator_fault().decode():
            raise EmulationError(f"{fault}{self._where()} (seed {seed})")
        if error != 0:
            raise EmulationError(f"the call gives error {error}")

    def launches(self, call: Call) -> list[Launch]:
        """Those that a call makes; nothing runs."""
        self._begin([], 0, records_only=True)
        error = call(self.library)
        if error != 0:
            raise EmulationError(
                f"the call gives error {error}: {self.library.fastfuse_emulator_fault().decode()}"
            )
        return list(
            map(Launch.parse, self.library.fastfuse_emulator_launches().decode().splitlines())
        )

    def _begin(self, memory: Iterable[Storage], seed: int, records_only: bool) -> None:
        self.library.fastfuse_emulator_begin(seed, int(records_only))
        for offset, size, is_guard in self._variables:
            self.library.fastfuse_emulator_variable(
                ctypes.c_size_t(offset), ctypes.c_size_t(size), is_guard
            )
        for storage in memory:
            self.library.fastfuse_emulator_tensor(
                ctypes.c_void_p(storage.address),
                ctypes.c_size_t(storage.size),
                storage.valid.ctypes.data_as(ctypes.c_void_p),
                storage.written.ctypes.data_as(ctypes.c_void_p),
            )

    def _where(self) -> str:
        """The line of the source at fault."""
        offset = self.library.fastfuse_emulator_fault_offset()
        if offset == 0:
            return ""
        found = subprocess.run(
            ["addr2line", "-i", "-e", self._path, hex(offset - 1)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        frames = [frame.split(" ")[0] for frame in found.stdout.splitlines()]
        return ", " + " in ".join("/".join(frame.split("/")[-2:]) for frame in frames)
