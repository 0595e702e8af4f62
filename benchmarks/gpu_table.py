"""docs/gpu_report.md of what benchmarks/gpu_report.py counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from gpu_bounds import H100, H200, Device, binding, bounds

Row = dict[str, Any]

IN_CUDA = ", CUDA C++"  # ends a call's name

HEAD = """# What the GPU kernels do, counted without a device

`make gpu-report` writes this page and `benchmarks/results/gpu-report.json`, which the tests hold
the kernels to (`tests/triton/test_gpu_report.py`). It was made with triton {triton} and nvcc
{nvcc}. Nothing here is measured, and no number is a time: [gpu.md](gpu.md#what-is-counted) says how
each is found, what it assumes and what it leaves out.

Images are 2 (16 for `depthwise_conv2d`, of 192 channels and 64 x 64, and for the steps of blocks,
which have 65,536 rows of 192 or 768 channels); `benchmarks/gpu_cases.py` has all shapes. Kernels of
which sm_80 is said are counted as they are compiled for it: for sm_90 they multiply with
instructions that the machine does not know, and access shared memory less.

{summary}

## Triton and CUDA C++

Of the ops that have kernels in both, in channels_last: the sum of every launch's largest bound, in
µs, and what binds most of it.

"""
TWINS_COLUMNS = ("call", "Triton, H100", "CUDA C++, H100", "Triton, H200", "CUDA C++, H200")

CALLS = """
## Calls

Of a H100, in µs: the sum of every launch's largest bound, that of **dram** alone, below which no
kernel can be whose tensors are in no cache before, and how many times the second the first is.

"""
CALLS_COLUMNS = ("call", "launches", "compilations", "bound", "dram", "times")

BOUNDS = """
## Counts and bounds, sm_90

- **programs**, **waves**: of the grid; a wave is as many as the 132 multiprocessors hold at once.
- **useful**: of the bytes in the 32-byte sectors that instructions of a warp move, those that its
  threads ask for: of loads, of stores, in percent.
- **conflicts**: wavefronts of shared memory, by those that there would be without bank conflicts.
- **instr**: machine instructions of warps for 32 elements that are written; **mix**, of these in
  percent: memory, float, integer (addresses and moves too), conversion, special, control (barriers
  and shuffles too), and matrix where there are such.
- **Bounds**, in µs: **dram** (each tensor once; at 3.35 TB/s on a H100, 4.8 on a H200), **l2**
  (the distinct sectors of each program), **access** (4 sectors, one wavefront or one shuffle a
  cycle), **issue** (4 instructions a cycle), **alu** (2 of integers, comparisons and selections),
  **special** (one of exponentials, reciprocals and roots in two cycles), **matrix** (products of
  16-bit matrices at 989 TFLOPS), **tail** (the largest of these five on the multiprocessor that has
  the most programs).
- **binds**: the largest, the tail if it is so by a tenth; on a H100 and, if another, on a H200.

"""
BOUNDS_COLUMNS = (
    "call", "kernel", "programs", "waves", "useful", "conflicts", "instr", "mix", "dram", "H200",
    "l2", "access", "issue", "alu", "special", "matrix", "tail", "binds",
)  # fmt: skip

BUILT = """
## What the compiler makes of them

Registers of a thread, warps that a multiprocessor holds, bytes of shared memory and machine
instructions, each for sm_80, sm_90 and sm_100; bytes of the stack (spills), the most of any; how
many global loads and stores have how many bits, sm_90.

"""
BUILT_COLUMNS = (
    "call", "kernel", "compilations", "registers", "warps", "shared", "code", "spills", "loads",
    "stores",
)  # fmt: skip


def _header(columns: tuple[str, ...]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"


def useful(row: Row, what: str) -> str:
    """In percent, of the bytes of the sectors that loads or stores move."""
    moved = row[what]["moved"]
    return f"{100 * row[what]['useful_bytes'] / (32 * moved):.0f}" if moved else "–"


def per_32_outputs(row: Row) -> float:
    return 32 * row["instructions"] / max(row["outputs"], 1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _call_line(name: str, call: Row) -> str:
    found = [bounds(row, H100) for row in call["launches"]]
    bound, dram = sum(max(b.values()) for b in found), sum(b["dram"] for b in found)
    cells = [
        name,
        str(len(found)),
        str(call["compilations"]),
        *(_number(1e6 * seconds) for seconds in (bound, dram)),
        f"{bound / dram:.1f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _bounds_line(name: str, row: Row) -> str:
    h100, h200 = bounds(row, H100), bounds(row, H200)
    resident = row["built"]["sm_90"]["programs"] * H100.multiprocessors
    mix, shared = row["mix"], row["shared"]
    order = ["memory", "float", "integer", "conversion", "special", "control"]
    order += ["matrix"] if mix["matrix"] else []
    binds = list(dict.fromkeys([binding(h100), binding(h200)]))
    cells = [
        name,
        row["kernel"] + (f" (sm_{row['counted_on']})" if row["counted_on"] != 90 else ""),
        f"{row['programs']:,}",
        f"{row['programs'] / resident:.2f}",
        f"{useful(row, 'loads')} {useful(row, 'stores')}",
        f"{shared['moved'] / shared['least']:.1f}" if shared["least"] else "–",
        _number(per_32_outputs(row)),
        " ".join(f"{100 * mix[kind] / row['instructions']:.0f}" for kind in order),
        *(_number(1e6 * seconds) for seconds in (h100["dram"], h200["dram"])),
        *(
            _number(1e6 * h100[what])
            for what in ("l2", "access", "issue", "alu", "special", "matrix", "tail")
        ),
        ", ".join(binds),
    ]
    return f"| {' | '.join(cells)} |\n"


def _built_line(name: str, compilations: str, row: Row) -> str:
    built = row["built"].values()
    widths = row["built"]["sm_90"]
    cells = [
        name,
        row["kernel"],
        compilations,
        *(" ".join(str(b[what]) for b in built) for what in ("registers", "warps", "shared")),
        " ".join(str(sum(b["code"].values())) for b in built),
        str(max(b["stack"] for b in built)),
        *(", ".join(f"{n} of {w}" for w, n in widths[what].items()) for what in ("ld", "st")),
    ]
    return f"| {' | '.join(cells)} |\n"


def _bound(call: Row, device: Device) -> str:
    """Of all launches, and what binds the largest part of it."""
    parts: dict[str, float] = defaultdict(float)
    for row in call["launches"]:
        found = bounds(row, device)
        parts[binding(found)] += max(found.values())
    return f"{_number(1e6 * sum(parts.values()))}, {max(parts, key=parts.__getitem__)}"


def _twins_line(name: str, twins: tuple[Row, Row]) -> str:
    cells = [name.replace(", channels_last ", ", ")]
    for device in (H100, H200):
        cells += [_bound(call, device) for call in twins]
    return f"| {' | '.join(cells)} |\n"


def page(report: dict[str, Any]) -> str:
    calls: dict[str, Row] = report["calls"]
    rows = [row for call in calls.values() for row in call["launches"]]
    binds = Counter(binding(bounds(row, H100)) for row in rows)
    spilling = sum(any(b["stack"] for b in row["built"].values()) for row in rows)
    summary = (
        f"{len(calls)} calls are {len(rows)} launches, of which {spilling or 'none'} spill. What "
        "bounds them most on a H100: "
        + ", ".join(f"{name} {n}" for name, n in binds.most_common())
        + "."
    )
    text = HEAD.format(**report, summary=summary) + _header(TWINS_COLUMNS)
    for name in calls:
        if "channels_last" in name and name + IN_CUDA in calls:
            text += _twins_line(name, (calls[name], calls[name + IN_CUDA]))
    text += CALLS + _header(CALLS_COLUMNS)
    text += "".join(_call_line(*call) for call in calls.items())
    text += BOUNDS + _header(BOUNDS_COLUMNS)
    for name, call in calls.items():
        for i, row in enumerate(call["launches"]):
            text += _bounds_line("" if i else name, row)
    text += BUILT + _header(BUILT_COLUMNS)
    for name, call in calls.items():
        for i, row in enumerate(call["launches"]):
            text += _built_line("" if i else name, "" if i else str(call["compilations"]), row)
    return text
