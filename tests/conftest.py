from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton_interpreter
from guarded_memory import guarded
from inputs import ISAS

from fastfuse.backends import backend
from fastfuse.ops.policy import use_isa


def pytest_configure(config: pytest.Config) -> None:
    selection = (("-m", config.option.markexpr), ("-k", config.option.keyword))
    triton_interpreter.SELECTION[:] = [word for pair in selection if pair[1] for word in pair]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed and leaves threads and compiled graphs as it found them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _guarded_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    with guarded("walks_memory" in request.keywords):
        yield


@pytest.fixture
def plans_anew() -> Iterator[None]:
    """Launches of Triton kernels are planned in this test, and for it alone."""
    from fastfuse.ops.launch_triton import forget_plans

    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def unsplit(plans_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over target rows are of one program each, however few there are."""
    from fastfuse.ops import split_triton

    monkeypatch.setattr(split_triton, "FEW_PROGRAMS", 0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN; torch.use_deterministic_algorithms would import for seconds."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(params=["reference", "cpu"])
def any_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend(request.param):
        yield request.param


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor in turn."""
    with use_isa(request.param):
        yield request.param
