"""What every instruction does, by opcode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ptx import moves, threads, values
from ptx.context import Context, Step, partners
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.machine import Machine

OPCODES: dict[str, Callable[[Context], Step]] = {
    **moves.OPCODES,
    **threads.OPCODES,
    **values.OPCODES,
}


def step(machine: Machine, instruction: Instruction) -> Step:
    """What the instruction does; unknown ones are a fault."""
    context = Context(machine, instruction)
    if partners(instruction) and instruction.guard:
        raise context.unknown()
    try:
        return OPCODES.get(context.name, values.computed)(context)
    except (IndexError, KeyError, ValueError):  # of operands or modifiers that it does not have
        raise context.unknown() from None
