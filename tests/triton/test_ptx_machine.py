"""The machine that runs PTX (tests/support/ptx): its arithmetic, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ptx.parse import PTXError, parse
from ptx_text import DTYPES, KERNEL, compute, launch

Array = npt.NDArray[Any]


def numbers(dtype: Any, count: int = 992) -> Array:
    """Random ones of many sizes."""
    random = np.random.default_rng(count)
    return (random.standard_normal(count) * np.exp2(random.integers(-30, 30, count))).astype(dtype)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fma_rounds_once(kind: str) -> None:
    """No number is nearer to the exact value; many sums cancel, or are near ties."""
    a, b, c = (numbers(DTYPES[kind], count) for count in (992, 993, 994))
    a, b, c = a[:992], b[:992], c[:992]
    c[::2] = -(a * b)[::2]
    c[1::4] = np.spacing(a * b)[1::4] * np.array(0.5, DTYPES[kind])
    for x, y, z, result in zip(a, b, c, compute(f"fma.rn.{kind}", kind, a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(result)) - exact)
        for neighbour in np.nextafter(result, np.array([-np.inf, np.inf], result.dtype)):
            assert error <= abs(Fraction(float(neighbour)) - exact)


def test_fma_of_what_is_not_finite() -> None:
    a = np.array([np.inf, np.inf, np.nan, 3e38, 1], np.float32)
    b = np.array([1, 0, 1, 10, 1], np.float32)
    c = np.array([1, 1, 1, 0, -np.inf], np.float32)
    np.testing.assert_array_equal(
        compute("fma.rn.f32", "f32", a, b, c), [np.inf, np.nan, np.nan, np.inf, -np.inf]
    )


def test_flushing_to_zero() -> None:
    tiny = np.array([1e-39, -1e-39, 1e-30, 1], np.float32)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    np.testing.assert_array_equal(compute("fma.rn.f32", "f32", tiny, one, zero), tiny)
    flushed = compute("fma.rn.ftz.f32", "f32", tiny, one, zero)
    np.testing.assert_array_equal(flushed, np.array([0, 0, 1e-30, 1], np.float32))


def test_a_coarse_reciprocal() -> None:
    """What float64's logarithm begins with has the upper half of the bits."""
    values = numbers(np.float64)
    result = compute("rcp.approx.ftz.f64", "f64", values)
    np.testing.assert_allclose(result, 1 / values, rtol=2**-19)
    assert not (result.view(np.uint64) & np.uint64(2**32 - 1)).any()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_rounding_to_half_precision(kind: str) -> None:
    """As PyTorch rounds, ties and numbers beyond the range too."""
    values = numbers(np.float32)
    ties = torch.from_numpy(values[:96]).bfloat16().view(torch.int16).numpy().astype(np.uint16)
    values[:96] = ((ties.astype(np.uint32) << 16) + 0x8000).view(np.float32)
    values[96:99] = 1e5, 3.4e38, -np.inf
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    expected = torch.from_numpy(values).to(dtype)
    result = compute(f"cvt.rn.{kind}.f32", kind, values, kinds=["f32"])
    np.testing.assert_array_equal(
        result.view(np.uint16), expected.view(torch.int16).numpy().view(np.uint16)
    )
    widened = compute(f"cvt.f32.{kind}", "f32", result, kinds=[kind])
    np.testing.assert_array_equal(widened, expected.float().numpy())


def test_two_halves_at_once() -> None:
    """The first operand is the upper half."""
    high, low = np.full(32, 1.0, np.float32), np.full(32, -2.0, np.float32)
    result = compute("cvt.rn.bf16x2.f32", "bf16x2", high, low, kinds=["f32", "f32"])
    assert (result == 0x3F80C000).all()


INTEGERS: dict[str, tuple[str, list[Any], list[Any], list[Any]]] = {
    "shl.b32": ("b32", [1, 1, 1, 3], [0, 31, 32, 31], [1, 1 << 31, 0, 1 << 31]),
    "shr.u32": ("u32", [1 << 31, 1 << 31, 7], [31, 40, 1], [1, 0, 3]),
    "shr.s32": ("s32", [-8, -8, -8, 8], [1, 31, 99, 99], [-4, -1, -1, 0]),
    "mul.hi.s32": ("s32", [-(2**31), 2**30, -1], [2, 8, 1], [-1, 2, -1]),
    "mul.lo.s32": ("s32", [2**30, -3], [4, 5], [0, -15]),
    "div.s32": ("s32", [-7, 7, -7, 6], [2, -2, -2, 3], [-3, -3, 3, 2]),
    "rem.s32": ("s32", [-7, 7, -7, 6], [2, -2, -2, 4], [-1, 1, -1, 2]),
    "div.u32": ("u32", [2**32 - 1, 5], [2, 0], [2**31 - 1, 2**32 - 1]),
    "min.s32": ("s32", [-1, 3], [1, 2], [-1, 2]),
    "sub.s64": ("s64", [0, 2**62], [1, 2], [-1, 2**62 - 2]),
}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode: str) -> None:
    kind, a, b, expected = INTEGERS[opcode]
    kinds = (kind, "u32" if opcode[:3] in ("shl", "shr") else kind)
    operands = [np.array(v).astype(DTYPES[k]) for v, k in zip((a, b), kinds, strict=True)]
    assert compute(opcode, kind, *operands, kinds=kinds).tolist() == expected


def test_wide_products() -> None:
    a, b, c = np.array([-(2**31), 5]), np.array([3, -7]), np.array([2**40, -1])
    result = compute("mad.wide.s32", "s64", a, b, c, kinds=["s32", "s32", "s64"])
    assert result.tolist() == [2**40 - 3 * 2**31, -36]


def test_fields_of_bits() -> None:
    a = np.array([0b110100, 0b110100, -1, -16])
    position, length = np.array([2, 2, 30, 3]), np.array([3, 0, 8, 2])
    for kind, expected in (("u32", [5, 0, 3, 2]), ("s32", [-3, 0, -1, -2])):
        kinds = [kind, "u32", "u32"]
        result = compute(f"bfe.{kind}", kind, a, position, length, kinds=kinds)
        assert result.tolist() == expected


def test_floating_to_integer() -> None:
    """Saturates; NaN is zero."""
    values = np.array([2.5, -2.5, 1e20, -1e20, np.nan], np.float32)
    for rounding, expected in (("rzi", [2, -2]), ("rni", [2, -2]), ("rmi", [2, -3])):
        result = compute(f"cvt.{rounding}.s32.f32", "s32", values, kinds=["f32"])
        assert result.tolist() == [*expected, 2**31 - 1, -(2**31), 0]


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [("lt", [1, 0, 0]), ("ltu", [1, 0, 1]), ("ne", [1, 0, 0]), ("neu", [1, 0, 1]),
     ("equ", [0, 1, 1]), ("geu", [0, 1, 1])],
)  # fmt: skip
def test_comparisons_with_nan(comparison: str, expected: list[int]) -> None:
    a, b = np.array([1, 2, np.nan], np.float32), np.array([2, 2, 2], np.float32)
    a, b = (np.resize(v, 32).astype(np.float32) for v in (a, b))
    body = f"""
ld.global.b32 %r1, [%rd1];
ld.global.b32 %r2, [%rd2];
setp.{comparison}.f32 %p1, %r1, %r2;
selp.b32 %r3, 1, 0, %p1;
st.global.b32 [%rd0], %r3;"""
    assert launch(body, np.zeros(32, np.uint32), a, b)[0][:3].tolist() == expected


def test_threads_branch_apart_and_meet() -> None:
    """A loop of as many rounds as the thread's number, around a branch; then a shuffle."""
    body = """
mov.b32 %r1, 0;
mov.b32 %r2, 0;
$loop:
setp.ge.u32 %p1, %r1, %r0;
@%p1 bra $end;
and.b32 %r3, %r1, 1;
setp.eq.b32 %p2, %r3, 0;
@!%p2 bra $next;
add.s32 %r2, %r2, 1;
$next:
add.s32 %r1, %r1, 1;
bra.uni $loop;
$end:
shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
st.global.b32 [%rd0], %r4;"""
    (result,) = launch(body, np.zeros(64, np.uint32), threads=64)
    assert result.tolist() == [((i ^ 1) + 1) // 2 for i in range(64)]


def test_values_of_a_warp() -> None:
    body = """
xor.b32 %r1, %r0, 21;
redux.sync.max.s32 %r2, %r1, -1;
mov.b32 %r3, 3;
shfl.sync.idx.b32 %r4, %r1, %r3, 31, -1;
st.global.b32 [%rd0], %r2;
st.global.b32 [%rd1], %r4;"""
    maxima, thirds = launch(body, *np.zeros((2, 64), np.uint32), threads=64)
    assert maxima.tolist() == [31] * 32 + [63] * 32
    assert thirds.tolist() == [3 ^ 21] * 32 + [35 ^ 21] * 32


def test_bytes_of_two_registers() -> None:
    body = """
mov.b32 %r1, 0x03020100;
mov.b32 %r2, 0x87060504;
prmt.b32 %r3, %r1, %r2, 0x7632U;
prmt.b32 %r4, %r1, %r2, 0xF040;
st.global.b32 [%rd0], %r3;
st.global.b32 [%rd1], %r4;"""
    middle, others = launch(body, *np.zeros((2, 32), np.uint32))
    assert (middle == 0x87060302).all()
    assert (others == 0xFF000400).all()


def test_parts_of_registers() -> None:
    body = """
mov.b32 %r1, 0x00020001;
mov.b32 {%rs1, %rs2}, %r1;
mov.b32 %r2, {%rs2, %rs1};
{ .reg .b32 tmp; mov.b64 {tmp, %r3}, %rd0; }
mov.b64 %rd3, {%r2, %r1};
st.global.b64 [%rd0], %rd3;"""
    (result,) = launch(body, np.zeros(32, np.uint64))
    assert (result == 0x0002000100010002).all()


def test_matrices() -> None:
    """What is stored as rows of 8 x 8 is loaded as columns."""
    body = """
mov.b32 %r1, memory;
and.b32 %r2, %r0, 7;
shl.b32 %r2, %r2, 4;
add.s32 %r1, %r1, %r2;
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r0};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r3}, [%r1];
st.global.b32 [%rd0], %r3;"""
    (result,) = launch(body, np.zeros(32, np.uint32))
    rows = np.arange(32, dtype=np.uint32).view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(result.view(np.uint16).reshape(8, 8), rows.T)


# Every thread passes its number to the one of the next warp.
EXCHANGE = """
shl.b32 %r1, %r0, 2;
mov.b32 %r2, memory;
add.s32 %r3, %r2, %r1;
st.shared.b32 [%r3 + 0], %r0;
{barrier}
xor.b32 %r1, %r1, 128;
add.s32 %r3, %r2, %r1;
{load}
st.global.b32 [%rd0], %r4;"""
STORE = "shl.b32 %r5, %r0, 2;\nadd.s32 %r5, %r2, %r5;\nst.shared.b32 [%r5], %r1;"
LOAD = "ld.shared.b32 %r4, [%r3];"


def test_a_barrier() -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;", load=LOAD)
    (result,) = launch(body, np.zeros(64, np.uint32), threads=64)
    assert result.tolist() == [i ^ 32 for i in range(64)]


HALF = "setp.lt.u32 %p1, %r0, 32;"
FAULTS = {
    "no barrier": (EXCHANGE.format(barrier="", load=LOAD), "reads in a race with a write"),
    "no barrier before a write": (
        EXCHANGE.format(barrier="bar.sync 0;", load=f"{LOAD}\n{STORE}"),
        "writes in a race with a read",
    ),
    "two writes": (
        f"{HALF}\nmov.b32 %r1, memory;\n"
        "@%p1 st.shared.b32 [%r1], 1;\n@!%p1 st.shared.b32 [%r1], 2;",
        "in a race with a write",
    ),
    "two writes at once": (
        "mov.b32 %r1, memory;\nst.shared.b32 [%r1], %r0;",
        "thread 0 of block 0 writes where another thread writes something else",
    ),
    "two blocks write": (
        "mov.u32 %r1, %ctaid.x;\nst.global.b32 [%rd0], %r1;",
        "writes where another thread writes something else",
    ),
    "two blocks read and write": (
        "ld.global.b32 %r1, [%rd0];\nst.global.b32 [%rd0], %r0;",
        "writes in a race with a read",
    ),
    "half reach a barrier": (f"{HALF}\n@%p1 bra $end;\nbar.sync 0;\n$end:", "that never come"),
    "half have ended": (f"{HALF}\n@%p1 ret;\nbar.sync 0;", "thread 32 .* that never come"),
    "half a warp shuffles": (
        "setp.lt.u32 %p1, %r0, 40;\n@%p1 bra $end;\n"
        "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\n$end:",
        "thread 40 .* that never come",
    ),
    "half a warp synchronizes": (
        "setp.lt.u32 %p1, %r0, 40;\n@%p1 bra $end;\nbar.warp.sync -1;\n$end:",
        "thread 40 .* that never come",
    ),
    "a barrier of some": ("bar.sync 1, 32;", "unknown instruction bar.sync"),
    "a guarded barrier": (f"{HALF}\n@%p1 bar.sync 0;", "unknown instruction bar.sync"),
    "beyond the end": ("st.global.b32 [%rd0 + 4], %r0;", r"thread 63 of block 0 is out of bounds"),
    "before the start": ("ld.global.b32 %r1, [%rd0 + -4];", "thread 0 .* is out of bounds"),
    "no address": ("ld.global.b32 %r1, [%rd9];", "is out of bounds"),
    "shared beyond": ("mov.b32 %r1, memory;\nld.shared.b32 %r2, [%r1+256];", "is out of bounds"),
    "misaligned": (f"{HALF}\n@%p1 ld.global.v2.b32 {{%r1, %r2}}, [%rd0];",
                   "thread 1 .* not aligned to 8 bytes"),
    "unwritten": ("mov.b32 %r1, memory;\nld.shared.b32 %r2, [%r1];", "reads what nobody wrote"),
    "an unknown opcode": ("frobnicate.b32 %r1, %r2;", "unknown instruction frobnicate.b32"),
    "an unknown modifier": ("add.sat.f32 %r1, %r1, %r2;", "unknown instruction add.sat.f32"),
    "a third operand": ("setp.lt.s32 %p1, %r1, %r2, %p2;", "unknown instruction setp.lt.s32"),
    "an unknown operand": ("mov.u32 %r1, %clock;", "unknown operand %clock"),
    "an endless loop": ("$loop:\nbra.uni $loop;", "does not end"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.replace(" ", "_"))
def test_faults(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx.machine.MAX_STEPS", 1000)
    body, message = FAULTS[case]
    with pytest.raises(PTXError, match=message) as fault:
        launch(body, np.zeros(64, np.uint32), threads=64, blocks=2 if "blocks" in case else 1)
    assert "kernel" in str(fault.value)


def test_a_read_of_fresh_memory() -> None:
    """Of what a kernel wrote itself it is none."""
    body = "{store}\nld.global.b32 %r1, [%rd0];"
    store = "st.global.b32 [%rd0], %r0;"
    launch(body.format(store=store), np.zeros(32, np.uint32), written=False)
    with pytest.raises(
        PTXError, match=r"kernel, line \d+: .* thread 0 of block 0 reads what nobody"
    ):
        launch(body.format(store=""), np.zeros(32, np.uint32), written=False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text + text, "expected one kernel; got 2"),
        (lambda text: text.replace(".reqntid", ".other"), "does not say how many threads"),
        (lambda text: text.replace("ret;", "ret"), "half a statement"),
        (lambda text: text.replace("ret;", ".align 4;"), "unknown declaration"),
    ],
    ids=["two", "threads", "half", "declaration"],
)
def test_text_that_is_not_understood(edit: Callable[[str], str], message: str) -> None:
    with pytest.raises(PTXError, match=message):
        parse(edit(KERNEL.format(parameters="", threads=32, body="")))
