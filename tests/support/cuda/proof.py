"""One call of a C interface, run everywhere: emulated in many orders, and as nvcc's PTX.

for way in ways(Program("tap_sum"), call, inputs=[x, weight], outputs=[out]):
    assert torch.equal(out, expected), way
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np
from ptx.parse import Kernel, PTXError, parse
from ptx.storages import Storage, run_on, storages
from torch import Tensor

from cuda.emulation import Call, Emulator, Launch
from cuda.sources import Program

# GPUs whose PTX runs; CUDA_TESTS_ON=sm_90a in the environment leaves it at that one.
KNOWN_ARCHS = ("sm_80", "sm_90a")
ARCHS = tuple((os.environ.get("CUDA_TESTS_ON") or " ".join(KNOWN_ARCHS)).split())
if unknown := set(ARCHS) - set(KNOWN_ARCHS):
    raise ValueError(f"CUDA_TESTS_ON: expected some of {KNOWN_ARCHS}; got {sorted(unknown)}")
SEEDS = range(20)


def ways(
    program: Program,
    call: Call,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    seeds: Iterable[int] = SEEDS,
    archs: Sequence[str] = ARCHS,
) -> Iterator[str]:
    """Runs the call; each time outputs have what a way computed of fresh memory.

    Faults are raised as ``EmulationError`` and ``PTXError``.
    """
    emulator = emulated(program)
    read, written = storages(inputs), storages(outputs)
    for seed in seeds:
        for storage in written:
            storage.forget()
        emulator.run(call, [*read, *written], seed)
        yield f"{program.name}, emulated, seed {seed}"
    launches = emulator.launches(call)
    for arch in archs:
        for storage in written:
            storage.forget()
        for launch in launches:
            run_ptx(program, arch, launch, [*read, *written])
        yield f"{program.name}, PTX for {arch}"


@cache
def emulated(program: Program) -> Emulator:
    return Emulator(program.library())


@cache
def _kernel(program: Program, arch: str, name: str) -> Kernel:
    return parse(program.ptx(arch), name)


def run_ptx(program: Program, arch: str, launch: Launch, memory: Sequence[Storage]) -> None:
    """A launch on the memory, which has its results."""
    kernel = _kernel(program, arch, launch.kernel)
    if np.prod(launch.block) > kernel.threads:
        raise PTXError(f"{kernel.name} has up to {kernel.threads} threads; launched {launch.block}")
    kernel = dataclasses.replace(kernel, block=launch.block)
    run_on(memory, kernel, launch.arguments, launch.grid, launch.shared_bytes)
