"""Planned launches: what was compiled runs again for what it was compiled for, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastfuse.ops import launch_triton
from fastfuse.ops.launch_triton import Launch, forget_plans, planned


class Compiled:
    """Stands in for what a kernel was compiled to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *values: self.calls.append((grid, values))


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
    return Kernel()


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
