"""CUDA C++ emulated by g++ (tests/support/cuda): its values, and what it reports."""

from __future__ import annotations

import pytest
import torch
from cuda.emulation import EmulationError, Emulator
from cuda.examples import (
    matrix_product,
    pointer,
    skip_without_nvcc,
    staged_depthwise,
    warp_sums,
)
from cuda.mutations import replaced, without_barrier, without_wait
from cuda.proof import emulated
from cuda.sources import Program
from ptx.storages import storages


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    skip_without_nvcc()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_in_any_order(dtype: torch.dtype) -> None:
    staged_depthwise(dtype).check(archs=())


def test_what_threads_tell_each_other_in_any_order() -> None:
    warp_sums().check(archs=())


def test_matrices_in_any_order() -> None:
    matrix_product(torch.bfloat16).check(seeds=range(5), archs=())


BUGS = {
    "no barrier before reading": (without_barrier(0), "reads what nobody wrote"),
    "no barrier after reading": (without_barrier(1), "asynchronous copy"),
    "no wait for the tile": (without_wait(0), "reads what an asynchronous copy still brings"),
    "a row too far": (replaced(r"\(row \+ i\)", "(row + i + 1)"), ""),
    "a vector too few": (replaced(r"kTile / kVector;", "kTile / kVector - 1;"), "nobody wrote"),
    "a halo too wide": (replaced("x < image.width;", "x <= image.width;"), ""),
    "no mask at the tail": (replaced(r" && left \+ x < image.width", ""), "another block"),
    "shared memory too small": (replaced(r"2 \* kTile \*", "(2 * kTile - 4) *"), "out of bounds"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.replace(" ", "_"))
def test_bugs_are_found(bug: str) -> None:
    edit, told = BUGS[bug]
    assert told in staged_depthwise().finds(edit, seeds=range(3), archs=())


FAULTS = {
    "different barriers": (1, "threads of a block wait at different barriers"),
    "a barrier and a shuffle": (2, "threads wait for each other for ever"),
    "blocks that write the same": (3, "writes what another block wrote"),
    "a block that reads another's": (4, "nobody wrote"),
    "lanes in no order": (5, "race|nobody wrote"),
    "beyond a shared variable": (7, "is out of bounds, 4 bytes at no tensor"),
    "shared memory nobody wrote": (8, "reads what nobody wrote, 4 bytes at shared address"),
    "memory nobody wrote": (9, "reads what nobody wrote, 4 bytes at global address"),
    "a lane outside of the mask": (10, "reads from a lane outside of its mask"),
    "a misaligned access": (11, "is misaligned, 8 bytes"),
    "a null pointer": (12, "is out of bounds, 4 bytes at no tensor's address"),
    "a copy that is not committed": (13, "reads what an asynchronous copy still brings"),
    "a copy that others see": (14, "race|asynchronous|nobody wrote"),
    "what a block before left": (15, "reads what nobody wrote"),
    "written while others read": (16, "race with a read|race with a write"),
    "a row of a matrix": (17, "not aligned to 16 bytes"),
}
FINE = {"none": 0, "lanes in order": 6}


def run_faulty(fault: int, seed: int, blocks: int = 2, threads: int = 64) -> None:
    x, out = torch.randn(128), torch.empty(128)
    memory = [*storages([x]), *storages([out])]
    memory[1].forget()

    def call(library: object) -> int:
        function = library.fastfuse_faulty  # type: ignore[attr-defined]
        return int(function(fault, pointer(x), pointer(out), blocks, threads, None))

    emulated(Program("faults")).run(call, memory, seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.replace(" ", "_"))
def test_faults(fault: str, seed: int) -> None:
    number, message = FAULTS[fault]
    with pytest.raises(EmulationError, match=message) as found:
        run_faulty(number, seed)
    assert f"seed {seed}" in str(found.value)


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_wrong(name: str) -> None:
    for seed in range(4):
        run_faulty(FINE[name], seed)


def test_a_fault_tells_thread_and_line() -> None:
    with pytest.raises(EmulationError, match=r"thread \(0, 0, 0\) of block .*cuda/faults\.cu:\d+"):
        run_faulty(8, seed=0)


def test_a_launch_that_no_device_has() -> None:
    with pytest.raises(EmulationError, match="that no device has"):
        run_faulty(0, seed=0, threads=1025)


def test_launches_are_recorded() -> None:
    example = staged_depthwise()
    emulator: Emulator = emulated(Program(example.name))
    (launch,) = emulator.launches(example.call)
    assert launch.kernel.startswith("_ZN8fastfuse4cuda16staged_depthwiseIfEE")
    assert (launch.grid, launch.block) == ((2, 2, 2), (64, 1, 1))
    assert [len(argument) for argument in launch.arguments] == [8, 8, 8, 12]
    assert int.from_bytes(launch.arguments[0], "little") == example.inputs[0].data_ptr()
