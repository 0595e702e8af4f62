"""Least times that counts of a kernel allow on a GPU: bounds, never times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WARP, SECTOR = 32, 32


@dataclass(frozen=True)
class Device:
    """Rates are the vendor's, but for L2: what others have measured of a H100."""

    name: str
    memory_rate: float  # bytes a second
    multiprocessors: int = 132
    clock: float = 1.755e9
    l2_rate: float = 5.5e12
    issued: int = 4  # instructions of warps, a cycle and multiprocessor
    accessed: int = 4  # sectors, or one wavefront of shared memory
    special: float = 0.5  # instructions of warps: exponentials, reciprocals, square roots
    registers: int = 65536
    shared: int = 228 * 1024
    shared_of_system: int = 1024  # of each program
    max_warps: int = 64
    max_programs: int = 32


H100 = Device("H100 SXM", 3.35e12)
H200 = Device("H200", 4.8e12)
DEVICES = (H100, H200)
REGISTER_UNIT = 256  # registers that a warp is given at a time


def resident_programs(registers: int, shared: int, threads: int, device: Device) -> int:
    """How many programs a multiprocessor holds at once."""
    warps = threads // WARP
    of_warp = math.ceil(registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    # Each of the four schedulers has a fourth of the registers.
    by_registers = 4 * (device.registers // 4 // of_warp) // warps
    by_shared = device.shared // (shared + device.shared_of_system)
    return min(device.max_warps // warps, device.max_programs, by_registers, by_shared)


def bounds(counts: Mapping[str, Any], device: Device) -> dict[str, float]:
    """Seconds by what bounds, from counts of a whole launch.

    The ``tail``: the multiprocessor with most programs has more than its share.
    """
    cycles = device.multiprocessors * device.clock
    sectors = counts["loads"]["moved"] + counts["stores"]["moved"]
    accesses = sectors / device.accessed + counts["shared"]["moved"]
    found = {
        "dram": counts["moved_bytes"] / device.memory_rate,
        "l2": counts["block_sectors"] * SECTOR / device.l2_rate,
        "accesses": accesses / cycles,
        "issue": counts["instructions"] / device.issued / cycles,
        "special": counts["special"] / device.special / cycles,
    }
    share = counts["programs"] / device.multiprocessors
    of_multiprocessor = max(found["accesses"], found["issue"], found["special"])
    return {**found, "tail": of_multiprocessor * math.ceil(share) / share}


def binding(found: Mapping[str, float]) -> str:
    """The largest; the tail if it is so by more than a tenth."""
    largest = max((name for name in found if name != "tail"), key=lambda name: found[name])
    return "tail" if found["tail"] > 1.1 * found[largest] else largest
