"""Least times that counts of a kernel allow on a GPU: bounds, never times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WARP, SECTOR = 32, 32


@dataclass(frozen=True)
class Multiprocessor:
    """What limits how many programs it holds at once."""

    shared: int  # bytes
    registers: int = 65536
    warps: int = 64
    programs: int = 32


# By architecture.
MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024),
    90: Multiprocessor(228 * 1024),
    100: Multiprocessor(228 * 1024),
}
SHARED_OF_SYSTEM = 1024  # bytes of each program
REGISTER_UNIT = 256  # registers that a warp is given at a time
SCHEDULERS = 4  # each has its part of the registers and of the warps


@dataclass(frozen=True)
class Device:
    """Rates are the vendor's but for L2: there it is what others have measured of a H100."""

    name: str
    memory_rate: float  # bytes a second
    multiprocessors: int = 132
    clock: float = 1.755e9
    l2_rate: float = 5.5e12
    # Of a multiprocessor in a cycle:
    issued: int = SCHEDULERS  # instructions of warps
    accessed: int = 4  # sectors; one wavefront of shared memory, or one shuffle
    alu: int = 2  # of integers, comparisons, selections
    special: float = 0.5  # exponentials, reciprocals, roots
    matrix_rate: float = 989.4e12  # FLOP a second of products of 16-bit matrices, at that clock


OF_MULTIPROCESSORS = ("access", "issue", "alu", "special", "matrix")
H100 = Device("H100 SXM", 3.35e12)
H200 = Device("H200", 4.8e12)


def resident_programs(registers: int, shared: int, threads: int, limits: Multiprocessor) -> int:
    """How many programs a multiprocessor holds at once."""
    warps = threads // WARP
    of_warp = math.ceil(registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    by_registers = SCHEDULERS * (limits.registers // SCHEDULERS // of_warp) // warps
    by_shared = limits.shared // (shared + SHARED_OF_SYSTEM)
    return min(limits.warps // warps, limits.programs, by_registers, by_shared)


def bounds(counts: Mapping[str, Any], device: Device) -> dict[str, float]:
    """Seconds by what bounds, from counts of a whole launch.

    The ``tail``: the multiprocessor with most programs has more than its share.
    """
    cycles = device.multiprocessors * device.clock
    sectors = counts["loads"]["moved"] + counts["stores"]["moved"]
    accesses = sectors / device.accessed + counts["shared"]["moved"] + counts["shuffles"]
    found = {
        "dram": counts["bytes"] / device.memory_rate,
        "l2": counts["sectors_of_programs"] * SECTOR / device.l2_rate,
        "access": accesses / cycles,
        "issue": counts["instructions"] / device.issued / cycles,
        "alu": counts["alu"] / device.alu / cycles,
        "special": counts["mix"]["special"] / device.special / cycles,
        "matrix": counts["matrix_flops"] / device.matrix_rate,
    }
    share = counts["programs"] / device.multiprocessors
    of_multiprocessor = max(found[name] for name in OF_MULTIPROCESSORS)
    return {**found, "tail": of_multiprocessor * math.ceil(share) / share}


def binding(found: Mapping[str, float]) -> str:
    """The largest; the tail if it is so by more than a tenth."""
    largest = max((name for name in found if name != "tail"), key=lambda name: found[name])
    return "tail" if found["tail"] > 1.1 * found[largest] else largest
