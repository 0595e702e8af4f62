"""Calls of CUDA C++ as the package makes them, on CPU tensors (tests/support/cuda/launch.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from cuda.emulation import EmulationError
from cuda.examples import integers, skip_without_nvcc
from cuda.launch import Launcher
from cuda.mutations import replaced
from cuda.sources import Program
from ptx.parse import PTXError
from torch import Tensor

from fastfuse import _cuda
from fastfuse.backends import requested_backend
from fastfuse.ops import launch_cuda

WAYS: list[dict[str, Any]] = [{"seed": 0}, {"seed": 5}, {"arch": "sm_80"}, {"arch": "sm_90a"}]


class Sizes(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("height", "width")],
        ("num_levels", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    skip_without_nvcc()


def level_sum(levels: list[Tensor]) -> Tensor:
    height, width = levels[0].shape
    out = torch.empty(height, width)
    sizes = Sizes(height, width, len(levels), 0.5)
    launch_cuda.Launch("fastfuse_level_sum", sizes, out.device)(out, tuple(levels))
    return out


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_values(way: dict[str, Any]) -> None:
    levels = [integers(6, 37 + i)[:, :37].contiguous() for i in range(3)]
    with Launcher(**way) as launcher:
        assert requested_backend() == "cuda"
        assert _cuda.library is not None
        out = level_sum(levels)
    assert torch.equal(out, sum(levels) / 2)
    assert launcher.launched == ["fastfuse_level_sum"]


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_fresh_memory_is_not_read(way: dict[str, Any]) -> None:
    with Launcher(**way), pytest.raises((EmulationError, PTXError), match="nobody wrote"):
        level_sum([torch.ones(5, 5), torch.empty(5, 5)])


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_elements_of_views_alone(way: dict[str, Any]) -> None:
    """The level's rows are apart: what lies between them is no element's."""
    with Launcher(**way), pytest.raises((EmulationError, PTXError), match="out of bounds"):
        level_sum([torch.ones(5, 8)[:, :5]])


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_edited_programs(way: dict[str, Any]) -> None:
    edited = Program(
        "level_sum", replaced(r"i < sizes\.num_levels; \+\+i\) sum", "i < 1; ++i) sum")
    )
    with Launcher(**way, programs=[edited]):
        assert torch.equal(level_sum([torch.ones(3, 3)] * 2), torch.full((3, 3), 0.5))
