"""Options, cells and a progress bar for the benchmark suites.

A suite is a file bench_<op>.py with ``cells(quick, regime, device)``, which lists what there is to
measure (in a regime perhaps nothing), and one test that measures its argument ``cell``:

    pytest benchmarks -o python_files='bench_*.py' [--quick] [--device cpu|cuda]

The bar is drawn on stderr and needs ``-s``; without a terminal it is one line per cell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import measure
import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastfuse benchmarks")
    group.addoption("--quick", action="store_true", help="the main shapes only, in minutes")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        config = metafunc.config
        cells = metafunc.module.cells(
            quick=config.getoption("quick"),
            regime=measure.current_regime(),
            device=config.getoption("device"),
        )
        metafunc.parametrize("cell", cells, ids=str)


class Bar:
    """A progress bar over the cells; ``say`` tells what is being done to the current one."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
        self.task = self.progress.add_task(measure.current_regime(), total=None)
        self.cell = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items))
        if not session.config.getoption("collectonly"):
            self.progress.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.cell = nodeid.partition("[")[2].rstrip("]") or nodeid
        self.say("starts")

    def pytest_runtest_logfinish(self) -> None:
        self.progress.advance(self.task)
        if not self.console.is_terminal:
            self.console.print(f"{measure.current_regime()}: {self.cell} done", highlight=False)

    def pytest_sessionfinish(self) -> None:
        self.progress.update(self.task, description=measure.current_regime())
        if self.console.is_terminal:
            self.progress.stop()

    def say(self, text: str) -> None:
        description = f"{measure.current_regime()}: {self.cell}: {text}"
        self.progress.update(self.task, description=description)


BAR = pytest.StashKey[Bar]()


def pytest_configure(config: pytest.Config) -> None:
    measure.plain_float32()
    config.stash[BAR] = Bar()
    config.pluginmanager.register(config.stash[BAR])


@pytest.fixture
def progress(request: pytest.FixtureRequest) -> Callable[[str], None]:
    return request.config.stash[BAR].say


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture(autouse=True)
def _forget_compiled_functions() -> Iterator[None]:
    """Functions that torch.compile compiled for one cell must not slow the next one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
