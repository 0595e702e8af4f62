"""What every instruction does, by opcode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptx.arithmetic import (
    COMPARISONS,
    FLOATING,
    FLOATS,
    INTEGERS,
    PREDICATES,
    TO_INTEGER,
    UNSIGNED,
    decode,
    encode,
    flushing,
    is_floating,
    saturate,
)
from ptx.parse import BITS, Instruction, PTXError, members

if TYPE_CHECKING:
    from ptx.machine import Machine

Array = npt.NDArray[Any]
Lanes = Array | None  # a mask of threads; None: all
Step = Callable[[Lanes], None]  # does the instruction for some threads
Read = Callable[[], Array]
Write = Callable[[Array, Lanes], None]

# Instructions that threads do together, and with whom.
TOGETHER = {
    "bar.sync": "block",
    **dict.fromkeys(("bar.warp", "shfl", "redux", "ldmatrix", "stmatrix"), "warp"),
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
        symbols = self.machine.kernel.symbols
        if operand in symbols:
            number = self.machine.SHARED_BASE + symbols[operand]
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
        """A function that gives the addresses of all threads."""
        base, _, offset = operand.strip("[] ").partition("+")
        base, machine = base.strip(), self.machine
        width = machine.kernel.registers.get(base, 32)  # else a constant
        read, added = self.read(base, f"u{width}"), int(offset or "0", 0)
        return lambda: machine.of_all(read()).astype(np.int64) + added


def partners(instruction: Instruction) -> str | None:
    """Those that a thread does it together with: its "warp" or "block"."""
    opcode = f"{instruction.opcode}."
    return next((of for name, of in TOGETHER.items() if opcode.startswith(f"{name}.")), None)


def step(machine: Machine, instruction: Instruction) -> Step:
    """What the instruction does; unknown ones are a fault."""
    context = Context(machine, instruction)
    if partners(instruction) and instruction.guard:
        raise context.unknown()
    try:
        return OPCODES.get(context.name, _computed)(context)
    except (IndexError, KeyError, ValueError):  # of operands or modifiers that it does not have
        raise context.unknown() from None


# Memory


def _vector(context: Context) -> tuple[str, int]:
    """The space and how many values a thread moves."""
    space, *vector = context.modifiers
    if vector not in ([], ["v2"], ["v4"]) or space not in ("global", "shared", "param"):
        raise context.unknown()
    return space, int(vector[0][1]) if vector else 1


def _load(context: Context) -> Step:
    (target, source), kind = context.operands, context.kind
    space, count = _vector(context)
    kind = kind if kind[0] == "s" else f"b{BITS[kind]}"
    writes = [context.write(register, kind) for register in members(target)]
    if space == "param":
        (write,) = writes
        value = decode(context.machine.parameters[source.strip("[] ")], kind)
        return lambda lanes: write(value, lanes)
    address, size = context.address(source), BITS[kind] // 8

    def load(lanes: Lanes) -> None:
        loaded = context.machine.load(space, address(), count * size, lanes)
        for write, values in zip(writes, loaded.view(UNSIGNED[BITS[kind]]).T, strict=True):
            write(decode(values, kind), lanes)

    return load


def _store(context: Context) -> Step:
    target, source = context.operands
    space, count = _vector(context)
    reads = [context.read(register, f"b{BITS[context.kind]}") for register in members(source)]
    address = context.address(target)

    def store(lanes: Lanes) -> None:
        values = np.stack([context.machine.of_all(read()) for read in reads], axis=1)
        context.machine.store(space, address(), values.view(np.uint8), lanes)

    if len(reads) != count:
        raise context.unknown()
    return store


def _matrix(context: Context) -> Step:
    """8 x 8 values of 16 bits: thread i has the address of row i % 8 of matrix i // 8.

    Thread i holds values 2 * (i % 4) and the next of row i // 4; of the column, if transposed.
    """
    loads = context.name == "ldmatrix"
    registers, rows = context.operands if loads else context.operands[::-1]
    names, machine = members(registers), context.machine
    transposed = ["trans"] if "trans" in context.modifiers else []
    context.expect("sync", "aligned", "m8n8", f"x{len(names)}", *transposed, "shared")
    address = context.address(rows)
    reads = [context.read(name, "b32") for name in names]
    writes = [context.write(name, "b32") for name in names]
    lane = np.arange(machine.lanes) % WARP
    first = np.arange(machine.lanes) - lane

    def pieces(matrix: int) -> list[Array]:
        """Addresses of a thread's two values."""
        starts, across, along = address(), lane // 4, 2 * (lane % 4)
        if transposed:
            return [starts[first + 8 * matrix + along + half] + 2 * across for half in (0, 1)]
        start = starts[first + 8 * matrix + across]
        return [start + 2 * (along + half) for half in (0, 1)]

    def move(lanes: Lanes) -> None:
        used = address()[(lane < 8 * len(names)) & (True if lanes is None else lanes)]
        if (used % 16).any():
            raise PTXError("a row is not aligned to 16 bytes")
        for matrix, (read, write) in enumerate(zip(reads, writes, strict=True)):
            low, high = pieces(matrix)
            if loads:
                halves = [machine.load("shared", a, 2, lanes).view(np.uint16) for a in (low, high)]
                write(np.concatenate(halves, axis=1).view(np.uint32)[:, 0], lanes)
            else:
                values = machine.of_all(read())[:, None].view(np.uint8)
                machine.store("shared", low, values[:, :2], lanes)
                machine.store("shared", high, values[:, 2:], lanes)

    return move


# Between threads


def _barrier(context: Context) -> Step:
    """Of a block; or of a warp, whose threads are in order as it is."""
    if (context.modifiers, context.operands) == (["warp", "sync"], ("-1",)):
        return lambda lanes: None
    if (context.modifiers, context.operands) != (["sync"], ("0",)):
        raise context.unknown()
    return context.machine.pass_barrier


def _shuffle(context: Context) -> Step:
    """From lane ``lane ^ b`` (bfly) or ``b`` (idx) of the same warp."""
    target, source, other, clamp, among = context.operands
    if clamp != "31" or among != "-1" or context.modifiers[0] != "sync":
        raise context.unknown()
    partner: dict[str, Callable[[Array, Array], Array]] = {
        "bfly": np.bitwise_xor,
        "idx": lambda lane, other: other & 31,
    }
    (mode,) = context.modifiers[1:]
    if mode not in partner:
        raise context.unknown()
    read, read_other = context.read(source, "b32"), context.read(other, "s32")
    write = context.write(target, "b32")
    lane = np.arange(context.machine.lanes) % WARP

    def shuffle(lanes: Lanes) -> None:
        start = np.arange(len(lane)) - lane
        write(context.machine.of_all(read())[start + partner[mode](lane, read_other())], lanes)

    return shuffle


def _reduce(context: Context) -> Step:
    """One value of a warp's threads, for all of them."""
    target, source, _ = context.operands
    operation = INTEGERS.get(context.modifiers[-1])
    context.expect("sync", context.modifiers[-1])
    if not isinstance(operation, np.ufunc):
        raise context.unknown()
    read, write = context.read(source, context.kind), context.write(target, context.kind)

    def reduce(lanes: Lanes) -> None:
        values = context.machine.of_all(read()).reshape(-1, WARP)
        write(np.repeat(operation.reduce(values, axis=1), WARP), lanes)

    return reduce


# Values


def _move(context: Context) -> Step:
    """Bits, whatever their type; also parts of a register to several, or several to one."""
    context.expect()
    target, source = context.operands
    bits = BITS[context.kind]
    kind = "pred" if bits == 1 else f"b{bits}"
    targets, sources = members(target), members(source)
    part = f"b{bits // max(len(targets), len(sources))}"
    if len(targets) > 1:
        read, writes = context.read(source, kind), [context.write(t, part) for t in targets]

        def unpack(lanes: Lanes) -> None:
            parts: Array = np.ascontiguousarray(read())[:, None].view(UNSIGNED[BITS[part]])
            for write, values in zip(writes, parts.T, strict=True):
                write(values, lanes)

        return unpack
    write = context.write(target, kind)
    if len(sources) > 1:
        reads = [context.read(s, part) for s in sources]

        def pack(lanes: Lanes) -> None:
            parts: Array = np.stack(np.broadcast_arrays(*(read() for read in reads)), axis=1)
            write(parts.view(UNSIGNED[bits])[:, 0], lanes)

        return pack
    read = context.read(source, kind)
    return lambda lanes: write(read(), lanes)


def _permute(context: Context) -> Step:
    """Bytes of two registers, or their signs, as four bits each of a third one tell."""
    context.expect()
    target, *sources = context.operands
    low, high, selector = (context.read(source, "b32") for source in sources)
    write = context.write(target, "b32")

    def permute(lanes: Lanes) -> None:
        both = np.stack(np.broadcast_arrays(low(), high()), axis=1).view(np.uint8)
        choice = selector()[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        chosen = np.take_along_axis(both, (choice & 7).astype(np.int64), axis=1)
        signs = np.where(chosen >> 7, np.uint8(255), np.uint8(0))
        write(np.where(choice & 8, signs, chosen).view(np.uint32)[:, 0], lanes)

    return permute


def _compare(context: Context) -> Step:
    (comparison,) = context.modifiers
    target, one, other = context.operands
    if comparison not in COMPARISONS:
        raise context.unknown()
    compare = COMPARISONS[comparison]
    a, b = (context.read(operand, context.kind) for operand in (one, other))
    write = context.write(target, "pred")
    return lambda lanes: write(compare(a(), b()), lanes)


def _select(context: Context) -> Step:
    context.expect()
    target, one, other, condition = context.operands
    kind = f"b{BITS[context.kind]}"
    a, b = (context.read(operand, kind) for operand in (one, other))
    where, write = context.read(condition, "pred"), context.write(target, kind)
    return lambda lanes: write(np.where(where(), a(), b()), lanes)


def _convert(context: Context) -> Step:
    (to, of), modifiers = context.kinds, [m for m in context.modifiers if m != "ftz"]
    target, *sources = context.operands
    if to in ("bf16x2", "f16x2"):
        return _convert_two(context)
    (source,) = sources
    read, write = context.read(source, of), context.write(target, to)
    rounding = TO_INTEGER.get(modifiers[0]) if len(modifiers) == 1 else None
    if is_floating(of) and rounding is not None:
        whole = rounding if "ftz" not in context.modifiers else flushing(rounding)
        if is_floating(to):
            return lambda lanes: write(whole(read()), lanes)
        return lambda lanes: write(saturate(whole(read()), to), lanes)
    if context.modifiers != (["rn"] if _rounds(of, to) else []):
        raise context.unknown()
    return lambda lanes: write(read(), lanes)


def _rounds(of: str, to: str) -> bool:
    """Whether a conversion is written with its rounding: from integers, and to fewer bits."""
    return is_floating(to) and (not is_floating(of) or BITS[to] < BITS[of])


def _convert_two(context: Context) -> Step:
    """Two of float32, the first to the upper half."""
    context.expect("rn")
    target, high, low = context.operands
    half = context.kinds[0][:-2]
    reads, write = [context.read(s, "f32") for s in (low, high)], context.write(target, "b32")

    def convert(lanes: Lanes) -> None:
        halves = np.broadcast_arrays(*(encode(read(), half, 16) for read in reads))
        write(np.stack(halves, axis=1).view(np.uint32)[:, 0], lanes)

    return convert


# Types of operands that are not the instruction's.
SHIFTS = {"shl": {2: "u32"}, "shr": {2: "u32"}, "bfe": {2: "u32", 3: "u32"}}


def _computed(context: Context) -> Step:
    """Of values alone, by the tables of ``ptx.arithmetic``."""
    if len(context.kinds) != 1:
        raise context.unknown()
    kind = context.kind
    table = PREDICATES if kind == "pred" else FLOATS if kind in FLOATING else INTEGERS
    name = ".".join([context.name, *context.modifiers])
    function = table.get(name) or table.get(f"{name}.{kind}")
    if function is None or kind == "bf16" or kind.endswith("x2"):
        raise context.unknown()
    kinds = dict.fromkeys(range(len(context.operands)), kind) | SHIFTS.get(context.name, {})
    if "wide" in context.modifiers:
        kinds[0] = kinds[3] = f"{kind[0]}{2 * BITS[kind]}"
    write = context.write(context.operands[0], kinds[0])
    reads = [context.read(o, kinds[i]) for i, o in enumerate(context.operands) if i > 0]
    return lambda lanes: write(function(*(read() for read in reads)), lanes)


OPCODES: dict[str, Callable[[Context], Step]] = {
    "ld": _load,
    "st": _store,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
    "bar": _barrier,
    "shfl": _shuffle,
    "redux": _reduce,
    "mov": _move,
    "prmt": _permute,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
}
