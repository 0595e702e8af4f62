"""Asynchronous copies to shared memory: their bytes come where a thread waits for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.context import Array, Lanes

if TYPE_CHECKING:
    from ptx.machine import Machine


@dataclass
class _Copies:
    """Of threads, an element each."""

    threads: Array
    groups: Array  # numbers of the threads' groups
    addresses: Array
    values: Array  # bytes

    def part(self, which: Array) -> _Copies:
        return _Copies(
            self.threads[which], self.groups[which], self.addresses[which], self.values[which]
        )


class Copies:
    """Those of a machine's threads that are under way."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._group = np.zeros(machine.lanes, np.int64)  # the one that a thread adds copies to
        self._under_way: list[_Copies] = []

    def begin(self, addresses: Array, values: Array, lanes: Array) -> None:
        self._machine.begin_copies(addresses, values.shape[1], lanes)
        threads = np.flatnonzero(lanes)
        self._under_way.append(
            _Copies(threads, self._group[threads], addresses[threads], values[threads])
        )

    def commit(self, lanes: Lanes) -> None:
        """Closes threads' groups."""
        self._group[slice(None) if lanes is None else lanes] += 1

    def wait(self, but: int, lanes: Lanes, open_too: bool) -> None:
        """For all but a thread's latest groups that are closed."""
        last = self._group - but + open_too  # those before it have to be there
        waits = np.ones(self._machine.lanes, bool) if lanes is None else lanes
        still = []
        for copies in self._under_way:
            done = waits[copies.threads] & (copies.groups < last[copies.threads])
            there = copies.part(done)
            if len(there.threads) > 0:
                self._machine.end_copies(there.addresses, there.values, there.threads)
            if not done.all():
                still.append(copies.part(~done))
        self._under_way = still
