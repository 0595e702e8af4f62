"""The text of PTX: kernels, their instructions and what they declare."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

# Bits of PTX's types.
BITS = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32},
}
NAME = r"%?[\w$]+"
# Comments, and what is for debuggers.
SILENT = re.compile(r"//.*|^[ \t]*\.(?:loc|file)[ \t].*", re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{\n")
MEMORY = re.compile(rf"(\.extern )?\.shared (?:\.align (\d+) )?\.(\w+) ({NAME})(?:\[(\d*)\])?")


class PTXError(Exception):
    """What is wrong with a kernel, and where."""


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: "ld.global.v4.b32"
    operands: tuple[str, ...]
    guard: str | None  # the predicate it depends on, "!%p1" if that is to be false
    line: int

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"line {self.line}: {guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass
class Kernel:
    name: str
    block: tuple[int, ...]  # its threads along x, y, z; the most of them, if a launch tells
    parameters: dict[str, int] = field(default_factory=dict)  # their bytes
    registers: dict[str, int] = field(default_factory=dict)  # their bits
    symbols: dict[str, int] = field(default_factory=dict)  # offsets in shared memory
    shared_bytes: int = 0  # of variables; memory whose size a launch tells comes behind
    labels: dict[str, int] = field(default_factory=dict)  # indices of instructions
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def threads(self) -> int:
        """Of a block."""
        return prod(self.block)


def parse(ptx: str, name: str | None = None) -> Kernel:
    """A kernel of a module, which has no other if it is not named."""
    lines = [line.strip() for line in SILENT.sub("", ptx).split("\n")]
    text = "\n".join(lines)
    entries = [entry for entry in ENTRY.finditer(text) if name in (None, entry[1])]
    if len(entries) != 1:
        raise PTXError(f"expected one kernel{f' {name}' if name else ''}; got {len(entries)}")
    (entry,) = entries
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+(?:\s*,\s*\d+)*)", entry[3])
    if threads is None:
        raise PTXError(f"{entry[1]}: does not say how many threads it has")
    kernel = Kernel(entry[1], tuple(map(int, threads[1].split(","))))
    for declared in filter(None, map(str.strip, entry[2].split(","))):
        _declare_parameter(kernel, declared)
    reader = _Reader(kernel)
    outside = text[: text.find(".entry")]
    for declared in re.findall(r"^(?:\.extern )?\.shared [^;]*(?=;)", outside, re.MULTILINE):
        reader.statement(" ".join(declared.split()), 0)
    first = text.count("\n", 0, entry.end())
    for number, line in enumerate(_body(lines[first:]), first + 1):
        reader.line(line, number)
    # Memory whose size a launch gives.
    for symbol, alignment in reader.dynamic.items():
        kernel.shared_bytes = -(-kernel.shared_bytes // alignment) * alignment
        kernel.symbols[symbol] = kernel.shared_bytes
    return kernel


def _declare_parameter(kernel: Kernel, declared: str) -> None:
    """``.param .u64 .ptr .global .align 1 NAME`` or ``.param .align 4 .b8 NAME[12]``"""
    *words, name = declared.split()
    kind = next(word[1:] for word in words if word[1:] in BITS)
    name, _, count = name.rstrip("]").partition("[")
    kernel.parameters[name] = BITS[kind] // 8 * int(count or 1)


def _body(lines: list[str]) -> Iterator[str]:
    """Lines up to the brace that closes the one before them."""
    depth = 1
    for line in lines:
        depth += line.count("{") - line.count("}")
        if depth == 0:
            return
        yield line


class _Reader:
    """Reads statements into a kernel. Registers declared in inner braces are those braces' own."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._scopes: list[dict[str, str]] = [{}]  # names that registers have in the kernel
        self._count = 0  # of scopes, so far
        self.dynamic: dict[str, int] = {}  # symbols, their alignments

    def line(self, line: str, number: int) -> None:
        """Whole statements, labels and braces."""
        while line := line.strip():
            if line[0] == "{":
                self._count += 1
                self._scopes.append({})
                line = line[1:]
            elif line[0] == "}":
                self._scopes.pop()
                line = line[1:]
            elif label := re.match(r"([\w$]+):", line):
                self._kernel.labels[label[1]] = len(self._kernel.instructions)
                line = line[label.end() :]
            else:
                statement, semicolon, line = line.partition(";")
                if not semicolon:
                    raise PTXError(
                        f"{self._kernel.name}, line {number}: half a statement: {statement}"
                    )
                self.statement(" ".join(statement.split()), number)

    def statement(self, statement: str, line: int) -> None:
        kernel = self._kernel
        if registers := re.fullmatch(r"\.reg \.(\w+) (.*)", statement):
            for declared in registers[2].split(","):
                self._declare(declared.strip(), BITS[registers[1]])
        elif memory := MEMORY.fullmatch(statement):
            self._declare_memory(*memory.groups())
        elif statement.startswith(".pragma"):
            pass
        elif statement.startswith("."):
            raise PTXError(f"{kernel.name}, line {line}: unknown declaration {statement}")
        elif statement:
            statement = self._renamed(statement)
            guard, _, rest = (
                statement.partition(" ") if statement[0] == "@" else ("", "", statement)
            )
            opcode, _, operands = rest.partition(" ")
            kernel.instructions.append(
                Instruction(opcode, _operands(operands), guard[1:] or None, line)
            )

    def _declare(self, declared: str, bits: int) -> None:
        """``NAME`` or ``NAME<count>``"""
        name, _, count = declared.rstrip(">").partition("<")
        names = [f"{name}{i}" for i in range(int(count))] if count else [name]
        for name in names:
            own = name if len(self._scopes) == 1 else f"{name}.{self._count}"
            self._scopes[-1][name] = own
            self._kernel.registers[own] = bits

    def _declare_memory(
        self, extern: str | None, alignment: str | None, kind: str, name: str, count: str | None
    ) -> None:
        size = BITS[kind] // 8
        if extern:
            self.dynamic[name] = int(alignment or size)
            return
        step = int(alignment or size)
        begin = -(-self._kernel.shared_bytes // step) * step
        self._kernel.symbols[name] = begin
        self._kernel.shared_bytes = begin + size * int(count or 1)

    def _renamed(self, statement: str) -> str:
        if len(self._scopes) == 1:
            return statement

        def own(found: re.Match[str]) -> str:
            name = found[0]
            return next((s[name] for s in reversed(self._scopes) if name in s), name)

        return re.sub(NAME, own, statement)


def _operands(text: str) -> tuple[str, ...]:
    """Operands; those in braces or brackets are one."""
    return tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", text))


def members(operand: str) -> list[str]:
    """The registers of a vector, or the one that is there."""
    return operand.strip("{} ").replace(",", " ").split()
