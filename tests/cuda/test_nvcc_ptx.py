"""nvcc's PTX of the example kernels on the CPU, and instructions that Triton does not emit."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cuda.examples import matrix_product, skip_without_nvcc, staged_depthwise, warp_sums
from cuda.mutations import replaced, without_barrier, without_wait
from cuda.proof import ARCHS
from cuda.resources import resources
from cuda.sources import ROOT, Program
from ptx.arithmetic import decode
from ptx.parse import PTXError, parse
from ptx_text import compute, launch

Array = npt.NDArray[Any]

DEVICES = ("sm_80", "sm_90a", "sm_100")
PROGRAMS = sorted(
    path.stem
    for path in (ROOT / "csrc" / "cuda").glob("*.cu")
    if "__global__" in path.read_text(encoding="utf-8") or path.with_suffix(".h").exists()
)


@pytest.fixture
def nvcc() -> None:
    skip_without_nvcc()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values(nvcc: None, dtype: torch.dtype, arch: str) -> None:
    staged_depthwise(dtype).check(seeds=(), archs=(arch,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrices(nvcc: None, dtype: torch.dtype) -> None:
    matrix_product(dtype).check(seeds=())


def test_what_threads_tell_each_other(nvcc: None) -> None:
    warp_sums().check(seeds=())


BUGS = {
    "no barrier before reading": (without_barrier(0), "race"),
    "no barrier after reading": (without_barrier(1), "race"),
    "no wait for the tile": (without_wait(0), "reads what an asynchronous copy still brings"),
    "no mask at the tail": (replaced(r" && left \+ x < image.width", ""), ""),
    "a misaligned vector": (replaced(r"&input\[from\]", "&input[from + 1]"), "not aligned to 16"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.replace(" ", "_"))
def test_bugs_are_found(nvcc: None, bug: str) -> None:
    edit, told = BUGS[bug]
    assert told in staged_depthwise().finds(edit, seeds=(), archs=("sm_80",))


@pytest.mark.parametrize("name", ["staged_depthwise", "matrix_product"])
def test_resources(nvcc: None, name: str) -> None:
    found = resources(Program(name), "sm_80")
    assert len(found) == 2
    for kernel, of_one in found.items():
        assert kernel.startswith(f"_ZN8fastfuse4cuda{len(name)}{name}I")
        assert 16 < of_one.registers < 128
        assert (of_one.stack, of_one.spills) == (0, 0)
        assert of_one.opcodes["HMMA" if name == "matrix_product" else "FFMA"] > 8


@pytest.mark.slow
@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_spills(nvcc: None, name: str, arch: str) -> None:
    spilled = {
        kernel: (of_one.registers, of_one.stack, of_one.spills)
        for kernel, of_one in resources(Program(name), arch).items()
        if of_one.stack or of_one.spills
    }
    assert not spilled, "registers, bytes of the stack, accesses to local memory"


# Instructions

COMPUTED: dict[str, tuple[str, list[str], list[list[int]], list[int]]] = {
    "mul.hi.u64": ("u64", ["u64"] * 2, [[2**63, 2**64 - 1], [6, 2**64 - 1]], [3, 2**64 - 2]),
    "mul.hi.s64": ("s64", ["s64"] * 2, [[-(2**62), -1, 2**62], [8, 1, -3]], [-2, -1, -1]),
    "mad.hi.s32": ("s32", ["s32"] * 3, [[2**30, -1], [8, 1], [5, 5]], [7, 4]),
    "popc.b32": ("u32", ["b32"], [[0, 2**32 - 1, 0xF0]], [0, 32, 4]),
    "popc.b64": ("u32", ["u64"], [[2**64 - 1]], [64]),
    "clz.b32": ("u32", ["b32"], [[0, 1, 2**31]], [32, 31, 0]),
    "bfi.b32": (
        "b32", ["b32"] * 4,
        [[0xFF, 0xFF, 0xFF], [0, 0, 0x12345678], [4, 28, 0], [4, 8, 0]],
        [0xF0, 0xF0000000, 0x12345678],
    ),
    "shf.l.wrap.b32": (
        "b32", ["b32"] * 3, [[0x80000001, 0x80000001], [2, 2], [1, 33]], [5, 5]
    ),
    "shf.r.clamp.b32": ("b32", ["b32"] * 3, [[1, 1], [6, 6], [1, 40]], [0, 6]),
    "slct.s32.s32": ("s32", ["s32"] * 3, [[1, 1, 1], [2, 2, 2], [0, -1, 5]], [1, 2, 1]),
    "add.bf16x2": ("b32", ["b32"] * 2, [[0x3F80C000], [0x3F804000]], [0x40000000]),
    "max.bf16x2": ("b32", ["b32"] * 2, [[0x3F80C000], [0x40004000]], [0x40004000]),
    "mul.f16x2": ("b32", ["b32"] * 2, [[0x3C00C000], [0x40004000]], [0x4000C400]),
}  # fmt: skip


@pytest.mark.parametrize("opcode", COMPUTED)
def test_computed(opcode: str) -> None:
    kind, kinds, values, expected = COMPUTED[opcode]
    arrays = [np.array([v % 2**64 for v in value], np.uint64) for value in values]
    result = compute(opcode, kind, *arrays, kinds=kinds)
    assert [int(v) for v in result] == expected


def logic(table: int) -> list[int]:
    a, b, c = (np.tile(np.array([v], np.uint32), 32) for v in (0xF0, 0xCC, 0xAA))
    body = [f"ld.global.b32 %r{i}, [%rd{i}];" for i in (1, 2, 3)]
    body += [f"lop3.b32 %r4, %r1, %r2, %r3, {table:#x};", "st.global.b32 [%rd0], %r4;"]
    return [int(v) & 0xFF for v in launch("\n".join(body), np.zeros(32, np.uint32), a, b, c)[0]]


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xCA, 0xE8, 0xFE])
def test_logic_of_three_registers(table: int) -> None:
    """The operands' bits are those of the table's own index."""
    assert logic(table) == [table] * 32


@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_fma_of_halves_rounds_once(half: str) -> None:
    """No number is nearer to the exact value."""
    random = np.random.default_rng(0)
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[half]
    values = torch.from_numpy(random.standard_normal((3, 992)) * 8).to(kind)
    values[2, ::2] = -(values[0] * values[1])[::2]
    values[2, 1::4] *= 2.0**-9
    bits = values.view(torch.int16).numpy().astype(np.uint16)
    pairs = [np.ascontiguousarray(row).view(np.uint32) for row in bits]
    result = compute(f"fma.rn.{half}x2", "b32", *pairs, kinds=["b32"] * 3).view(np.uint16)
    a, b, c = values.double().tolist()
    for x, y, z, got in zip(a, b, c, result, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        around = np.array([int(got), int(got) - 1, int(got) + 1]).astype(np.uint16)
        numbers = [Fraction(float(v)) for v in decode(around, half) if np.isfinite(v)]
        assert abs(numbers[0] - exact) == min(abs(number - exact) for number in numbers)


CONDITIONS: Sequence[tuple[str, list[int]]] = [
    ("setp.lt.and.s32 %p1, %r1, 3, %p2;", [1, 1, 0, 0]),
    ("setp.lt.or.s32 %p1, %r1, 3, !%p2;", [1, 1, 1, 1]),
    ("setp.ge.s32 %p3|%p1, %r1, 2;", [1, 1, 0, 0]),
    ("setp.hi.u32 %p1, %r1, 1;", [0, 0, 1, 1]),
]


@pytest.mark.parametrize(("line", "expected"), CONDITIONS)
def test_conditions(line: str, expected: list[int]) -> None:
    body = f"mov.u32 %r1, %tid.x; setp.lt.u32 %p2, %r1, 2; {line}"
    body += " selp.b32 %r2, 1, 0, %p1; st.global.b32 [%rd0], %r2;"
    assert launch(body, np.zeros(32, np.uint32))[0][:4].tolist() == expected


def test_registers_of_inner_braces_are_their_own() -> None:
    body = """
mov.u32 %r1, 5;
{
.reg .b32 %r1;
.reg .pred p;
mov.u32 %r1, 7;
setp.eq.u32 p, %r1, 7;
selp.b32 %r2, %r1, 0, p;
}
add.s32 %r3, %r1, %r2;
st.global.b32 [%rd0], %r3;"""
    assert launch(body, np.zeros(32, np.uint32))[0].tolist() == [12] * 32


TWO = """
.version 8.0
.entry one(.param .u32 a) .maxntid 32, 1, 1
{
	.shared .align 8 .b8 first[12];
	.shared .align 16 .b8 second[8];
	ret;
}
.entry two(.param .align 8 .b8 sizes[24]) .maxntid 8, 4, 2
{
	ret;
}
"""


def test_kernels_of_a_module() -> None:
    one, two = parse(TWO, "one"), parse(TWO, "two")
    assert (one.threads, two.block, two.threads) == (32, (8, 4, 2), 64)
    assert (one.parameters, two.parameters) == ({"a": 4}, {"sizes": 24})
    assert (one.symbols, one.shared_bytes) == ({"first": 0, "second": 16}, 24)
    with pytest.raises(PTXError, match="expected one kernel; got 2"):
        parse(TWO)
    with pytest.raises(PTXError, match="expected one kernel three; got 0"):
        parse(TWO, "three")


@pytest.mark.parametrize("line", ["call f;", "shfl.sync.up.b32 %r1, %r1, 1, 0, 3;"])
def test_what_is_not_known(line: str) -> None:
    with pytest.raises(PTXError, match=r"unknown instruction|is not known"):
        launch(line, np.zeros(32, np.uint32))
