"""Runs the benchmark suites and writes report.md, report.json and report.png.

    python benchmarks/report.py --out DIR [--quick [--budget SECONDS]] [--op NAME]...
        [--device cpu|cuda]

Quick runs measure what ``plan`` chooses for the time they have, in one process and in fresh memory.
Others run each suite once per regime of memory allocation (``regimes.py``), for malloc and
PyTorch read it from the environment when a process starts. The exit code is not zero if a suite
failed; what the others measured is reported all the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plan
import torch
from compact import compact
from machine import describe, environment
from regimes import REGIMES
from rich.console import Console
from rich.table import Table as RichTable

from fastfuse._terminal import spell_out

HERE = Path(__file__).resolve().parent
Rates = Mapping[str, float]
LOG_WIDTH = 190  # of the tables where there is no terminal
LOG_TAIL = 30  # lines shown of the log of a suite that failed
SLOWER = "fastfuse is slower"
BUDGET_S = 330.0  # of quick runs: with one cell more, six minutes
REPORT_S = 10.0  # of them, for tables and the plot
LEAST_BUDGET_S = 60.0
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
            if last is not None and row[0] != last and self.text_columns > 1:
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
    hosts = any(v.get("host_ms") is not None for c in cells for v in c["variants"])
    columns += ["host ms"] * hosts
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
                    *[_number(v.get("host_ms"))] * hosts,
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


def _fastest_rival(cell: dict[str, Any]) -> dict[str, Any]:
    return min((v for v in cell["variants"] if v["rival"]), key=lambda v: v["median_ms"])


def _over_best(cell: dict[str, Any]) -> float:
    return _fastest_rival(cell)["median_ms"] / ours_of(cell)["median_ms"]


def overview(cells: Iterable[dict[str, Any]]) -> Table:
    """A line for every op: over the fastest rival of every cell, least and most."""
    main = [c for c in cells if c.get("series") == "main"]
    ways = list(dict.fromkeys((c["dtype"], c["mode"] == "forward") for c in main))
    ways.sort(key=lambda way: (way[0] != "float32", not way[1]))
    columns = [f"{dtype}, {'forward' if forward else 'with backward'}" for dtype, forward in ways]
    table = Table(
        "how many times longer the fastest rival takes", ["op", *columns, "worst cell"], 1
    )
    for op in dict.fromkeys(c["op"] for c in main):
        row = [op]
        for way in ways:
            ratios = [
                _over_best(c)
                for c in main
                if c["op"] == op and (c["dtype"], c["mode"] == "forward") == way
            ]
            ends = [_number(end(ratios)) for end in (min, max)] if ratios else []
            row.append(" to ".join(dict.fromkeys(ends)))
        worst = min((c for c in main if c["op"] == op), key=_over_best)
        table.rows.append([*row, f"{cell_name(worst)}: {_ratio(_over_best(worst))}"])
    return table


def verdict(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences: what is slower than a rival, whose results are wrong, what was not measured."""
    measured = [c for c in cells if c.get("series") in ("main", "overhead")]
    dropped = [c for c in cells if "dropped" in c]
    found = [
        f"slower than a rival: {c['op']}, {cell_name(c)}: {_fastest_rival(c)['title']} takes "
        f"{_number(_over_best(c), 'x')} our time"
        for c in measured
        if _over_best(c) < 1
    ] or [f"none of {len(measured)} cells is slower than a rival"] * bool(measured)
    wrong = [
        f"{c['op']}, {cell_name(c)}: {v['title']}"
        for c in measured
        for v in c["variants"]
        if v["wrong"]
    ]
    if wrong:
        found.append(f"{len(wrong)} results of rivals are wrong, see the report: {wrong[0]}")
    if left_out := sum(len(c["left_out"]) for c in measured):
        found.append(f"{left_out} rivals were left out of cells, with reasons in the report")
    if dropped:
        counts = Counter(c["op"] for c in dropped)
        each = ", ".join(f"{count} of {op}" for op, count in counts.items())
        found.append(
            f"{len(dropped)} cells were not measured for want of time, see the report: {each}"
        )
    return found


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


_READING = """\
Medians of interleaved rounds in one process: every round times each variant once, and one copy.
Every rival's result was compared with fastfuse's before it was timed; naive (BatchNorm) computes
something else by definition, so only its shapes were. Where a rival differs, both are held against
a composition in float64; the variant says what PyTorch gets wrong, and by how much. A speedup is
the variant's median over that of the fastest fastfuse. GB/s are the bytes that must move (each
input read once, each result written once) over the median; their share is that of the copy rate
measured in the same cell. GFLOP/s are the products and sums that a variant itself does (by the
counter of PyTorch and the formulas of the ops) over its median; for depthwise_conv2d and the blocks
those of the definition, the same for every variant, without what is computed a second time. Their
share is that of a large matrix product of the same dtype, measured in the same run. Peak extra
memory is that of one call in a process of its own, its result included. Kept for backward is what
lies between the passes, x included and parameters not."""


def _run(
    suites: Sequence[Path], regime: str, args: argparse.Namespace, log: Path, more: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Suites in a process of its own: the cells so far, whenever there are more.

    Raises:
        SuiteError: at the end, if the process failed.
    """
    file = args.out.resolve() / ".cells.jsonl"
    file.write_text("", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", *map(str, suites), "-s", "-q"]
    command += [f"--device={args.device}", f"--cells={file}", *more]
    command += ["--quick"] if args.quick else []
    command += ["-o", "python_files=bench_*.py", "-p", "no:cacheprovider"]
    command += ["--durations=0", "--benchmark-columns=median,iqr,rounds"]
    names = {name for variables in REGIMES.values() for name in variables}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    name = ", ".join(suite.stem for suite in suites)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n{name}, {regime}: {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(command, env=clean | REGIMES[regime], stdout=stream)
        size, ended = 0, False
        while not ended:
            try:
                process.wait(timeout=1)
                ended = True
            except subprocess.TimeoutExpired:
                pass
            if file.stat().st_size > size:
                size = file.stat().st_size
                text = file.read_text(encoding="utf-8")
                yield [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    file.unlink()
    if process.returncode:
        raise SuiteError(f"{name}, {regime}: exit code {process.returncode}; see {log}")


def _regimes(suite: Path, args: argparse.Namespace) -> list[str]:
    """Those in which a suite has something to measure."""
    if args.device == "cuda":
        return ["fresh"]
    cells = importlib.import_module(suite.stem).cells
    return [r for r in REGIMES if cells(quick=args.quick, regime=r, device=args.device)]


class SuiteError(RuntimeError):
    """A suite failed."""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--quick", action="store_true", help="the main shapes, in minutes")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"of a quick run, {BUDGET_S:.0f} by default"
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="only bench_NAME.py")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    args = parser.parse_args()
    if args.budget is not None and not (args.quick and args.budget >= LEAST_BUDGET_S):
        parser.error(
            f"--budget must be {LEAST_BUDGET_S:.0f} seconds or more, and goes with --quick; got "
            f"{args.budget:g}" + ("" if args.quick else " without --quick")
        )
    names = [path.stem.removeprefix("bench_") for path in sorted(HERE.glob("bench_*.py"))]
    if unknown := set(args.op or ()) - set(names):
        parser.error(f"no suite for {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    args.suites = [HERE / f"bench_{name}.py" for name in args.op or names]
    return args


def main() -> int:
    spell_out()
    args = _parse()
    console, began = Console(), time.time()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "bench.log"
    log.write_text("", encoding="utf-8")
    console.print("measures the machine", highlight=False)
    about = environment(args.device)
    if args.quick:
        budget = (args.budget or BUDGET_S) - REPORT_S
        rates = {dtype: rate * 1e9 for dtype, rate in about["gemm_gflops"].items()}
        limits = [f"--budget={budget}", f"--began={began}", f"--rates={json.dumps(rates)}"]
        runs = [(args.suites, "fresh", limits)]
    else:
        runs = [([suite], r, []) for suite in args.suites for r in _regimes(suite, args)]

    cells: list[dict[str, Any]] = []
    failures: list[str] = []
    for suites, regime, limits in runs:
        before = cells
        if not args.quick:
            console.print(f"{suites[0].stem} (memory: {regime})", highlight=False)
        try:
            for found in _run(suites, regime, args, log, limits):
                cells = before + found
                _write(args.out, about, cells, failures)  # an interrupted run leaves something
        except SuiteError as error:
            failures.append(str(error))
            text = log.read_text(encoding="utf-8", errors="replace")  # of any process
            console.print("\n".join(text.splitlines()[-LOG_TAIL:]), markup=False)

    if not any("variants" in cell for cell in cells):
        failures.append("nothing was measured")
    about["seconds"] = round(time.time() - began)
    _write(args.out, about, cells, failures, plot=True)
    console.print("\n".join(describe(about)), highlight=False)
    console.print(overview(cells).rich())
    for line in verdict(cells):
        console.print(line, highlight=False)
    seconds = time.time() - began
    console.print(f"{seconds:.0f} s; every number: {args.out}/report.md", highlight=False)
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
    dropped = [cell for cell in cells if "dropped" in cell]
    cells = [cell for cell in cells if "dropped" not in cell]
    about["copy_gbs"] = max((c["copy_gbs"] for c in cells if c["copy_gbs"]), default=None)
    report = {"environment": about, "failures": failures, "dropped": dropped, "cells": cells}
    (folder / "report.json").write_text(compact(report), encoding="utf-8")
    regimes = list(dict.fromkeys(c["regime"] for c in cells))
    notes = [f"- {name}: {REGIME_NOTES.get(name, '')}" for name in regimes if len(regimes) > 1]
    parts = ["# fastfuse benchmarks", "\\\n".join(describe(about)), _READING, "\n".join(notes)]
    parts += [f"**failed: {failure}**" for failure in failures]
    if plot and _draw(report, folder):
        parts.append("![speedups and shares of the roof](report.png)")
    summaries_first = sorted(
        tables(cells, about["gemm_gflops"]), key=lambda table: not table.summary
    )
    parts += ["\n".join(f"- {line}" for line in verdict([*cells, *dropped])), _rule(dropped)]
    parts += [table.markdown() for table in (overview(cells), *summaries_first)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")


def _rule(dropped: Sequence[dict[str, Any]]) -> str:
    """Cells that were dropped, and the rule."""
    if not dropped:
        return ""
    rows = [[cell["op"], cell_name(cell), cell["dropped"]] for cell in dropped]
    table = Table("Not measured for want of time", ["op", "cell", "why"], 3, rows=rows)
    return f"{table.markdown()}\n\n{plan.RULE}"


def _draw(report: dict[str, Any], folder: Path) -> bool:
    try:
        from plot import draw
    except ImportError as error:
        print(f"no plot: {error}")
        return False
    return draw(report, folder / "report.png")


if __name__ == "__main__":
    sys.exit(main())
