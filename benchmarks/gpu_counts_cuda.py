"""What can be counted of a launch of a kernel in CUDA C++ without a device: as of Triton's.

The emulator of the tests (``tests/support/cuda``) records what a call launches, with addresses that
the memory of samples gives to its tensors; nvcc compiles the kernels, whose PTX is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cuda.emulation import Call, Launch
from cuda.launch import Launcher
from cuda.proof import emulated
from cuda.sources import Program, nvcc
from gpu_counts import (
    COUNTED,
    COUNTED_ON,
    Assembled,
    estimated,
    machine_code,
    moved,
    own_source,
    widths,
)
from ptx.counts import Array, Counts
from ptx.parse import Kernel, parse
from ptx.sample import SampledMemory, count
from torch import Tensor
from triton_offline import inspect, kept

ONE = {
    "fma.rn.f32": "FFMA", "ld.global": "LDG", "st.global": "STG", "ld.shared": "LDS",
    "st.shared": "STS",
}  # fmt: skip
ARCHS = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}  # as the library has them


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A launch, and the tensors of the call that makes it."""

    program: Program
    launch: Launch
    tensors: tuple[Tensor, ...]
    memory: SampledMemory  # has their addresses

    @property
    def name(self) -> str:
        """As the source has it: ``_ZN8fastfuse4cuda4NAMEI...`` says how long its parts are."""
        rest, name = self.launch.kernel.removeprefix("_ZN"), ""
        while part := re.match(r"\d+", rest):
            end = part.end() + int(part[0])
            name, rest = rest[part.end() : end], rest[end:]
        return name


class _Recorder(Launcher):
    def __init__(self) -> None:
        super().__init__(seed=0)
        self.memory = SampledMemory()
        self.recorded: list[Recorded] = []

    def _address(self, tensor: Tensor) -> int:
        return self.memory.address(tensor)

    def _run(self, program: Program, call: Call, tensors: Sequence[Tensor]) -> None:
        for launch in emulated(program).launches(call):
            self.recorded.append(Recorded(program, launch, tuple(tensors), self.memory))


def recorded(call: Callable[[], Any]) -> list[Recorded]:
    """What ``call`` launches, in order; nothing is run."""
    with _Recorder() as recorder:
        call()
    return recorder.recorded


def _alone(ptx: str, kernel: str) -> str:
    """A module with one of its kernels; lines keep their numbers."""
    lines, is_kept = [], True
    for line in ptx.split("\n"):
        if entry := re.search(r"\.entry\s+([\w$]+)", line):
            is_kept = entry[1] == kernel
        lines.append(line if is_kept else "")
        is_kept = is_kept or line == "}"
    return "\n".join(lines)


@cache
def assembled(program: Program, kernel: str, arch: int) -> Assembled:
    """As ``gpu_counts.assembled``; the shared memory is that of variables."""
    ptx = _alone(program.ptx(ARCHS[arch]), kernel)
    key = hashlib.sha256(f"{ptx}{_version()}{own_source()}{_own_text()}".encode()).hexdigest()

    def make() -> Assembled:
        with tempfile.TemporaryDirectory() as directory:
            source, made = Path(directory) / "kernel.ptx", Path(directory) / "kernel.cubin"
            source.write_text(ptx, encoding="utf-8")
            command = [nvcc(), f"-arch={ARCHS[arch]}", "-cubin", "-Xptxas=-lineinfo", source]
            subprocess.run([*command, "-o", made], check=True)
            cubin = made.read_bytes()
        return {
            **inspect({"cubin": cubin, "ptx": ptx}),
            **widths(ptx),
            "ptx": ptx,
            "shared": parse(ptx, kernel).shared_bytes,
            "machine": machine_code(cubin),
        }

    return kept(COUNTED / f"{key}.json", make)


@cache
def _version() -> str:
    """Of the compiler, that is of its assembler."""
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def release() -> str:
    """Of nvcc; ``MissingCompilerError`` if there is none."""
    found = re.search(r"release ([\d.]+)", _version())
    return found[1] if found else "unknown"


@cache
def _own_text() -> str:
    return Path(__file__).read_text(encoding="utf-8")


def rolled(kernel: Kernel, code: dict[str, list[str]]) -> dict[str, list[str]]:
    """Machine instructions by lines, with one round of each loop that the assembler unrolled."""
    ends = {*kernel.labels.values(), len(kernel.instructions)}
    ends |= {n + 1 for n, i in enumerate(kernel.instructions) if i.opcode.startswith("bra")}
    found, begin = dict(code), 0
    for end in sorted(ends):
        lines = {str(i.line): i.opcode for i in kernel.instructions[begin:end]}
        rounds = [_rounds(opcode, code.get(line, [])) for line, opcode in lines.items()]
        for line in lines:
            times = Counter(code.get(line, []))
            found[line] = [c for c, n in times.items() for _ in range(-(-n // max(rounds)))]
        begin = end
    return found


def _rounds(opcode: str, made: list[str]) -> int:
    """As how often an instruction is there of which one is made."""
    one = next((name for begin, name in ONE.items() if opcode.startswith(begin)), None)
    return max(sum(code.startswith(one) for code in made), 1) if one else 1


def counted(launched: Recorded) -> dict[str, Any]:
    """As ``gpu_counts.counted``."""
    launch, tensors, memory = launched.launch, launched.tensors, launched.memory
    made = assembled(launched.program, launch.kernel, COUNTED_ON)
    described = [(t.dtype, tuple(t.shape), t.stride(), memory.address(t)) for t in tensors]
    tags = [made["ptx"], str(launch), str(described), own_source(), _own_text()]
    key = hashlib.sha256("\0".join(tags).encode()).hexdigest()

    def make() -> dict[str, Any]:
        kernel: Kernel = dataclasses.replace(parse(made["ptx"], launch.kernel), block=launch.block)

        def run(blocks: Array) -> tuple[Counts, int, int]:
            counts, read, written = count(
                kernel, launch.arguments, launch.grid, blocks, launch.shared_bytes, memory
            )
            return (counts, *moved({"tensors": tensors}, read, written))

        return estimated(kernel, rolled(kernel, made["machine"]), launch.grid, run)

    return kept(COUNTED / f"{key}.json", make)
