"""What instructions compute of values alone: tables by opcode, and by type where one has it.

Functions take numpy arrays of the type and give one. What PTX calls approximate is rounded
correctly here. Modifiers that a table does not have are not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from rounding import add_to_odd, fma, round_bfloat16, widen_bfloat16

from ptx.parse import BITS

Array = npt.NDArray[Any]
Function = Callable[..., Array]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATING = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def decode(bits: Array, kind: str) -> Array:
    """The values of a type in registers' bits; those of bfloat16 as float32."""
    width = BITS[kind]
    if bits.dtype != UNSIGNED[width]:  # a wider register's lower bits
        bits = bits.astype(UNSIGNED[width])
    if kind == "bf16":
        return widen_bfloat16(bits)
    if kind[0] == "s":
        return bits.view(SIGNED[width])
    return bits.view(FLOATING[kind]) if kind in FLOATING else bits


def encode(values: Array, kind: str, register: int) -> Array:
    """Values of a type as the bits of a register, which may be wider."""
    width = BITS[kind]
    if kind == "bf16":
        return round_bfloat16(values)
    if kind in FLOATING:
        return np.asarray(values, FLOATING[kind]).view(UNSIGNED[width])
    if kind[0] == "s":
        return (
            np.asarray(values)
            .astype(SIGNED[width])
            .astype(SIGNED[register])
            .view(UNSIGNED[register])
        )
    return np.asarray(values).astype(UNSIGNED[width]).astype(UNSIGNED[register])


def is_floating(kind: str) -> bool:
    return kind in FLOATING or kind == "bf16"


# Floating point


def _in_float64(function: Function) -> Function:
    """Rounded once, but for float64."""

    def computed(*values: Array) -> Array:
        return function(*(v.astype(np.float64) for v in values)).astype(values[0].dtype)

    return computed


def flushing(function: Function) -> Function:
    """Subnormal numbers, given or computed, are zeros of their sign."""

    def flushed(value: Array) -> Array:
        subnormal = np.abs(value) < np.finfo(value.dtype).tiny
        return np.where(subnormal, np.copysign(value.dtype.type(0), value), value)

    return lambda *values: flushed(function(*map(flushed, values)))


def _coarse_reciprocal(a: Array) -> Array:
    """Of float64: only the upper halves of numbers count."""
    upper = np.uint64(0xFFFFFFFF00000000)
    cut = (a.view(np.uint64) & upper).view(np.float64)
    return (np.reciprocal(cut).view(np.uint64) & upper).view(np.float64)


def _copysign(sign: Array, magnitude: Array) -> Array:
    return np.copysign(magnitude, sign)


_divide, _sqrt, _exp2 = (_in_float64(f) for f in (np.divide, np.sqrt, np.exp2))
_rsqrt = _in_float64(lambda a: 1 / np.sqrt(a))

FLOATS: dict[str, Function] = {
    "add": np.add,
    "add.rn": np.add,
    "sub": np.subtract,
    "sub.rn": np.subtract,
    "mul": np.multiply,
    "mul.rn": np.multiply,
    "fma.rn": fma,
    "fma.rn.ftz": flushing(fma),
    "div.rn": _divide,
    "div.full": _divide,
    "rcp.approx.ftz.f64": flushing(_coarse_reciprocal),
    "div.full.ftz": flushing(_divide),
    "rcp.approx.ftz": flushing(_in_float64(np.reciprocal)),
    "rcp.approx": _in_float64(np.reciprocal),
    "rcp.rn": _in_float64(np.reciprocal),
    "sqrt.rn": _sqrt,
    "sqrt.approx": _sqrt,
    "rsqrt.approx": _rsqrt,
    "rsqrt.approx.ftz": flushing(_rsqrt),
    "tanh.approx": _in_float64(np.tanh),
    "sqrt.approx.ftz": flushing(_sqrt),
    "ex2.approx": _exp2,
    "ex2.approx.ftz": flushing(_exp2),
    "lg2.approx": _in_float64(np.log2),
    "lg2.approx.ftz": flushing(_in_float64(np.log2)),
    "neg": np.negative,
    "abs": np.abs,
    "abs.ftz": flushing(np.abs),
    "copysign": _copysign,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}

# Of numbers of 16 bits, in float64: exact, or rounded to odd, so that one rounding is left.
HALVES: dict[str, Function] = {
    **dict.fromkeys(("add", "add.rn"), add_to_odd),
    **dict.fromkeys(("sub", "sub.rn"), lambda a, b: add_to_odd(a, -b)),
    **dict.fromkeys(("mul", "mul.rn"), np.multiply),
    "fma.rn": lambda a, b, c: add_to_odd(a * b, c),
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}

# Integers


def _bits(a: Array) -> int:
    return a.dtype.itemsize * 8


def shift_left(a: Array, count: Array) -> Array:
    shifted = a << np.minimum(count, _bits(a) - 1).astype(a.dtype)
    return np.where(count < _bits(a), shifted, a.dtype.type(0))


def shift_right(a: Array, count: Array) -> Array:
    """Signed numbers are filled with their sign."""
    shifted = a >> np.minimum(count, _bits(a) - 1).astype(a.dtype)
    filled = a >> a.dtype.type(_bits(a) - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(count < _bits(a), shifted, filled)


def extract(a: Array, position: Array, length: Array) -> Array:
    """Bits from ``position`` on; those of signed numbers are a signed number."""
    position, length = ((v & np.uint32(255)).astype(np.int64) for v in (position, length))
    above = np.maximum(_bits(a) - length - position, 0)
    alone = shift_right(shift_left(a, above), above + position)
    return np.where(length == 0, a.dtype.type(0), alone)


def _wide(a: Array) -> Array:
    return a.astype((SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * _bits(a)])


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    if _bits(a) == 64:
        return _high_of_64(a, b)
    return (_wide(a) * _wide(b) >> _wide(a).dtype.type(_bits(a))).astype(a.dtype)


def _high_of_64(a: Array, b: Array) -> Array:
    """By halves of the numbers; what signed ones lack is subtracted."""
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero; all bits are set where PTX says nothing, of a division by zero."""
    down = a // np.where(b == 0, a.dtype.type(1), b)
    up = down + ((down * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), up)


INTEGERS: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mul.hi": _high,
    "mul.wide": lambda a, b: _wide(a) * _wide(b),
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.hi": lambda a, b, c: _high(a, b) + c,
    "mad.wide": lambda a, b, c: _wide(a) * _wide(b) + c,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "min.relu": lambda a, b: np.maximum(np.minimum(a, b), 0),
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": shift_left,
    "shr": shift_right,
    "bfe": extract,
}

PREDICATES: dict[str, Function] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
}

# Of a comparison with NaN numpy's are false but for !=; those that end with "u" are true.
COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},  # unsigned
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}

# Conversions

TO_INTEGER: dict[str, Function] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


def saturate(values: Array, kind: str) -> Array:
    """Whole floating numbers as integers of a type: the nearest there is, zero of NaN."""
    limits = np.iinfo((SIGNED if kind[0] == "s" else UNSIGNED)[BITS[kind]])
    values = np.where(np.isnan(values), 0, values.astype(np.float64))
    low, high = values <= limits.min, values >= float(limits.max)
    whole = np.where(low | high, 0, values).astype(limits.dtype)
    return np.where(low, limits.min, np.where(high, limits.max, whole)).astype(limits.dtype)
