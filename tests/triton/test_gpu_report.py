"""Kernels do no more than benchmarks/results/gpu-report.json says: counted without a device.

``make gpu-report`` counts anew, and writes it and docs/gpu_report.md.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import fast_and_slow
from triton_interpreter import INTERPRETING

pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETING:
    pytest.skip("the compiler, or what it makes, is replaced", allow_module_level=True)

import gpu_counts_cuda
import triton
from cuda.examples import skip_without_nvcc
from gpu_bounds import H100, H200, MULTIPROCESSORS, binding, bounds, resident_programs
from gpu_cases import CHANNELS_LAST, Case
from gpu_counts import COUNTED_ON, Assembled, assembled
from gpu_report import ARCHITECTURES, BASELINE, PAGE, ROOT, calls, load, measured, regressions, save
from gpu_table import IN_CUDA, page
from ptx.parse import parse
from triton_offline import Launch, recorded, specialisation

from fastfuse.ops.pointwise import triton as pointwise

Row = dict[str, Any]

BEFORE: Row = load(BASELINE)
CALLS = dict(calls())
IN_TRITON = [name for name, (case, _, _) in CALLS.items() if case.backend == "triton"]
CUDA = [name for name in CALLS if name not in IN_TRITON]
FAST_CUDA = f"tap_sum UPer, channels_last bfloat16{IN_CUDA}"
FAST = [
    f"{name}, channels_last bfloat16"
    for name in ("upsample_equalize_concat UPer", "tap_sum UPer", "depthwise_conv2d 7x7")
]
counted_by_the_same = pytest.mark.skipif(
    BEFORE["triton"] != triton.__version__,
    reason=f"counted with triton {BEFORE['triton']}; got {triton.__version__}",
)


def test_every_call_was_counted() -> None:
    assert list(BEFORE["calls"]) == list(CALLS)
    names = {name for call in BEFORE["calls"].values() for row in call["launches"] for name in row}
    assert {"loads", "stores", "shared", "instructions", "outputs", "built"} < names


def test_the_page_has_what_was_counted() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(BEFORE)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(BEFORE, tmp_path / "report.json")
    assert load(tmp_path / "report.json") == BEFORE
    assert (tmp_path / "report.json").read_bytes() == BASELINE.read_bytes()


def test_nothing_spilled() -> None:
    for name, call in BEFORE["calls"].items():
        for row in call["launches"]:
            for arch in ARCHITECTURES:
                assert row["built"][f"sm_{arch}"]["stack"] == 0, f"{name}: {row['kernel']} {arch}"


@lru_cache
def launches_of(name: str) -> list[Launch]:
    case, layout, dtype = CALLS[name]
    return recorded(lambda: case.call(layout, getattr(torch, dtype)))


@lru_cache
def launches_in_cuda(name: str) -> list[gpu_counts_cuda.Recorded]:
    case, layout, dtype = CALLS[name]
    return gpu_counts_cuda.recorded(lambda: case.call(layout, getattr(torch, dtype)))


def test_every_kernel_is_counted() -> None:
    files = (ROOT / "fastfuse").glob("ops/**/*triton.py")
    kernels = {
        (".".join(file.relative_to(ROOT).with_suffix("").parts), name)
        for file in files
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.M)
    }
    assert len(kernels) > 15
    launched = {kernel.fn for name in IN_TRITON for kernel, _ in launches_of(name)}
    assert {(function.__module__, function.__name__) for function in launched} == kernels


def test_no_more_launches_and_compilations() -> None:
    for name in IN_TRITON:
        before, launches = BEFORE["calls"][name], launches_of(name)
        assert len(launches) <= len(before["launches"]), name
        assert len(set(map(specialisation, launches))) <= before["compilations"], name


@counted_by_the_same
@fast_and_slow("name architectures", [(name, (90,)) for name in FAST],
               [(name, ARCHITECTURES) for name in IN_TRITON])  # fmt: skip
def test_no_more_than_before(name: str, architectures: tuple[int, ...]) -> None:
    _hold(name, architectures)


def _hold(name: str, architectures: tuple[int, ...]) -> None:
    found = regressions(name, BEFORE["calls"][name], measured(*CALLS[name], architectures))
    assert not found, "\n".join(found)


@fast_and_slow("name architectures", [(FAST_CUDA, (90,))],
               [(name, ARCHITECTURES) for name in CUDA])  # fmt: skip
def test_no_more_than_before_in_cuda(name: str, architectures: tuple[int, ...]) -> None:
    _skip_without_the_same_nvcc()
    _hold(name, architectures)


def _skip_without_the_same_nvcc() -> None:
    skip_without_nvcc()
    if (release := gpu_counts_cuda.release()) != BEFORE["nvcc"]:
        pytest.skip(f"counted with nvcc {BEFORE['nvcc']}; got {release}")


@pytest.mark.slow
def test_every_kernel_in_cuda_is_counted() -> None:
    """And no more is launched than was."""
    skip_without_nvcc()
    launched = set()
    for name in CUDA:
        launches = launches_in_cuda(name)
        assert len(launches) <= len(BEFORE["calls"][name]["launches"]), name
        launched |= {launch.name for launch in launches}
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "csrc/cuda").iterdir())
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+)\(", text)
    assert len(kernels) > 5
    assert launched == set(kernels)


@counted_by_the_same
def test_a_planted_regression() -> None:
    """Rows whose length 16 does not divide have no wide accesses."""

    def layer_norm(layout: str, dtype: torch.dtype) -> None:
        x = torch.empty(65536, 193, dtype=dtype, device="meta")[:, :-1]
        weight = torch.empty(192, device="meta")
        pointwise.layer_norm_into(x, x, weight, weight, 1e-6, None, False)

    name = "layer_norm, channels_last bfloat16"
    now = measured(Case("planted", layer_norm), CHANNELS_LAST, "bfloat16", (90,))
    found = regressions(name, BEFORE["calls"][name], now)
    for what in ("sectors of stores", "wavefronts", "instructions of an output"):
        assert any(what in line for line in found), found


def _grow(*path: Any, by: float = 1.03) -> Callable[[Row], None]:
    def plant(call: Row) -> None:
        *parents, last = path
        for key in parents:
            call = call[key]
        call[last] = call[last] * by

    return plant


@pytest.mark.parametrize(
    ("what", "plant"),
    [
        ("compilations", _grow("compilations", by=2)),
        ("launches", lambda call: call["launches"].append(call["launches"][0])),
        ("spills 8 bytes, sm_80", lambda c: c["launches"][0]["built"]["sm_80"].update(stack=8)),
        ("sectors of loads", _grow("launches", 0, "loads", "moved")),
        ("sectors of stores", _grow("launches", 0, "stores", "moved")),
        ("sectors of programs", _grow("launches", 0, "sectors_of_programs")),
        ("wavefronts", _grow("launches", 0, "shared", "moved")),
        ("instructions of an output", _grow("launches", 0, "instructions")),
    ],
)
def test_what_is_reported(what: str, plant: Callable[[Row], None]) -> None:
    name = "layer_norm, channels_last float32"
    before = BEFORE["calls"][name]
    assert regressions(name, before, before) == []
    now = copy.deepcopy(before)
    plant(now)
    assert any(what in line for line in regressions(name, before, now))


@counted_by_the_same
@pytest.mark.parametrize("name", FAST)
def test_nothing_is_unrolled_by_the_assembler(name: str) -> None:
    """Instructions of a line of PTX are counted as often as it is executed."""
    _hold_as_written(assembled(launches_of(name)[0], COUNTED_ON))


@pytest.mark.slow
@pytest.mark.parametrize("name", CUDA)
def test_loops_that_the_assembler_unrolls_in_cuda(name: str) -> None:
    skip_without_nvcc()
    for launched in launches_in_cuda(name):
        program, kernel = launched.program, launched.launch.kernel
        made = gpu_counts_cuda.assembled(program, kernel, COUNTED_ON)
        rolled = gpu_counts_cuda.rolled(parse(made["ptx"], kernel), made["machine"])
        _hold_as_written({**made, "machine": rolled}, kernel)


def _hold_as_written(made: Assembled, kernel: str | None = None) -> None:
    one = {"fma.rn.f32": "FFMA", "ld.global": "LDG", "st.global": "STG"}
    for instruction in parse(made["ptx"], kernel).instructions:
        for opcode, expected in one.items():
            if instruction.opcode.startswith(opcode):
                code = made["machine"].get(str(instruction.line), [])
                assert sum(c.startswith(expected) for c in code) <= 1, str(instruction)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "expected"),
    [
        (32, 0, 128, 16),  # 64 warps
        (33, 0, 128, 12),  # 40 registers each: 51 warps, 12 of each scheduler
        (168, 0, 128, 3),
        (255, 0, 128, 2),
        (32, 100 * 1024, 128, 2),
        (16, 0, 32, 32),
    ],
)
def test_programs_of_a_multiprocessor(
    registers: int, shared: int, threads: int, expected: int
) -> None:
    """As NVIDIA's table of occupancy has them."""
    assert resident_programs(registers, shared, threads, MULTIPROCESSORS[90]) == expected


def test_bounds() -> None:
    """Of a launch of one program of each multiprocessor, and of one more."""
    row = {
        "programs": 132,
        "bytes": 3.35e6,
        "sectors_of_programs": 5.5e6 / 32,
        "instructions": 132 * 4 * 1755,
        "mix": {"special": 132 * 1755},
        "alu": 132 * 2 * 1755,
        "loads": {"moved": 132 * 4 * 1755},
        "stores": {"moved": 132 * 4 * 1755},
        "shared": {"moved": 132 * 1000},
        "shuffles": 132 * 755,
        "matrix_flops": 989.4e6,
    }
    found = bounds(row, H100)
    expected = {"dram": 1, "l2": 1, "access": 3, "issue": 1, "alu": 1, "special": 2, "matrix": 1}
    expected["tail"] = 3
    assert {name: round(1e6 * value, 6) for name, value in found.items()} == expected
    assert binding(found) == "access"
    assert bounds(row, H200)["dram"] < found["dram"]
    found = bounds({**row, "programs": 133}, H100)
    assert binding(found) == "tail"
    assert found["tail"] == pytest.approx(3e-6 * 2 * 132 / 133)
