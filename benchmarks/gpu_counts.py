"""What can be counted of a launch of a Triton kernel without a device.

What the compiler made of it, and what a sample of its programs does when the PTX machine of the
tests (``tests/support/ptx``, which has to be on the path) runs them. Both are kept under .cache/.
``gpu_counts_cuda`` does so for CUDA C++.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import ptx
import triton
from ptx.counts import Array, Counts, Traffic
from ptx.parse import Kernel, parse
from ptx.sample import count, spread, storage
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton_offline import CACHE, CUOBJDUMP, Launch, compiled, inspect, kept, specialised

NVDISASM = CUOBJDUMP.with_name("nvdisasm")
COUNTED = CACHE.with_name("gpu_report")
COUNTED_ON = 90  # the architecture of the GPUs whose bounds are given
SAMPLE_THREADS = 4096  # of the programs that are run
MIN_SAMPLE, MAX_SAMPLE = 8, 32

# Classes of machine instructions, by how their names begin; the first that fits. HFMA2.MMA moves
# constants.
CLASSES = (
    (
        "control",
        r"BRA|BSS|BSY|BREAK|EXIT|RET|CALL|BAR|WARPSYNC|DEPBAR|VOTE|SHFL|REDUX|MATCH|MEMBAR",
    ),
    ("memory", r"LD[GSL]|ST[GSL]|RED|ATOM"),
    ("matrix", r"[HQIBD]G?MMA"),
    ("conversion", r"F2|I2|FRND|PRMT"),
    ("special", r"MUFU"),
    ("float", r"F|D(ADD|MUL|FMA|SETP)|H(ADD|MUL|FMA|SETP|MNMX)2(?!\.MMA)"),
    ("integer", r""),  # addresses, moves, predicates, constants
)

# What certainly goes through the pipe of integers, comparisons and selections.
ALU = re.compile(
    r"IADD|LOP|SHF(?!L)|SH[LR]|LEA|[IF]SETP|PLOP|[IF]?SEL|PRMT|IABS|V?[IF]?I?MNMX|SGXT|BMSK|F2FP"
)

MATRIX = re.compile(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.")

Assembled = dict[str, Any]


def class_of(opcode: str) -> str:
    return next(name for name, pattern in CLASSES if re.match(pattern, opcode))


def assembled(launch: Launch, arch: int) -> Assembled:
    """What the compiler made of a launch: PTX, registers, stack, bytes of shared memory, widths of
    accesses, and machine instructions by the line of the PTX that they are for."""
    source, _, options = specialised(*launch)
    launched = f"{triton.__version__} {arch} {source.hash()} {sorted(options.items())}"
    key = hashlib.sha256(f"{launched} {own_source()}".encode()).hexdigest()

    def make() -> Assembled:
        kernel = compiled(*launch, arch)
        return {
            **inspect(kernel.asm),
            **widths(kernel.asm["ptx"]),
            "ptx": kernel.asm["ptx"],
            "shared": kernel.metadata.shared,
            "machine": machine_code(kernel.asm["cubin"]),
        }

    return kept(COUNTED / f"{key}.json", make)


@lru_cache
def own_source() -> str:
    """A hash of what counts."""
    files = [Path(__file__), *sorted(Path(str(ptx.__file__)).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def machine_code(cubin: bytes) -> dict[str, list[str]]:
    """Opcodes by the line of PTX ("0": none) that they are for, which the assembler notes.

    Without what is called where a division has an infinite or tiny operand.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVDISASM), "-gp", "-c", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line, found, is_rare = "0", defaultdict(list), False
    for text in dump.split("\n"):
        if of := re.search(r'## File "\.nv_debug_ptx_txt", line (\d+)', text):
            line = of[1]
        elif function := re.fullmatch(r"([\w$]+):", text):
            is_rare = function[1].endswith("_slowpath")
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
        if code and code[1] != "NOP" and not is_rare:
            found[line].append(code[1])
    return dict(found)


ACCESS = re.compile(
    r"\b(?:(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    r"|(cp)\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x\w+|\d+))"
)


def widths(ptx: str) -> dict[str, dict[str, int]]:
    """How many global loads ("ld", and copies to shared memory) and stores have how many bits."""
    found: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for what, values, bits, copied, nbytes in ACCESS.findall(ptx):
        if copied:
            found["ld"][8 * int(nbytes, 0)] += 1
        else:
            found[what][int(values or 1) * int(bits)] += 1
    return {what: {str(w): n for w, n in sorted(of.items())} for what, of in found.items()}


def instructions(
    kernel: Kernel, executed: Counter[int], code: dict[str, list[str]]
) -> Counter[str]:
    """Machine instructions by opcode, of the warps that executed lines of PTX so often.

    What is for no instruction is executed once. Nothing is unrolled, or a line's instructions would
    be there several times: the tests hold that.
    """
    lines = {i.line for i in kernel.instructions}
    entered = executed[kernel.instructions[0].line]
    totals: Counter[str] = Counter()
    for line, opcodes in code.items():
        times = executed[int(line)] if int(line) in lines else entered
        for opcode in opcodes:
            totals[opcode] += times
    return totals


def class_sizes(code: dict[str, list[str]]) -> dict[str, int]:
    """How many machine instructions of each class there are."""
    sizes = Counter(class_of(opcode) for opcodes in code.values() for opcode in opcodes)
    return {name: sizes[name] for name, _ in CLASSES}


def moved(arguments: dict[str, Any], read: set[int], written: set[int]) -> tuple[int, int]:
    """Bytes that a launch has to move, each tensor that it reads or writes once, and how many
    elements it writes.

    Of a tensor with the channels of several levels, of which a launch has one, that level's.
    """
    own = arguments.get("channels")
    nbytes, elements = 0.0, 0.0
    seen: set[int] = set()
    for name, argument in arguments.items():
        for value in tree_leaves(argument):
            if not isinstance(value, Tensor) or storage(value) in seen:
                continue
            seen.add(storage(value))
            size: float = min(
                value.numel(), value.untyped_storage().nbytes() // value.element_size()
            )
            if "level" in arguments and name in ("out", "grad_out") and isinstance(own, int):
                size *= own / value.shape[1]
            is_read, is_written = storage(value) in read, storage(value) in written
            nbytes += size * value.element_size() * (is_read + is_written)
            elements += size * is_written
    return round(nbytes), round(elements)


def _scaled(traffic: Traffic, scale: float) -> dict[str, int]:
    return {
        "instructions": round(traffic.instructions * scale),
        "moved": round(traffic.sectors * scale),
        "least": round(traffic.least * scale),
        "useful_bytes": round(traffic.useful * scale),
    }


def estimated(
    kernel: Kernel, machine: dict[str, list[str]], grid: tuple[int, int, int],
    run: Callable[[Array], tuple[Counts, int, int]],
) -> dict[str, Any]:  # fmt: skip
    """What a launch does, from a sample of its programs; ``run`` gives also bytes and outputs."""
    programs = prod(grid)
    sample = min(max(SAMPLE_THREADS // kernel.threads, MIN_SAMPLE), MAX_SAMPLE)
    blocks = spread(programs, sample)
    counts, nbytes, elements = run(blocks)
    scale = programs / len(blocks)
    executed = instructions(kernel, counts.executed, machine)
    mix: Counter[str] = Counter()
    for opcode, times in executed.items():
        mix[class_of(opcode)] += times
    flops = sum(
        counts.executed[i.line] * 2 * prod(map(int, shape.groups()))
        for i in kernel.instructions
        if (shape := MATRIX.match(i.opcode))
    )
    return {
        "programs": programs,
        "threads": kernel.threads,
        "sampled": len(blocks),
        "bytes": nbytes,
        "outputs": elements,
        "instructions": round(executed.total() * scale),
        "alu": round(sum(n for code, n in executed.items() if ALU.match(code)) * scale),
        "mix": {name: round(mix[name] * scale) for name, _ in CLASSES},
        "matrix_flops": round(flops * scale),
        "shuffles": round(
            sum(n for code, n in executed.items() if code.startswith("SHFL")) * scale
        ),
        "sectors_of_programs": round(counts.sectors_of_blocks * scale),
        "loads": _scaled(counts.loads, scale),
        "stores": _scaled(counts.stores, scale),
        "shared": _scaled(counts.shared, scale),
        "accesses": [
            {"what": str(instruction), **_scaled(traffic, scale)}
            for (instruction, _), traffic in counts.traffic.items()
        ],
    }


def counted(launch: Launch, programs: int, arch: int = COUNTED_ON) -> dict[str, Any]:
    """What a launch's programs do, estimated from a sample that runs."""
    made = assembled(launch, arch)
    _, remaining, _ = specialised(*launch)
    described = [
        (kind, (tuple(v.shape), v.stride(), v.storage_offset()) if isinstance(v, Tensor) else v)
        for kind, v in remaining
    ]
    tags = [made["ptx"], str(described), str(programs), own_source()]
    key = hashlib.sha256("\0".join(tags).encode()).hexdigest()

    def make() -> dict[str, Any]:
        kernel = parse(made["ptx"])
        values = [value if isinstance(value, Tensor) else int(value) for _, value in remaining]
        grid = (programs, 1, 1)

        def run(blocks: Array) -> tuple[Counts, int, int]:
            counts, read, written = count(kernel, values, grid, blocks, made["shared"])
            return (counts, *moved(launch[1], read, written))

        return estimated(kernel, made["machine"], grid, run)

    return kept(COUNTED / f"{key}.json", make)
