"""Instructions of a thread's values alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.arithmetic import (
    COMPARISONS,
    FLOATING,
    FLOATS,
    HALVES,
    INTEGERS,
    PREDICATES,
    TO_INTEGER,
    UNSIGNED,
    decode,
    encode,
    flushing,
    is_floating,
    saturate,
    shift_left,
)
from ptx.context import Array, Context, Lanes, Step, predicate
from ptx.parse import BITS, members


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
    """Also combined with a predicate; a second target has the opposite of the comparison."""
    context.drop("ftz")
    comparison, *combination = context.modifiers
    targets = context.operands[0].split("|")
    compare = COMPARISONS[comparison]
    a, b = (context.read(operand, context.kind) for operand in context.operands[1:3])
    writes = [context.write(target, "pred") for target in targets]
    if not combination:
        combine, given = None, None
    else:
        combine = PREDICATES[combination[0]]
        given = predicate(context, context.operands[3])

    def step(lanes: Lanes) -> None:
        result = compare(a(), b())
        for write, value in zip(writes, (result, ~result), strict=False):
            write(value if combine is None or given is None else combine(value, given()), lanes)

    if len(context.operands) != 3 + len(combination) or len(context.kinds) != 1:
        raise context.unknown()
    return step


def _select(context: Context) -> Step:
    context.expect()
    target, one, other, condition = context.operands
    kind = f"b{BITS[context.kind]}"
    a, b = (context.read(operand, kind) for operand in (one, other))
    where, write = predicate(context, condition), context.write(target, kind)
    return lambda lanes: write(np.where(where(), a(), b()), lanes)


def _select_by_sign(context: Context) -> Step:
    context.expect()
    target, one, other, sign = context.operands
    kind, of_sign = f"b{BITS[context.kinds[0]]}", context.kinds[1]
    a, b, c = context.read(one, kind), context.read(other, kind), context.read(sign, of_sign)
    write = context.write(target, kind)
    return lambda lanes: write(np.where(c() >= 0, a(), b()), lanes)


def _insert(context: Context) -> Step:
    """Bits of one register into another, at a position."""
    context.expect()
    target, *sources = context.operands
    kind = context.kind
    bits, into = (context.read(source, kind) for source in sources[:2])
    position, length = (context.read(source, "u32") for source in sources[2:])
    write, dtype = context.write(target, kind), UNSIGNED[BITS[kind]]

    def insert(lanes: Lanes) -> None:
        one, begin, count = dtype(1), position() & np.uint32(255), length() & np.uint32(255)
        low = shift_left(np.broadcast_to(one, begin.shape), begin) - one
        above = shift_left(np.broadcast_to(one, begin.shape), begin + count) - one
        mask = above & ~low
        write((into() & ~mask) | (shift_left(bits(), begin) & mask), lanes)

    return insert


def _funnel(context: Context) -> Step:
    """The upper or lower half of two registers, shifted together."""
    direction, mode = context.modifiers
    target, *sources = context.operands
    low, high, by = (context.read(source, "b32") for source in sources)
    write = context.write(target, "b32")

    def shift(lanes: Lanes) -> None:
        count = by() & np.uint32(31) if mode == "wrap" else np.minimum(by(), np.uint32(32))
        both = high().astype(np.uint64) << np.uint64(32) | low()
        count = count.astype(np.uint64)
        if direction == "r":
            write((both >> count).astype(np.uint32), lanes)
        else:
            write((both << count >> np.uint64(32)).astype(np.uint32), lanes)

    if direction not in ("l", "r") or mode not in ("wrap", "clamp"):
        raise context.unknown()
    return shift


def _logic(context: Context) -> Step:
    """Of three registers, by the table of a number: its bit ``4 a + 2 b + c`` is the result."""
    context.expect()
    target, *sources, table = context.operands
    reads = [context.read(source, "b32") for source in sources]
    write, number = context.write(target, "b32"), int(table, 0)

    def compute(lanes: Lanes) -> None:
        a, b, c = np.broadcast_arrays(*(read() for read in reads))
        result = np.zeros_like(a)
        for i in range(8):
            if number >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        write(result, lanes)

    return compute


def _count_bits(context: Context) -> Step:
    """How many are set; or how many zeros are before the first that is."""
    context.expect()
    kind, width = context.kind, BITS[context.kind]
    read, write = context.read(context.operands[1], kind), context.write(context.operands[0], "u32")

    def count(lanes: Lanes) -> None:
        bits = np.unpackbits(read()[:, None].view(np.uint8), axis=1, bitorder="little")
        if context.name == "popc":
            write(bits.sum(axis=1), lanes)
        else:
            write(np.where(bits.any(axis=1), bits[:, ::-1].argmax(axis=1), width), lanes)

    return count


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


def computed(context: Context) -> Step:
    """By the tables of ``ptx.arithmetic``."""
    if len(context.kinds) != 1:
        raise context.unknown()
    kind = context.kind
    if kind.endswith("bf16") or kind.endswith("x2"):
        return _computed_halves(context)
    table = PREDICATES if kind == "pred" else FLOATS if kind in FLOATING else INTEGERS
    name = ".".join([context.name, *context.modifiers])
    function = table.get(f"{name}.{kind}") or table.get(name)
    if function is None:
        raise context.unknown()
    kinds = dict.fromkeys(range(len(context.operands)), kind) | SHIFTS.get(context.name, {})
    if "wide" in context.modifiers:
        kinds[0] = kinds[3] = f"{kind[0]}{2 * BITS[kind]}"
    write = context.write(context.operands[0], kinds[0])
    reads = [context.read(o, kinds[i]) for i, o in enumerate(context.operands) if i > 0]
    return lambda lanes: write(function(*(read() for read in reads)), lanes)


def _computed_halves(context: Context) -> Step:
    """Of one number of 16 bits, or two in a register."""
    half = context.kind.removesuffix("x2")
    function = HALVES.get(".".join([context.name, *context.modifiers]))
    if function is None:
        raise context.unknown()
    bits = f"b{BITS[context.kind]}"
    write = context.write(context.operands[0], bits)
    reads = [context.read(operand, bits) for operand in context.operands[1:]]

    def compute(lanes: Lanes) -> None:
        given = np.broadcast_arrays(*(read() for read in reads))
        halves = [decode(np.ascontiguousarray(g).view(np.uint16), half) for g in given]
        result = encode(function(*(h.astype(np.float64) for h in halves)), half, 16)
        write(result.view(UNSIGNED[BITS[bits]]), lanes)

    return compute


OPCODES: dict[str, Callable[[Context], Step]] = {
    "mov": _move,
    "prmt": _permute,
    "setp": _compare,
    "selp": _select,
    "slct": _select_by_sign,
    "bfi": _insert,
    "shf": _funnel,
    "lop3": _logic,
    "popc": _count_bits,
    "clz": _count_bits,
    "cvt": _convert,
}
