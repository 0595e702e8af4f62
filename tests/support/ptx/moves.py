"""Instructions that move values from and to memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.arithmetic import UNSIGNED, decode
from ptx.context import WARP, Array, Context, Lanes, Step, Write
from ptx.parse import BITS, PTXError, members

# What caches are told.
HINTS = ("nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::no_allocate", "L1::evict_first",
         "L1::evict_last", "L2::64B", "L2::128B", "L2::256B")  # fmt: skip
SPACES = (["global"], ["shared"], ["param"])


def _vector(context: Context) -> tuple[str, int]:
    """The space and how many values a thread moves."""
    context.drop(*HINTS)
    space = context.modifiers.pop(0) if context.modifiers[:1] in SPACES else "generic"
    if context.modifiers not in ([], ["v2"], ["v4"]):
        raise context.unknown()
    return space, int(context.modifiers[0][1]) if context.modifiers else 1


def _load(context: Context) -> Step:
    (target, source), kind = context.operands, context.kind
    space, count = _vector(context)
    kind = kind if kind[0] == "s" else f"b{BITS[kind]}"
    size = BITS[kind] // 8
    writes = [context.write(register, kind) for register in members(target)]
    if space == "param":
        if len(writes) != count:
            raise context.unknown()
        return _load_parameter(context, size, writes)
    address = context.addresses(source)

    def load(lanes: Lanes) -> None:
        loaded = context.machine.load(space, address(), count * size, lanes)
        for write, values in zip(writes, loaded.view(UNSIGNED[BITS[kind]]).T, strict=True):
            write(decode(values, kind), lanes)

    return load


def _load_parameter(context: Context, size: int, writes: list[Write]) -> Step:
    """Values of one address are one for all threads."""
    machine, address = context.machine, context.address(context.operands[1])
    kind = context.kind if context.kind[0] == "s" else f"b{8 * size}"

    def load(lanes: Lanes) -> None:
        places = address() - machine.PARAMETER_BASE
        if lanes is not None and len(places) > 1:
            places = np.where(lanes, places, 0)
        end = len(machine.parameters) - size * len(writes)
        if places.min() < 0 or places.max() > end:
            raise PTXError("reads beyond the parameters")
        bytes_ = machine.parameters[places[:, None] + np.arange(size * len(writes))]
        for write, values in zip(writes, bytes_.view(UNSIGNED[8 * size]).T, strict=True):
            write(decode(values, kind), lanes)

    return load


def _store(context: Context) -> Step:
    target, source = context.operands
    space, count = _vector(context)
    reads = [context.read(register, f"b{BITS[context.kind]}") for register in members(source)]
    address = context.addresses(target)

    def store(lanes: Lanes) -> None:
        values = np.stack([context.machine.of_all(read()) for read in reads], axis=1)
        context.machine.store(space, address(), values.view(np.uint8), lanes)

    if len(reads) != count or space == "param":
        raise context.unknown()
    return store


def _copy(context: Context) -> Step:
    """Asynchronous copies to shared memory, of some bytes and zeros for the others."""
    context.drop("L2::64B", "L2::128B", "L2::256B")
    machine, (_, what, *_) = context.machine, context.modifiers
    if what == "commit_group":
        return machine.copies.commit
    if what in ("wait_group", "wait_all"):
        open_too = what == "wait_all"
        but = 0 if open_too else int(context.operands[0], 0)
        return lambda lanes: machine.copies.wait(but, lanes, open_too)
    if context.modifiers not in (["async", cache, "shared", "global"] for cache in ("ca", "cg")):
        raise context.unknown()
    target, source, count, *given = context.operands
    size, read = int(count, 0), context.read(given[0], "u32") if given else None
    to, of = context.addresses(target), context.addresses(source)

    def copy(lanes: Lanes) -> None:
        lanes = np.ones(machine.lanes, bool) if lanes is None else lanes
        real = lanes
        if read is not None:
            there = machine.of_all(read())
            if not np.isin(there[lanes], (0, size)).all():
                raise PTXError("a copy of a part of its bytes is not known")
            real = lanes & (there > 0)
        values = machine.load("global", of(), size, real)
        machine.copies.begin(to(), values, lanes)

    return copy


def _convert_address(context: Context) -> Step:
    """Addresses are of one space: they tell which memory they are of."""
    if context.modifiers[-1] not in ("global", "shared"):
        raise context.unknown()
    target, source = context.operands
    read, write = context.read(source, context.kind), context.write(target, context.kind)
    return lambda lanes: write(read(), lanes)


def _matrix(context: Context) -> Step:
    """8 x 8 values of 16 bits: thread i has the address of row i % 8 of matrix i // 8.

    Thread i holds values 2 * (i % 4) and the next of row i // 4; of the column, if transposed.
    """
    loads = context.name == "ldmatrix"
    registers, rows = context.operands if loads else context.operands[::-1]
    names, machine = members(registers), context.machine
    transposed = ["trans"] if "trans" in context.modifiers else []
    context.expect("sync", "aligned", "m8n8", f"x{len(names)}", *transposed, "shared")
    address = context.addresses(rows)
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


OPCODES: dict[str, Callable[[Context], Step]] = {
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "cvta": _convert_address,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
}
