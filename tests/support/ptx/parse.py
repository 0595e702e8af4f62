"""The text of PTX: kernels, their instructions and what they declare."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Bits of PTX's types.
BITS = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32},
}


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
    threads: int  # of a block
    parameters: dict[str, str] = field(default_factory=dict)  # their types
    registers: dict[str, int] = field(default_factory=dict)  # their bits
    symbols: dict[str, int] = field(default_factory=dict)  # offsets in shared memory
    labels: dict[str, int] = field(default_factory=dict)  # indices of instructions
    instructions: list[Instruction] = field(default_factory=list)


def parse(ptx: str) -> Kernel:
    """The one kernel of a module, as LLVM writes it: a line has whole statements."""
    lines = [re.sub(r"//.*|^\s*\.(loc|file)\s.*", "", line).strip() for line in ptx.split("\n")]
    entries = list(
        re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{\n", text := "\n".join(lines))
    )
    if len(entries) != 1:
        raise PTXError(f"expected one kernel; got {len(entries)}")
    (entry,) = entries
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    if threads is None:
        raise PTXError(f"{entry[1]}: does not say how many threads it has")
    kernel = Kernel(entry[1], int(threads[1]))
    for declared in filter(None, map(str.strip, entry[2].split(","))):
        _, kind, *_, name = declared.split()  # .param .u64 .ptr .global .align 1 NAME
        kernel.parameters[name] = kind.lstrip(".")
    # Memory whose size a launch gives begins where memory of a block does.
    for declared in re.findall(r"\.shared\s.*?([\w$]+)\[\];", text[: entry.start()]):
        kernel.symbols[declared] = 0
    first = text.count("\n", 0, entry.end())
    for number, line in enumerate(lines[first : lines.index("}", first)], first + 1):
        if label := re.fullmatch(r"([\w$]+):", line):
            kernel.labels[label[1]] = len(kernel.instructions)
            continue
        *statements, rest = line.removeprefix("{ ").split(";")  # a scope of inline assembly
        if rest.strip(" }"):
            raise PTXError(f"{kernel.name}, line {number}: half a statement: {rest}")
        for statement in statements:
            _read(kernel, " ".join(statement.split()), number)
    return kernel


def _read(kernel: Kernel, statement: str, line: int) -> None:
    if registers := re.fullmatch(r"\.reg \.(\w+) (%?\w+)(?:<(\d+)>)?", statement):
        kind, name, count = registers.groups()
        names = [f"{name}{i}" for i in range(int(count))] if count else [name]
        kernel.registers.update(dict.fromkeys(names, BITS[kind]))
    elif statement.startswith(".pragma"):
        pass
    elif statement.startswith("."):
        raise PTXError(f"{kernel.name}, line {line}: unknown declaration {statement}")
    else:
        guard, _, rest = statement.partition(" ") if statement[0] == "@" else ("", "", statement)
        opcode, _, operands = rest.partition(" ")
        kernel.instructions.append(
            Instruction(opcode, _operands(operands), guard[1:] or None, line)
        )


def _operands(text: str) -> tuple[str, ...]:
    """Operands; those in braces or brackets are one."""
    return tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", text))


def members(operand: str) -> list[str]:
    """The registers of a vector, or the one that is there."""
    return operand.strip("{} ").replace(",", " ").split()
