"""What can be counted of every GPU kernel without a device, and what that bounds.

``make gpu-report`` writes benchmarks/results/gpu-report.json, which tests hold the kernels to, and
docs/gpu_report.md. Of some cases alone, and nothing written:

    PYTHONPATH=.:tests/support python benchmarks/gpu_report.py --only tap_sum --accesses
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_counts_cuda
import torch
import triton
from cuda.sources import MissingCompilerError
from gpu_bounds import H100, MULTIPROCESSORS, WARP, binding, bounds, resident_programs
from gpu_cases import CASES, Case
from gpu_counts import COUNTED_ON, Assembled, assembled, class_sizes, counted
from gpu_table import IN_CUDA, page, per_32_outputs, useful
from triton_offline import recorded_programs, specialisation

from fastfuse._terminal import spell_out

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "benchmarks" / "results" / "gpu-report.json"
PAGE = ROOT / "docs" / "gpu_report.md"
ARCHITECTURES = tuple(MULTIPROCESSORS)
TOLERANCE = 0.02  # by which counts may grow

Row = dict[str, Any]


def calls() -> Iterator[tuple[str, tuple[Case, str, str]]]:
    """Every case in its layouts and dtypes, by what it is named then."""
    for case in CASES:
        for layout in case.layouts:
            for dtype in case.dtypes:
                yield f"{case.name}, {layout} {dtype}", (case, layout, dtype)
                if case.cuda is not None and layout in case.cuda_layouts:
                    twin = replace(case, call=case.cuda, backend="cuda")
                    yield f"{case.name}, {layout} {dtype}{IN_CUDA}", (twin, layout, dtype)


def _row(
    kernel: str, counts: Row, architectures: Sequence[int], assembled: Callable[[int], Assembled],
    shared: int = 0,
) -> Row:  # fmt: skip
    """Of a launch; ``shared`` bytes come to those that a kernel has."""
    built = {}
    for arch in architectures:
        made = assembled(arch)
        made = {**made, "shared": made["shared"] + shared}
        limits = made["registers"], made["shared"], counts["threads"]
        resident = resident_programs(*limits, MULTIPROCESSORS[arch])
        built[f"sm_{arch}"] = {
            **{name: made[name] for name in ("registers", "stack", "shared", "ld", "st")},
            "programs": resident,
            "warps": resident * counts["threads"] // WARP,
            "code": class_sizes(made["machine"]),
        }
    return {"kernel": kernel, **counts, "built": built}


def measured(case: Case, layout: str, dtype: str, architectures: Sequence[int]) -> Row:
    """What a call launches and compiles, and the counts of each launch."""
    call = partial(case.call, layout, getattr(torch, dtype))
    if case.backend == "cuda":
        return _measured_cuda(call, architectures)
    recorded = recorded_programs(call)
    rows = []
    for launch, programs in recorded:
        counts = counted(launch, programs, case.counted_on)
        counts["counted_on"] = case.counted_on
        kernel = launch[0].__name__.strip("_")
        rows.append(_row(kernel, counts, architectures, partial(assembled, launch)))
    compilations = len({specialisation(launch) for launch, _ in recorded})
    return {"compilations": compilations, "launches": rows}


def _measured_cuda(call: Callable[[], Any], architectures: Sequence[int]) -> Row:
    rows, kernels = [], set()
    for launched in gpu_counts_cuda.recorded(call):
        launch = launched.launch
        counts = {**gpu_counts_cuda.counted(launched), "counted_on": COUNTED_ON}
        made = partial(gpu_counts_cuda.assembled, launched.program, launch.kernel)
        name = f"cuda {launched.name}"
        rows.append(_row(name, counts, architectures, made, launch.shared_bytes))
        kernels.add(launch.kernel)
    return {"compilations": len(kernels), "launches": rows}


def regressions(name: str, before: Row, now: Row) -> list[str]:
    """What a call does more of than before, and what it spills."""
    found = []

    def compare(what: str, old: float, new: float) -> None:
        if new > old * (1 + TOLERANCE):
            found.append(f"{name}: {what} {new:g}, where there were {old:g}")

    compare("compilations", before["compilations"], now["compilations"])
    compare("launches", len(before["launches"]), len(now["launches"]))
    for i, row in enumerate(now["launches"]):
        for arch, built in row["built"].items():
            if built["stack"] > 0:
                found.append(f"{name}: {i} {row['kernel']} spills {built['stack']} bytes, {arch}")
    for what in ("loads", "stores", "shared"):
        moved = [sum(row[what]["moved"] for row in call["launches"]) for call in (before, now)]
        compare("wavefronts" if what == "shared" else f"sectors of {what}", *moved)
    distinct = [
        sum(row["sectors_of_programs"] for row in call["launches"]) for call in (before, now)
    ]
    compare("sectors of programs", *distinct)
    per_output = [
        sum(row["instructions"] for row in call["launches"])
        / max(sum(row["outputs"] for row in call["launches"]), 1)
        for call in (before, now)
    ]
    compare("instructions of an output", *per_output)
    return found


def _flat(row: Row, prefix: str = "") -> dict[str, Any]:
    """Values by the path to them; widths of accesses, which differ, are one value."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict) and name not in ("ld", "st"):
            found |= _flat(value, f"{prefix}{name}.")
        elif name != "accesses":
            found[prefix + name] = value
    return found


def save(report: dict[str, Any], path: Path) -> None:
    """JSON with a line for each launch: its values, in the order of their names."""
    rows = {name: list(map(_flat, call["launches"])) for name, call in report["calls"].items()}
    names = list(next(iter(rows.values()))[0])
    made_with = f'"triton": "{report["triton"]}", "nvcc": "{report["nvcc"]}"'
    text = f'{{{made_with}, "values": {json.dumps(names)}, "calls": {{'
    for i, (name, launches) in enumerate(rows.items()):
        compilations = report["calls"][name]["compilations"]
        lines = [json.dumps([row[n] for n in names], separators=(",", ":")) for row in launches]
        text += ",\n" if i else "\n"
        text += f'{json.dumps(name)}: {{"compilations": {compilations}, "launches": [\n'
        text += ",\n".join(lines) + "]}"
    path.write_text(f"{text}\n}}}}\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """What was saved."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = report.pop("values")

    def nested(values: list[Any]) -> Row:
        row: Row = {}
        for name, value in zip(names, values, strict=True):
            *parents, last = name.split(".")
            part = row
            for parent in parents:
                part = part.setdefault(parent, {})
            part[last] = value
        return row

    for call in report["calls"].values():
        call["launches"] = list(map(nested, call["launches"]))
    return report


def print_accesses(row: Row) -> None:
    """Of each instruction: a warp's, and what would do."""
    for access in sorted(row["accesses"], key=lambda access: -access["moved"]):
        each = [access[what] / access["instructions"] for what in ("moved", "least")]
        print(f"    {access['instructions']:9} x {each[0]:5.1f} ({each[1]:4.1f}) {access['what']}")


def print_call(name: str, call: Row, seconds: float, with_accesses: bool) -> None:
    launches, compilations = len(call["launches"]), call["compilations"]
    print(f"{name}: {launches} launches, {compilations} compilations ({seconds:.1f} s)")
    for row in call["launches"]:
        found, built = bounds(row, H100), row["built"][f"sm_{COUNTED_ON}"]
        waves = row["programs"] / built["programs"] / H100.multiprocessors
        us = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in found.items())
        print(
            f"  {row['kernel']:24} programs {row['programs']:6}, registers {built['registers']:3}, "
            f"stack {built['stack']}, warps/SM {built['warps']:2}, waves {waves:5.2f} | useful "
            f"loads {useful(row, 'loads')}, stores {useful(row, 'stores')} | "
            f"{per_32_outputs(row):7.1f} instr/32 outputs | H100, us: {us}: {binding(found)}",
            flush=True,
        )
        if with_accesses:
            print_accesses(row)


def main() -> None:
    spell_out()
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", help="what the names of calls contain; nothing is written")
    parser.add_argument("--dtypes", help="some of them; nothing is written")
    parser.add_argument(
        "--accesses", action="store_true",
        help="print how many sectors or wavefronts a warp's instructions move, and (least) need",
    )  # fmt: skip
    arguments = parser.parse_args()
    is_whole = arguments.only is None and arguments.dtypes is None
    try:
        missing, release = None, gpu_counts_cuda.release()
    except MissingCompilerError as reason:
        missing, release = reason, ""
        if is_whole:
            parser.error(str(missing))
    report: dict[str, Any] = {"triton": triton.__version__, "nvcc": release, "calls": {}}
    for name, (case, layout, dtype) in calls():
        if (arguments.only or "") not in name or dtype not in (arguments.dtypes or dtype):
            continue
        if missing and case.backend == "cuda":
            print(f"{name}: {missing}")
            continue
        start = time.perf_counter()
        call = measured(case, layout, dtype, ARCHITECTURES if is_whole else (COUNTED_ON,))
        report["calls"][name] = call
        print_call(name, call, time.perf_counter() - start, arguments.accesses)
    if not report["calls"]:
        names = ", ".join(name for name, _ in calls())
        parser.error(
            f"no call has {arguments.only!r} in its name and these dtypes; there are {names}"
        )
    if is_whole:
        save(report, BASELINE)
        PAGE.write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
