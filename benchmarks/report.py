"""Runs the benchmark suites and writes report.md, report.json and report.png.

    python benchmarks/report.py --out DIR [--quick] [--op NAME]... [--device cpu|cuda]

On the CPU each suite runs once per regime of memory allocation (``measure.REGIMES``), for malloc
and PyTorch read it from the environment when a process starts. The exit code is not zero if a suite
failed; what the others measured is reported all the same.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console
from rich.table import Table as RichTable

import fastfuse

HERE = Path(__file__).resolve().parent
Rates = Mapping[str, float]
LOG_WIDTH = 190  # of the tables where there is no terminal
LOG_TAIL = 30  # lines shown of the log of a suite that failed
SLOWER = "fastfuse is slower"
REGIME_NOTES = {
    "fresh": "results in fresh memory; fastfuse asks for huge pages",
    "huge pages": "PyTorch asks for huge pages for everyone (THP_MEM_ALLOC_ENABLE=1)",
    "warm": "the allocator keeps its memory for everyone (MALLOC_MMAP_MAX_=0 and so on)",
}


@dataclass
class Table:
    """A table for the terminal and for Markdown; the first ``text_columns`` are flush left."""

    title: str
    columns: Sequence[str]
    text_columns: int = 2
    summary: bool = False
    rows: list[list[str]] = field(default_factory=list)

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            is_text = i < self.text_columns
            table.add_column(column, justify="left" if is_text else "right", overflow="fold")
        last = None
        for row in self.rows:
            if last is not None and row[0] != last:
                table.add_section()
            style = "bold red" if any(SLOWER in value for value in row) else None
            shown = "" if row[0] == last else row[0]
            table.add_row(shown, *row[1:], style=style)
            last = row[0]
        return table

    def markdown(self) -> str:
        alignment = ["---" if i < self.text_columns else "---:" for i in range(len(self.columns))]
        lines = [self.columns, alignment, *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, suffix: str = "") -> str:
    """Three significant digits, never in powers of ten."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}{suffix}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _speedup(variant: dict[str, Any], ours: str) -> str:
    if variant["title"] == ours:
        return "1"
    return _ratio(variant["speedup"])


def _ratio(speedup: float) -> str:
    return _number(speedup, "x") + (f" ({SLOWER})" if speedup < 1 else "")


def _over(rival: dict[str, Any], ours: dict[str, Any]) -> str:
    result = _ratio(rival["median_ms"] / ours["median_ms"])
    return f"{result}, whose result is wrong" if rival["wrong"] else result


def cell_name(cell: dict[str, Any]) -> str:
    return f"{cell['shape']}, {cell['dtype']}, {cell['mode']}"


def ours_of(cell: dict[str, Any]) -> dict[str, Any]:
    return next(v for v in cell["variants"] if v["title"] == cell["ours"])


def in_faster_layout(cell: dict[str, Any], *, rival: bool) -> list[dict[str, Any]]:
    """The rivals, or fastfuse's ways: one variant of each name."""
    found: dict[str, dict[str, Any]] = {}
    for v in cell["variants"]:
        if v["rival"] == rival:
            found[v["name"]] = min(found.get(v["name"], v), v, key=lambda v: v["median_ms"])
    return list(found.values())


def _any_flops(cells: Iterable[dict[str, Any]]) -> bool:
    return any(v["gflops"] for c in cells for v in c["variants"])


def _gemm_share(cell: dict[str, Any], variant: dict[str, Any], rates: Rates) -> float | None:
    """Of the rate of a large matrix product in the cell's dtype."""
    rate = rates.get(cell["dtype"])
    return variant["gflops"] / rate if rate and variant["gflops"] else None


def _summary(op: str, cells: Iterable[dict[str, Any]], rates: Rates) -> Table:
    main = [c for c in cells if c["series"] == "main"]
    compute = _any_flops(main)
    rivals = list(dict.fromkeys(v["name"] for c in main for v in c["variants"] if v["rival"]))
    columns = ["cell", "memory", "fastfuse ms", "of the copy roof"]
    columns += ["of the GEMM rate"] * compute
    columns += [f"over {r}" for r in rivals]
    table = Table(
        f"{op}: speedup of fastfuse over each rival in its faster layout", columns, summary=True
    )
    for c, ours in [(cell, way) for cell in main for way in in_faster_layout(cell, rival=False)]:
        best = {v["name"]: v for v in in_faster_layout(c, rival=True)}
        table.rows.append(
            [
                cell_name(c) + ours["name"].removeprefix("fastfuse"),
                c["regime"],
                _number(ours["median_ms"]),
                _percent(ours["share"]),
                *[_percent(_gemm_share(c, ours, rates))] * compute,
                *(_over(best[r], ours) if r in best else "" for r in rivals),
            ]
        )
    return table


def _details(op: str, regime: str, cells: Sequence[dict[str, Any]], rates: Rates) -> Table:
    compute = _any_flops(cells)
    keeps = any(v["kept_bytes"] is not None for c in cells for v in c["variants"])
    columns = ["cell", "variant", "median ms", "spread (IQR) ms", "speedup of fastfuse"]
    columns += ["GB/s", "of the copy roof"]
    columns += ["GFLOP/s", "of the GEMM rate"] * compute
    columns += ["peak extra MiB"]
    columns += ["kept for backward MiB"] * keeps
    table = Table(f"{op}, memory: {regime}", columns)
    for c in cells:
        for v in c["variants"]:
            peak, kept = v["peak_bytes"], v["kept_bytes"]
            table.rows.append(
                [
                    cell_name(c),
                    f"{v['title']} ({v['wrong']})" if v["wrong"] else v["title"],
                    _number(v["median_ms"]),
                    _number(v["iqr_ms"]),
                    _speedup(v, c["ours"]),
                    _number(v["gbs"]),
                    _percent(v["share"]),
                    *[_number(v["gflops"]), _percent(_gemm_share(c, v, rates))] * compute,
                    "" if peak is None else f"{peak / 2**20:.0f}",
                    *[_number(None if kept is None else kept / 2**20)] * keeps,
                ]
            )
        for title, reason in c["left_out"].items():
            table.rows.append(
                [cell_name(c), f"{title}: left out, {reason}", *[""] * (len(columns) - 2)]
            )
    return table


def _growth(op: str, cells: Iterable[dict[str, Any]], rates: Rates) -> Table:
    if compute := _any_flops(cells):
        columns = ["cell", "memory", "GMAC done", "ms", "ms per GMAC", "of the GEMM rate"]
        what = "multiply-add"
    else:
        columns = ["cell", "memory", "MB to move", "ms", "ps per byte", "of the copy roof"]
        what = "byte"
    table = Table(f"{op}: time per {what} as the maps grow (fastfuse, faster layout)", columns)
    for c in cells:
        ours = ours_of(c)
        work = c["flops"] / 2e9 if compute else c["bytes"] / 1e6
        time_per_work = ours["median_ms"] / work * (1 if compute else 1e3)
        share = _gemm_share(c, ours, rates) if compute else ours["share"]
        numbers = [_number(work), _number(ours["median_ms"]), _number(time_per_work)]
        table.rows.append([cell_name(c), c["regime"], *numbers, _percent(share)])
    return table


def _overhead(op: str, cells: Iterable[dict[str, Any]]) -> Table:
    columns = ["cell", "memory", "variant", "us per call", "spread (IQR)", "fastfuse's surplus, us"]
    table = Table(f"{op}: dispatch overhead of a tiny call", columns, text_columns=3)
    for c in cells:
        ours = ours_of(c)["median_ms"]
        for v in c["variants"]:
            surplus = _number(1e3 * (ours - v["median_ms"])) if v["rival"] else ""
            times = [_number(1e3 * v["median_ms"]), _number(1e3 * v["iqr_ms"])]
            table.rows.append([cell_name(c), c["regime"], v["title"], *times, surplus])
    return table


def tables(cells: Sequence[dict[str, Any]], rates: Rates) -> list[Table]:
    """``rates``: GFLOP/s of a large matrix product, by dtype."""
    found = []
    for op in dict.fromkeys(c["op"] for c in cells):
        series: dict[str, list[dict[str, Any]]] = {"main": [], "growth": [], "overhead": []}
        for c in cells:
            if c["op"] == op:
                series[c["series"]].append(c)
        for regime in dict.fromkeys(c["regime"] for c in series["main"]):
            of_regime = [c for c in series["main"] if c["regime"] == regime]
            found.append(_details(op, regime, of_regime, rates))
        found += [_growth(op, series["growth"], rates)] if series["growth"] else []
        found += [_overhead(op, series["overhead"])] if series["overhead"] else []
        found += [_summary(op, series["main"], rates)] if series["main"] else []
    return found


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1] if match else "unknown CPU"


def environment(device: str) -> dict[str, Any]:
    measure.plain_float32()
    info = fastfuse.info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "versions": info.versions,
        "backends": {op: info.backend_of(op, d) for op, d in _first(info, device).items()},
        "isa": info.isa,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gemm_gflops": {
            str(dtype).removeprefix("torch."): measure.gemm_rate(device, dtype) / 1e9
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def _first(info: fastfuse.Info, device: str) -> dict[str, str]:
    """op -> the first device of a kind."""
    found = {}
    for op, devices in info.operations.items():
        found[op] = next(name for name in devices if name.startswith(device))
    return found


def _describe(environment: dict[str, Any]) -> list[str]:
    e = environment
    rates = ", ".join(f"{_number(r)} GFLOP/s in {name}" for name, r in e["gemm_gflops"].items())
    return [
        f"{e['date']}, {e['name']}, {e['threads']} threads on {e['cores']} cores, CPU instruction "
        f"set {e['isa']}",
        ", ".join(f"{name} {version}" for name, version in e["versions"].items()),
        "backends: " + ", ".join(f"{op}: {name}" for op, name in e["backends"].items()),
        f"measured roofs: copy {_number(e['copy_gbs']) or '?'} GB/s read and written, GEMM {rates}",
    ]


_READING = """\
Medians of interleaved rounds in one process: every round times each variant once, and one copy.
Every rival's result was compared with fastfuse's before it was timed; naive (BatchNorm) computes
something else by definition, so only its shapes were. Where PyTorch computes something wrong, the
variant says what. A speedup is the variant's median over that of the fastest fastfuse. GB/s are the
bytes that must move (each input read once, each result written once) over the median; their share
is that of the copy rate measured in the same cell. GFLOP/s are the products and sums that a variant
itself does (by the counter of PyTorch and the formulas of the ops) over its median; for
depthwise_conv2d and the blocks those of the definition, the same for every variant, without what is
computed a second time. Their share is that of a large matrix product of the same dtype, measured in
the same run. Peak extra memory is that of one call in a process of its own, its result included.
Kept for backward is what lies between the passes, x included and parameters not."""


def _run(suite: Path, regime: str, args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """One suite in a process of its own; raises CalledProcessError when it fails."""
    result = args.out / ".pytest-benchmark.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(suite), "-s", "-q", f"--device={args.device}"]
    command += ["--quick"] if args.quick else []
    command += ["-o", "python_files=bench_*.py", "-p", "no:cacheprovider"]
    command += [
        "--durations=0",
        "--benchmark-columns=median,iqr,rounds",
        f"--benchmark-json={result}",
    ]
    names = {name for variables in measure.REGIMES.values() for name in variables}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    with log.open("a") as stream:
        stream.write(f"\n{suite.name}, {regime}: {' '.join(command)}\n")
        stream.flush()
        done = subprocess.run(command, env=clean | measure.REGIMES[regime], stdout=stream)
    cells = []
    if result.exists() and result.stat().st_size:
        cells = [b["extra_info"] for b in json.loads(result.read_text())["benchmarks"]]
        result.unlink()
    if done.returncode:
        raise SuiteError(f"{suite.name}, {regime}: exit code {done.returncode}; see {log}", cells)
    return cells


def _regimes(suite: Path, args: argparse.Namespace) -> list[str]:
    """Those in which a suite has something to measure."""
    if args.device == "cuda":
        return ["fresh"]
    cells = importlib.import_module(suite.stem).cells
    return [r for r in measure.REGIMES if cells(quick=args.quick, regime=r, device=args.device)]


class SuiteError(RuntimeError):
    """A suite failed; ``cells`` are those that it measured."""

    def __init__(self, message: str, cells: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.cells = cells


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--quick", action="store_true", help="the main shapes, in minutes")
    parser.add_argument("--op", action="append", metavar="NAME", help="only bench_NAME.py")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    args = parser.parse_args()
    names = [path.stem.removeprefix("bench_") for path in sorted(HERE.glob("bench_*.py"))]
    if unknown := set(args.op or ()) - set(names):
        parser.error(f"no suite for {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    args.suites = [HERE / f"bench_{name}.py" for name in args.op or names]
    return args


def main() -> int:
    args = _parse()
    console, began = Console(), time.monotonic()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "bench.log"
    log.write_text("")
    about = environment(args.device)

    cells: list[dict[str, Any]] = []
    failures: list[str] = []
    for suite in args.suites:
        regimes = _regimes(suite, args)
        for i, regime in enumerate(regimes, 1):
            note = f" (memory: {regime}, {i} of {len(regimes)})" if len(regimes) > 1 else ""
            console.print(f"{suite.stem}{note}", highlight=False)
            try:
                cells += _run(suite, regime, args, log)
            except SuiteError as error:
                cells += error.cells
                failures.append(str(error))
                console.print("\n".join(log.read_text().splitlines()[-LOG_TAIL:]), markup=False)
            _write(args.out, about, cells, failures)  # so that an interrupted run leaves something

    for table in tables(cells, about["gemm_gflops"]):
        console.print(table.rich())
    if not cells:
        failures.append("nothing was measured")
    about["seconds"] = round(time.monotonic() - began)
    _write(args.out, about, cells, failures, plot=True)
    console.print("\n".join(_describe(about)), highlight=False)
    console.print(f"{about['seconds']} s; wrote {args.out}/report.md", highlight=False)
    for failure in failures:
        console.print(f"failed: {failure}", style="bold red", highlight=False)
    return 1 if failures else 0


def _write(
    folder: Path,
    about: dict[str, Any],
    cells: Sequence[dict[str, Any]],
    failures: Sequence[str],
    *,
    plot: bool = False,
) -> None:
    about["copy_gbs"] = max((c["copy_gbs"] for c in cells if c["copy_gbs"]), default=None)
    report = {"environment": about, "failures": failures, "cells": cells}
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    regimes = list(dict.fromkeys(c["regime"] for c in cells))
    notes = [f"- {name}: {REGIME_NOTES.get(name, '')}" for name in regimes if len(regimes) > 1]
    parts = ["# fastfuse benchmarks", "\\\n".join(_describe(about)), _READING, "\n".join(notes)]
    parts += [f"**failed: {failure}**" for failure in failures]
    if plot and _draw(report, folder):
        parts.append("![speedups and shares of the roof](report.png)")
    summaries_first = sorted(
        tables(cells, about["gemm_gflops"]), key=lambda table: not table.summary
    )
    parts += [table.markdown() for table in summaries_first]
    (folder / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _draw(report: dict[str, Any], folder: Path) -> bool:
    try:
        from plot import draw
    except ImportError as error:
        print(f"no plot: {error}")
        return False
    return draw(report, folder / "report.png")


if __name__ == "__main__":
    sys.exit(main())
