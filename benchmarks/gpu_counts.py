"""What can be counted of a launch of a Triton kernel without a device.

What the compiler made of it, and what a sample of its programs does when the PTX machine of the
tests (``tests/support/ptx``, which has to be on the path) runs them. Both are kept under .cache/.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import ptx
import triton
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

# Classes of machine instructions, by how their names begin; the first that fits.
CLASSES = (
    ("memory", r"LD|ST|RED|ATOM|UTMA|CCTL"),
    ("conversion", r"F2|I2|F2FP|FRND|PRMT"),
    ("special", r"MUFU"),
    ("float", r"F|D(ADD|MUL|FMA|SETP)|H[A-Z]*2|HFMA"),
    ("control", r"BRA|BSS|BSY|BREAK|EXIT|RET|CALL|BAR|WARPSYNC|DEPBAR|YIELD|NANOSLEEP|BMOV|VOTE|"
                r"SHFL|REDUX|MATCH|WARPGROUP|ERRBAR|MEMBAR"),
    ("integer", r""),
)  # fmt: skip
# What one instruction of PTX is in machine code, as often as the assembler has copied it.
COPIED = {r"fma\.rn\.f32": "FFMA", r"ld\.global": "LDG", r"st\.global": "STG"}

Assembled = dict[str, Any]


def class_of(opcode: str) -> str:
    return next(name for name, pattern in CLASSES if re.match(pattern, opcode))


def assembled(launch: Launch, arch: int) -> Assembled:
    """What the compiler made of a launch: PTX, registers, stack, bytes of shared memory, widths of
    accesses, and machine instructions by the line of the PTX that they are for."""
    source, _, options = specialised(*launch)
    launched = f"{triton.__version__} {arch} {source.hash()} {sorted(options.items())}"
    key = hashlib.sha256(f"{launched} {_own_source()}".encode()).hexdigest()

    def make() -> Assembled:
        kernel = compiled(*launch, arch)
        return {
            **inspect(kernel.asm),
            "ptx": kernel.asm["ptx"],
            "shared": kernel.metadata.shared,
            "machine": machine_code(kernel.asm["cubin"]),
        }

    return kept(COUNTED / f"{key}.json", make)


@lru_cache
def _own_source() -> str:
    """A hash of what counts."""
    files = [Path(__file__), *sorted(Path(str(ptx.__file__)).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def machine_code(cubin: bytes) -> dict[str, list[str]]:
    """Opcodes by the line of PTX ("0": none); the assembler tells it of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVDISASM), "-gp", "-c", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line, found = "0", defaultdict(list)
    for text in dump.split("\n"):
        if of := re.search(r'## File "\.nv_debug_ptx_txt", line (\d+)', text):
            line = of[1]
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
        if code and code[1] != "NOP":
            found[line].append(code[1])
    return dict(found)


def instructions(
    kernel: Kernel, executed: Counter[int], code: dict[str, list[str]]
) -> Counter[str]:
    """Machine instructions by class, of the warps that executed lines of PTX so often.

    Where the assembler unrolled a loop, a line's instructions are there several times, and an
    execution of the line executes one of its copies.
    """
    entered = executed[kernel.instructions[0].line]
    lines = {i.line for i in kernel.instructions}
    copies = _copies(kernel, code)
    totals: Counter[str] = Counter()
    for line, opcodes in code.items():
        number = int(line)
        times = executed[number] if number in lines else entered
        for opcode in opcodes:
            totals[class_of(opcode)] += times / copies.get(number, 1)
    return totals


def _copies(kernel: Kernel, code: dict[str, list[str]]) -> dict[int, float]:
    """How often the assembler has copied each line: as often as those of its block that are one
    instruction, which have the same."""
    starts = {*kernel.labels.values()}
    starts |= {i + 1 for i, what in enumerate(kernel.instructions) if what.opcode.startswith("bra")}
    found: dict[int, float] = {}
    block: list[int] = []
    seen: list[int] = []
    for i, what in enumerate([*kernel.instructions, None]):
        if what is None or i in starts:
            ratio = sum(seen) / len(seen) if seen else 1
            found |= dict.fromkeys(block, max(ratio, 1))
            block, seen = [], []
        if what is not None:
            block.append(what.line)
            for pattern, opcode in COPIED.items():
                if re.match(pattern, what.opcode):
                    there = [c for c in code.get(str(what.line), ()) if c.startswith(opcode)]
                    seen += [len(there)] if there else []
    return found


def moved_bytes(launch: Launch, read: set[int], written: set[int]) -> int:
    """What a launch has to move: each tensor that it reads or writes, once.

    Of a tensor with the channels of several levels, of which a launch has one, that level's.
    """
    _, arguments = launch
    own = arguments.get("channels")
    total = 0.0
    seen: set[int] = set()
    for name, argument in arguments.items():
        for value in tree_leaves(argument):
            if not isinstance(value, Tensor) or storage(value) in seen:
                continue
            seen.add(storage(value))
            nbytes = min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
            if "level" in arguments and name in ("out", "grad_out") and isinstance(own, int):
                nbytes *= own / value.shape[1]
            total += nbytes * ((storage(value) in read) + (storage(value) in written))
    return round(total)


def counted(launch: Launch, programs: int) -> dict[str, Any]:
    """What a launch's programs do, estimated from a sample that runs."""
    made = assembled(launch, COUNTED_ON)
    _, remaining, _ = specialised(*launch)
    described = [
        (kind, (tuple(v.shape), v.stride(), v.storage_offset()) if isinstance(v, Tensor) else v)
        for kind, v in remaining
    ]
    tags = [made["ptx"], str(described), str(programs), _own_source()]
    key = hashlib.sha256("\0".join(tags).encode()).hexdigest()

    def make() -> dict[str, Any]:
        kernel = parse(made["ptx"])
        sample = min(max(SAMPLE_THREADS // kernel.threads, MIN_SAMPLE), MAX_SAMPLE)
        blocks = spread(programs, sample)
        values = [value for _, value in remaining]
        counts, read, written = count(kernel, values, (programs, 1, 1), blocks, made["shared"])
        scale = programs / len(blocks)
        mix = instructions(kernel, counts.executed, made["machine"])
        special = sum(
            counts.executed[int(line)]
            for line, opcodes in made["machine"].items()
            for opcode in opcodes
            if opcode.startswith("MUFU")
        )
        return {
            "programs": programs,
            "threads": kernel.threads,
            "sampled": len(blocks),
            "moved_bytes": moved_bytes(launch, read, written),
            "ptx_instructions": round(counts.instructions * scale),
            "instructions": round(mix.total() * scale),
            "mix": {name: round(mix[name] / mix.total(), 4) for name, _ in CLASSES},
            "special": round(special * scale),
            "block_sectors": round((len(counts.loaded) + len(counts.stored)) * scale),
            **{
                name: {
                    "instructions": round(traffic.instructions * scale),
                    "moved": round(traffic.sectors * scale),
                    "least": round(traffic.least * scale),
                    "useful_bytes": round(traffic.useful * scale),
                }
                for name, traffic in (
                    ("loads", counts.loads), ("stores", counts.stores), ("shared", counts.shared),
                )
            },
        }  # fmt: skip

    return kept(COUNTED / f"{key}.json", make)
