"""PTX of small kernels, as tests write it, and run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ptx.machine import Machine, run
from ptx.memory import Layout
from ptx.parse import BITS, parse

Array = npt.NDArray[Any]

KERNEL = """
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<12>;
	.reg .b64 %rd<20>;
{body}
	ret;
}}
"""
# Every thread has its number in %r0, and addresses of its element of every array in %rd0...
THREAD = "mov.u32 %r0, %tid.x;"
SHARED = ".extern .shared .align 16 .b8 memory[];\n"


def launch(
    body: str, *arrays: Array, threads: int = 32, blocks: int = 1, written: bool = True
) -> list[Array]:
    """The arrays after a kernel ran on them; an element of each belongs to a thread."""
    lines, places, layout = [THREAD], [], Layout()
    for i, array in enumerate(arrays):
        data = array.view(np.uint8)
        valid = np.ones(len(data), bool)
        places.append(layout.place(data, valid, valid if written else ~valid))
        lines += [f"ld.param.b64 %rd{i}, [p{i}];"]
        lines += [f"mad.wide.u32 %rd{i}, %r0, {array.itemsize}, %rd{i};"]
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 p{i}" for i in range(len(arrays)))
    text = SHARED + KERNEL.format(
        parameters=parameters, threads=threads, body="\n".join([*lines, body])
    )
    addresses = [Machine.GLOBAL_BASE + place for place in places]
    memory = run(parse(text), addresses, (blocks,), layout, shared_size=4 * threads)
    return [
        memory.data[place : place + array.nbytes].view(array.dtype)
        for place, array in zip(places, arrays, strict=True)
    ]


REGISTERS = {1: "%p", 16: "%rs", 32: "%r", 64: "%rd"}
DTYPES = {
    **{"b16": np.uint16, "u64": np.uint64, "u32": np.uint32, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16},
    **{"b32": np.uint32, "bf16x2": np.uint32},
}


def compute(opcode: str, kind: str, *values: Array, kinds: Sequence[str] = ()) -> Array:
    """What an instruction gives, of a type, for operands of their types (else the same)."""
    kinds = kinds or [kind] * len(values)
    length = -(-len(values[0]) // 32) * 32
    padded = [np.resize(v, length).astype(DTYPES[k]) for v, k in zip(values, kinds, strict=True)]
    names = [f"{REGISTERS[BITS[k]]}{5 + i}" for i, k in enumerate([kind, *kinds])]
    body = [
        f"ld.global.b{BITS[k]} {name}, [%rd{i} + 0];"
        for i, (k, name) in enumerate(zip(kinds, names[1:], strict=True), 1)
    ]
    body += [f"{opcode} {', '.join(names)};", f"st.global.b{BITS[kind]} [%rd0], {names[0]};"]
    out = np.zeros(length, DTYPES[kind])
    return launch("\n".join(body), out, *padded, threads=length)[0][: len(values[0])]
