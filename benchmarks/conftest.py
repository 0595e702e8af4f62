"""Options, cells, the plan and a progress bar for the benchmark suites.

A suite is a file bench_<op>.py with ``cells(quick, regime, device)``, which lists what there is to
measure (in a regime perhaps nothing), most important first; ``work(name, cell, device)``, FLOPs and
bytes of a variant; and one test that measures its argument ``cell`` within its ``allowance``:

    pytest benchmarks -o python_files='bench_*.py' [--quick] [--device cpu|cuda] [--budget SECONDS]

With ``--budget`` the machine is measured first, and ``plan`` tells what of the cells is measured,
and how long. ``--cells FILE`` gets a line of JSON for every cell, as soon as it is done or dropped.

The bar is drawn on stderr and needs ``-s``; without a terminal it is one line per cell.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plan
import pytest
import torch
from cell import compiles
from measure import Allowance
from rates import CopyRoof, compile_seconds, gemm_rate, plain_float32
from regimes import current_regime
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from variants import Variant

LOG_WIDTH = 150


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastfuse benchmarks")
    group.addoption("--quick", action="store_true", help="the main shapes only, in minutes")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--budget", type=float, help="seconds that everything may take")
    group.addoption("--began", type=float, help="when they began, in seconds since 1970")
    group.addoption("--rates", type=json.loads, help="FLOPs per second of products, by dtype")
    group.addoption("--cells", type=Path, help="file that gets the cells")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        config = metafunc.config
        cells = metafunc.module.cells(
            quick=config.getoption("quick"),
            regime=current_regime(),
            device=config.getoption("device"),
        )
        metafunc.parametrize("cell", cells, ids=str, indirect=True)


def _unknown(item: pytest.Item) -> plan.PlannedCell:
    """Its place among the cells; not what it takes."""
    suite = item.module
    first_turn = getattr(suite, "FIRST_TURN", 0)
    return plan.PlannedCell(item.nodeid, suite.OP, (), 0, first_turn=first_turn)


class Estimates:
    """Cells as ``plan`` sees them. Work is counted once for all dtypes, in bytes of an element."""

    def __init__(self, device: str, machine: plan.MachineRates) -> None:
        self.device, self.machine = device, machine
        self.work: dict[tuple[str, ...], tuple[int, float]] = {}
        self.suites: set[str] = set()

    def _work(self, suite: Any, name: str, cell: Any) -> tuple[int, float]:
        key, itemsize = (suite.OP, name, cell.shape, cell.mode), getattr(torch, cell.dtype).itemsize
        if key not in self.work:
            flops, nbytes = suite.work(name, cell, self.device)
            self.work[key] = flops, nbytes / itemsize
        flops, elements = self.work[key]
        return flops, elements * itemsize

    def of(self, item: pytest.Item) -> plan.PlannedCell:
        suite, cell = item.module, item.callspec.params["cell"]

        def seconds(name: str) -> float:
            return plan.call_s(*self._work(suite, name, cell), cell.dtype, self.machine)

        rivals = tuple(
            plan.PlannedVariant(
                Variant(name, print, layout).title,
                seconds(name),
                compiles=compiles(name),
            )
            for name, layout in cell.rivals
        )
        fastest = min(rival.seconds for rival in rivals)
        ours = plan.PlannedVariant("fastfuse", min(seconds("fastfuse"), fastest), rival=False)
        first = suite.OP not in self.suites
        self.suites.add(suite.OP)
        nbytes = self._work(suite, "fastfuse", cell)[1]
        return dataclasses.replace(
            _unknown(item), variants=(ours, ours, *rivals), nbytes=nbytes, memory=first
        )


class Run:
    """Measures the cells in the plan's order, draws the bar, and writes what was measured."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.began = config, config.getoption("began") or time.time()
        self.plan: plan.Plan | None = None
        self.console = Console(file=sys.stderr)
        if not self.console.is_terminal:
            self.console = Console(file=sys.stderr, width=LOG_WIDTH)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
        self.task = self.progress.add_task(current_regime(), total=None)
        self.cell, self.started = "", 0.0
        self.current: plan.PlannedCell | None = None

    @property
    def now(self) -> float:
        return time.time() - self.began

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        budget, device = self.config.getoption("budget"), self.config.getoption("device")
        if budget is None or self.config.getoption("collectonly"):
            return
        items[:] = [item for item in items if _has_cell(item)]
        self.say("measures the machine")
        rates = self.config.getoption("rates") or {}
        dtypes = dict.fromkeys(item.callspec.params["cell"].dtype for item in items)
        compile_s = compile_seconds(device)
        machine = plan.MachineRates(
            copy_rate=CopyRoof(device).rate,
            gemm_rates={d: rates.get(d) or gemm_rate(device, getattr(torch, d)) for d in dtypes},
            compile_s=compile_s,
        )
        estimates = Estimates(device, machine)
        by_key = {item.nodeid: item for item in items}

        def estimate(cell: plan.PlannedCell) -> plan.PlannedCell:
            self.say(f"estimates {_name(cell.key)}")
            return estimates.of(by_key[cell.key])

        unknown = [_unknown(item) for item in items]
        cells = plan.estimated(unknown, estimate, machine, budget, self.now)
        self.plan = plan.Plan(cells, machine, budget, self.now)
        items[:] = [by_key[cell.key] for cell in self.plan.cells]
        self.console.print(self.table())

    def table(self) -> Table:
        assert self.plan is not None
        machine, cells = self.plan.machine, list(self.plan.planned.values())
        kept = [cell for cell in cells if not cell.dropped]
        rates = ", ".join(f"{r / 1e9:.0f} GFLOP/s {d}" for d, r in machine.gemm_rates.items())
        table = Table(
            title=f"plan for {self.plan.budget_s:.0f} s: copy {machine.copy_rate / 1e9:.0f} GB/s, "
            f"{rates}, a compilation {machine.compile_s:.0f} s",
            title_justify="left",
        )
        for column in ("cell", "rivals", "rounds", "seconds"):
            table.add_column(column, justify="right" if column in ("rounds", "seconds") else "left")
        for cell in cells:
            titles = (v.title.removesuffix(", channels_last") for v in cell.variants if v.rival)
            names = dict.fromkeys(title.removesuffix(", contiguous") for title in titles)
            rivals = "; ".join(names)
            if cell.dropped:
                table.add_row(_name(cell.key), f"dropped: {cell.dropped}", "", "", style="dim")
            else:
                seconds = f"{cell.seconds(machine):.0f}"
                table.add_row(_name(cell.key), rivals, f"{cell.rounds}", seconds)
        total = sum(cell.seconds(machine) for cell in kept)
        table.add_section()
        table.add_row(f"{len(kept)} of {len(cells)} cells", "", "", f"{total:.0f}")
        return table

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items))
        if not session.config.getoption("collectonly"):
            self.progress.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.cell = _name(nodeid)
        self.say("starts")

    def pytest_runtest_logfinish(self) -> None:
        self.progress.advance(self.task)
        if not self.console.is_terminal:
            self.console.print(f"{self._left()}: {self.cell}: {self._outcome()}", highlight=False)

    def _outcome(self) -> str:
        taken = f"{self.now - self.started:.0f} s"
        if self.plan is None or self.current is None:
            return taken
        if self.current.dropped:
            return f"dropped, {self.current.dropped}"
        return f"{taken}, {self.current.seconds(self.plan.machine):.0f} s estimated"

    def pytest_sessionfinish(self) -> None:
        self.progress.update(self.task, description=current_regime())
        if self.console.is_terminal:
            self.progress.stop()

    def _left(self) -> str:
        if self.plan is None:
            return current_regime()
        return f"{max(0, self.plan.budget_s - self.now):.0f} s left"

    def say(self, text: str) -> None:
        self.progress.update(self.task, description=f"{self._left()}: {self.cell}: {text}")

    def admit(self, item: pytest.Item, cell: Any) -> Any:
        """The cell as it is measured; skips the test of one that is dropped."""
        self.started = self.now
        if self.plan is None:
            return cell
        self.current = self.plan.start(item.nodeid, self.now)
        if self.current.dropped:
            self._write(
                op=item.module.OP, shape=cell.shape, dtype=cell.dtype, mode=cell.mode,
                dropped=self.current.dropped,
            )  # fmt: skip
            pytest.skip(self.current.dropped)
        titles = {v.title for v in self.current.variants}
        kept = tuple(r for r in cell.rivals if Variant(r[0], print, r[1]).title in titles)
        return dataclasses.replace(cell, rivals=kept)

    def allowance(self) -> Allowance:
        cell = self.current
        if self.plan is None or cell is None:
            return Allowance(say=self.say)
        return Allowance(cell.rounds_s(), self.plan.rival_s, cell.left_out, cell.memory, self.say)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self.plan is not None and self.current is not None and not self.current.dropped:
            self.plan.finish(self.current, self.now - self.started)
        found = item.funcargs.get("benchmark")
        if found is not None and "variants" in found.extra_info:
            self._write(**found.extra_info, seconds=self.now - self.started)

    def _write(self, **line: Any) -> None:
        if file := self.config.getoption("cells"):
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def _has_cell(item: Any) -> bool:
    """Of a suite that has no cells here, pytest makes one test without."""
    return hasattr(item.callspec.params["cell"], "rivals")


def _name(nodeid: str) -> str:
    suite, _, cell = nodeid.partition("[")
    op = suite.rpartition("::test_")[2]
    return f"{op}: {cell.rstrip(']')}"


RUN = pytest.StashKey[Run]()


def pytest_configure(config: pytest.Config) -> None:
    plain_float32()
    config.stash[RUN] = Run(config)
    config.pluginmanager.register(config.stash[RUN])


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Any:
    return request.config.stash[RUN].admit(request.node, request.param)


@pytest.fixture
def allowance(cell: Any, request: pytest.FixtureRequest) -> Allowance:
    return request.config.stash[RUN].allowance()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture(autouse=True)
def _forget_compiled_functions() -> Iterator[None]:
    """Functions that torch.compile compiled for one cell must not slow the next one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
