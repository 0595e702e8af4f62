"""Planned launches: what was compiled runs again for what it was compiled for, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastfuse.ops import launch_triton
from fastfuse.ops.launch_triton import Launch, forget_plans, planned

STREAM = 5


class Compiled:
    """Stands in for what a kernel was compiled to."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.told: list[tuple[Any, ...]] = []  # by Triton's own look-ups

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        assert arguments[:6] == (STREAM, "function", "metadata", None, None, None)
        self.calls.append(((x, y, z), arguments[6:]))

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *values: self.told.append((grid, values))


class Kernel:
    arg_names = ("out", "levels", "bias", "width", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*values: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch_triton, "CompiledKernel", Compiled)
    active = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(launch_triton, "driver", SimpleNamespace(active=active))
    return Kernel()


def test_who_asked_to_be_told_of_launches_is(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch(kernel, 7, torch.device("cpu"), (16,), {"BLOCK": 4})
    tensors = torch.empty(64), (), None
    for _ in range(2):
        launch(*tensors)
    (compiled,) = kernel.compiled
    assert (len(compiled.calls), len(compiled.told)) == (1, 0)
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(launch_triton.knobs.runtime, "launch_enter_hook", hook)
    launch(*tensors)
    assert (len(compiled.calls), len(compiled.told)) == (1, 1)


def test_compiled_for_dtypes_alignments_strides_and_what_is_there(kernel: Kernel) -> None:
    launch = Launch(kernel, 7, torch.device("cpu"), (16,), {"BLOCK": 4, "num_warps": 4})
    out, bias = torch.empty(64), torch.empty(64)
    different = [
        (out, ((out, 16),), bias),
        (out, ((out, 17),), bias),  # Triton knows whether 16 divides a stride
        (out, ((out, 1),), bias),
        (out, ((out, 16), (out, 16)), bias),
        (out[1:], ((out, 16),), bias),
        (out, ((out[1:], 16),), bias),
        (out.double(), ((out, 16),), bias),
        (out, ((out, 16),), None),
    ]
    for tensors in different:
        launch(*tensors)
    assert len(kernel.compiled) == len(different)
    for tensors in different:
        launch(*tensors)
    assert len(kernel.compiled) == len(different)
    for compiled, tensors in zip(kernel.compiled, different, strict=True):
        ((grid, values),) = compiled.calls
        assert grid == (7, 1, 1)
        assert all(value is tensor for value, tensor in zip(values, tensors, strict=False))
        assert values[3:] == (16, 4)  # constants too, options not


def test_plans_are_kept_and_forgotten() -> None:
    made: list[int] = []

    @planned
    def plan(width: int) -> int:
        made.append(width)
        return width

    assert [plan(3), plan(3), plan(4)] == [3, 3, 4]
    assert made == [3, 4]
    forget_plans()
    plan(3)
    assert made == [3, 4, 3]
