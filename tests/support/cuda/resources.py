"""What a device is asked for by every kernel of a program: registers, memory, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from workers import write

from cuda.sources import MissingCompilerError, Program

SPILLS = ("STL", "LDL")  # to and from local memory


@dataclass
class Resources:
    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory
    shared: int  # bytes of a block's variables, and what the system has
    opcodes: Counter[str] = field(default_factory=Counter)  # instructions, without modifiers

    @property
    def instructions(self) -> int:
        return self.opcodes.total() - self.opcodes["NOP"]

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return sum(self.opcodes[opcode] for opcode in SPILLS)


def cuobjdump() -> Path:
    if found := shutil.which("cuobjdump"):
        return Path(found)
    try:
        from triton_offline import CUOBJDUMP
    except ImportError:
        raise MissingCompilerError(
            "needs cuobjdump; it is on no PATH, and there is no triton"
        ) from None
    return CUOBJDUMP


@cache
def resources(program: Program, arch: str) -> dict[str, Resources]:
    """By the mangled name."""
    usage = _dumped(program, arch, "-res-usage")
    found = {
        name: Resources(int(registers), int(stack), int(shared))
        for name, registers, stack, shared in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        )
    }
    name = ""
    for line in _dumped(program, arch, "-sass").splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            name = function[1]
        elif opcode := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z]\w*)", line):
            found[name].opcodes[opcode[1]] += 1
    return found


def _dumped(program: Program, arch: str, what: str) -> str:
    cubin = program.cubin(arch)
    kept = cubin.with_name(f"{cubin.name}{what}")
    if not kept.exists():
        command = [str(cuobjdump()), what, str(cubin)]
        dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        write(kept, dumped)
    return kept.read_text(encoding="utf-8")
