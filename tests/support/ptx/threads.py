"""Instructions that threads do together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.arithmetic import INTEGERS, decode
from ptx.context import WARP, Array, Context, Lanes, Read, Step, predicate
from ptx.parse import PTXError, members

ALL = 2**32 - 1  # the mask of a whole warp


def _barrier(context: Context) -> Step:
    """Of a block, which may count predicates; or of a warp, whose threads are in order as it is."""
    machine, modifiers = context.machine, context.modifiers
    if modifiers == ["warp", "sync"]:
        return _all_lanes(context, context.operands[0], lambda lanes: None)
    if modifiers == ["sync"] and context.operands == ("0",):
        return machine.pass_barrier
    if modifiers[0] != "red" or context.operands[1] != "0":
        raise context.unknown()
    target, _, source = context.operands
    (operation,) = modifiers[1:]
    reduce = {"popc": np.add, "or": np.logical_or, "and": np.logical_and}[operation]
    read = predicate(context, source)
    write = context.write(target, "u32" if operation == "popc" else "pred")

    def count(lanes: Lanes) -> None:
        given = machine.of_all(read()).astype(np.int64).reshape(-1, machine.kernel.threads)
        write(np.repeat(reduce.reduce(given, axis=1), machine.kernel.threads), lanes)
        machine.pass_barrier(lanes)

    return count


def _all_lanes(context: Context, mask: str, step: Step) -> Step:
    """The step, of all lanes of a warp: other masks are not known."""
    read = context.read(mask, "b32")

    def checked(lanes: Lanes) -> None:
        values = context.machine.of_all(read())
        if (values if lanes is None else values[lanes]).min() != ALL:
            raise PTXError("a mask of some lanes of a warp is not known")
        step(lanes)

    return checked


def _shuffle(context: Context) -> Step:
    """From a lane of the same warp; a thread whose lane is beyond its segment keeps its value."""
    target, source, other, clamp, among = context.operands
    sync, mode = context.modifiers
    register, _, found = target.partition("|")
    machine = context.machine
    read, read_other = context.read(source, "b32"), context.read(other, "u32")
    read_clamp, write = context.read(clamp, "u32"), context.write(register, "b32")
    write_found = context.write(found or "_", "pred")
    lane = np.arange(machine.lanes) % WARP
    start = np.arange(machine.lanes) - lane

    def shuffle(lanes: Lanes) -> None:
        number = machine.of_all(read_other()).astype(np.int64) & 31
        bounds = machine.of_all(read_clamp()).astype(np.int64)
        fixed, limit = bounds >> 8 & 31, bounds & 31  # bits that tell segments apart; in one
        last = (lane & fixed) | (limit & ~fixed)
        partner = {
            "bfly": lane ^ number,
            "idx": (lane & fixed) | (number & ~fixed),
            "up": lane - number,
            "down": lane + number,
        }[mode]
        there = partner >= last if mode == "up" else partner <= last
        write(machine.of_all(read())[start + np.where(there, partner, lane)], lanes)
        write_found(there, lanes)

    if sync != "sync" or mode not in ("bfly", "idx", "up", "down"):
        raise context.unknown()
    return _all_lanes(context, among, shuffle)


def _vote(context: Context) -> Step:
    """What a warp's predicates say together."""
    sync, mode = context.modifiers
    target, source, among = context.operands
    machine, read = context.machine, predicate(context, source)
    write = context.write(target, "b32" if mode == "ballot" else "pred")
    vote: Callable[[Array], Array] = {
        "ballot": lambda p: np.packbits(p, axis=1, bitorder="little").view(np.uint32)[:, 0],
        "any": lambda p: p.any(axis=1),
        "all": lambda p: p.all(axis=1),
        "uni": lambda p: p.all(axis=1) | ~p.any(axis=1),
    }[mode]

    def tell(lanes: Lanes) -> None:
        write(np.repeat(vote(machine.of_all(read()).reshape(-1, WARP)), WARP), lanes)

    if sync != "sync":
        raise context.unknown()
    return _all_lanes(context, among, tell)


def _multiply(context: Context) -> Step:
    """``c + a @ b`` of a [16, 16] and b [16, 8], whose elements lanes hold in pairs.

    Summed in float64 and rounded once: what a device rounds on the way is not told.
    """
    shape, kinds = ("sync", "aligned", "m16n8k16", "row", "col"), context.kinds
    context.expect(*shape)
    half = kinds[1]
    if kinds != ["f32", half, half, "f32"] or half not in ("bf16", "f16"):
        raise context.unknown()
    writes = [context.write(name, "f32") for name in members(context.operands[0])]
    reads_a, reads_b = (
        [context.read(name, "b32") for name in members(operand)]
        for operand in context.operands[1:3]
    )
    reads_c = [context.read(name, "f32") for name in members(context.operands[3])]
    machine = context.machine
    row, pair = np.divmod(np.arange(WARP), 4)

    def halves(reads: list[Read]) -> Array:
        """Values of warps' lanes, # [warps, lanes, registers, 2]"""
        bits = np.stack([machine.of_all(read()) for read in reads], axis=1)
        values = decode(bits.view(np.uint16).reshape(-1), half).astype(np.float64)
        return values.reshape(-1, WARP, len(reads), 2)

    def multiply(lanes: Lanes) -> None:
        of_a, of_b = halves(reads_a), halves(reads_b)
        a, b = np.empty((len(of_a), 16, 16)), np.empty((len(of_a), 16, 8))
        for i in (0, 1):
            for register in range(4):
                a[:, row + register % 2 * 8, 2 * pair + register // 2 * 8 + i] = of_a[
                    :, :, register, i
                ]
            for register in range(2):
                b[:, 2 * pair + register * 8 + i, row] = of_b[:, :, register, i]
        products = a @ b
        for i, (read, write) in enumerate(zip(reads_c, writes, strict=True)):
            ours = products[:, row + i // 2 * 8, 2 * pair + i % 2].reshape(-1)
            write((machine.of_all(read()) + ours).astype(np.float32), lanes)

    return multiply


def _reduce(context: Context) -> Step:
    """One value of a warp's threads, for all of them."""
    target, source, among = context.operands
    operation = INTEGERS.get(context.modifiers[-1])
    context.expect("sync", context.modifiers[-1])
    if not isinstance(operation, np.ufunc):
        raise context.unknown()
    read, write = context.read(source, context.kind), context.write(target, context.kind)

    def reduce(lanes: Lanes) -> None:
        values = context.machine.of_all(read()).reshape(-1, WARP)
        write(np.repeat(operation.reduce(values, axis=1), WARP), lanes)

    return _all_lanes(context, among, reduce)


OPCODES: dict[str, Callable[[Context], Step]] = {
    "bar": _barrier,
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "mma": _multiply,
}
