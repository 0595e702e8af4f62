"""An instruction of a machine's, as what does it sees it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptx.arithmetic import UNSIGNED, decode, encode
from ptx.parse import BITS, Instruction, PTXError

if TYPE_CHECKING:
    from ptx.machine import Machine

Array = npt.NDArray[Any]
Lanes = Array | None  # a mask of threads; None: all
Step = Callable[[Lanes], None]  # does the instruction for some threads
Read = Callable[[], Array]
Write = Callable[[Array, Lanes], None]

# Instructions that threads do together, and with whom.
TOGETHER = {
    **dict.fromkeys(("bar.sync", "bar.red"), "block"),
    **dict.fromkeys(("bar.warp", "shfl", "vote", "redux", "ldmatrix", "stmatrix", "mma"), "warp"),
}
WARP = 32
# A number as PTX writes it: the bits of a floating one, or an integer.
NUMBER = re.compile(r"0[fd](?P<bits>[0-9A-F]+)|(?P<integer>-?(?:0x[0-9A-F]+|\d+))U?", re.I)


class Context:
    """An instruction of a machine's: its modifiers, types and operands."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine, self.instruction = machine, instruction
        self.name, *rest = instruction.opcode.split(".")
        self.kinds = [word for word in rest if word in BITS]
        self.modifiers = [word for word in rest if word not in BITS]
        self.operands = instruction.operands

    @property
    def kind(self) -> str:
        return self.kinds[-1]

    def unknown(self) -> PTXError:
        return PTXError(f"unknown instruction {self.instruction.opcode}")

    def expect(self, *modifiers: str) -> None:
        if self.modifiers != list(modifiers):
            raise self.unknown()

    def drop(self, *modifiers: str) -> None:
        """Forgets those that change nothing here."""
        self.modifiers = [word for word in self.modifiers if word not in modifiers]

    def read(self, operand: str, kind: str) -> Read:
        """A function that gives an operand's values, of all threads or one for all."""
        machine = self.machine
        if operand in machine.kernel.registers:
            registers, bits = machine.registers, BITS[kind]
            if machine.kernel.registers[operand] < bits:
                raise self.unknown()
            return lambda: decode(registers[operand], kind)
        value = machine.special.get(operand)
        if value is None:
            value = self._constant(operand, kind)
        decoded = decode(value, kind)
        return lambda: decoded

    def _constant(self, operand: str, kind: str) -> Array:
        symbols = self.machine.symbols
        if operand in symbols:
            number = symbols[operand]
        elif found := NUMBER.fullmatch(operand):
            number = int(found["bits"], 16) if found["bits"] else int(found["integer"], 0)
        else:
            raise PTXError(f"unknown operand {operand}")
        dtype = UNSIGNED[BITS[kind]]
        return np.array([number & (1 << BITS[kind]) - 1]).astype(dtype)

    def write(self, operand: str, kind: str) -> Write:
        if operand == "_":
            return lambda values, lanes: None
        registers = self.machine.registers
        width = self.machine.kernel.registers[operand]
        if width < BITS[kind]:
            raise self.unknown()

        def write(values: Array, lanes: Lanes) -> None:
            bits = encode(values, kind, width)
            if lanes is not None:
                bits = np.where(lanes, bits, registers[operand])
            registers[operand] = bits

        return write

    def address(self, operand: str) -> Read:
        """A function that gives the addresses of all threads, or one for all."""
        base, _, offset = operand.strip("[] ").partition("+")
        base = base.strip()
        width = self.machine.kernel.registers.get(base, 64)  # else a constant
        read, added = self.read(base, f"u{width}"), int(offset or "0", 0)
        return lambda: read().astype(np.int64) + added

    def addresses(self, operand: str) -> Read:
        """A function that gives the address of every thread."""
        address, of_all = self.address(operand), self.machine.of_all
        return lambda: of_all(address())


def partners(instruction: Instruction) -> str | None:
    """Those that a thread does it together with: its "warp" or "block"."""
    opcode = f"{instruction.opcode}."
    return next((of for name, of in TOGETHER.items() if opcode.startswith(f"{name}.")), None)


def predicate(context: Context, operand: str) -> Read:
    """That one, or its opposite."""
    read = context.read(operand.lstrip("!"), "pred")
    return (lambda: ~read()) if operand.startswith("!") else read
