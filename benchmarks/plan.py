"""What a run of limited time measures: RULE, for the plan and again before every cell.

Times are estimates: of a call, its FLOPs over the rate of matrix products and its bytes over the
copy rate; of a cell, the calls and what lies around them. What is left of the time is what the
clock says, and estimates of cells to come grow or shrink with what those before them took
(``Plan.pace``).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from measure import LONG_CALL_S, MIN_ROUNDS, settled_call_s

__all__ = [
    "RULE",
    "MachineRates",
    "Plan",
    "PlannedCell",
    "PlannedVariant",
    "call_s",
    "estimated",
    "in_turns",
]

RULE = """\
1. Cells are taken in turns, one of every suite; a suite lists its own most important first. After
   the turn with which the time, and twice the time, are full, cells are dropped without an
   estimate, which would take time of its own.
2. A rival that alone would take more than a sixteenth of the time is left out of its cell. A cell
   without any rival is dropped, for nothing would check it, and does not use up a turn.
3. Cells are taken while all of them fit with 3 rounds and without compiled rivals. One that does
   not fit is dropped, and the next one tried.
4. Compiled rivals are added to the cells taken, in the same order, while they fit; then, in each
   suite's first cell, peak memory.
5. What is left goes to more rounds, as many for every cell."""
RIVAL_SHARE = 1 / 16
ESTIMATED_MOST = 2.0  # times what fits; estimates may be wrong
MAX_ROUNDS = 20
CELL_S = 1.5  # of the buffers of the copy rate, garbage and tables
PREPARED_RATE = 0.05  # of the copy rate: random inputs, and results compared,
PREPARED_MOST_S = 1.5  # and most that this takes, for a model's traffic is no input
PEAK_S = 1.5  # of a process that measures the peak of one call
LEAST_ROUNDS_S = 0.5  # tiny calls get so many seconds of rounds


@dataclass(frozen=True)
class MachineRates:
    """What was measured first: bytes copied and FLOPs by dtype per second, seconds to compile."""

    copy_rate: float
    gemm_rates: Mapping[str, float]
    compile_s: float


def call_s(flops: float, nbytes: float, dtype: str, machine: MachineRates) -> float:
    return flops / machine.gemm_rates[dtype] + nbytes / machine.copy_rate


@dataclass(frozen=True)
class PlannedVariant:
    """A variant of a cell, and what a call of it takes."""

    title: str
    seconds: float
    rival: bool = True
    compiles: bool = False

    def check_s(self, machine: MachineRates) -> float:
        """Until the rounds: the call that is checked, and of short ones another that warms up."""
        calls = 1 if self.seconds > LONG_CALL_S else 2
        return calls * self.seconds + machine.compile_s * self.compiles

    def least_s(self, machine: MachineRates) -> float:
        """With as few rounds as there may be."""
        return self.check_s(machine) + MIN_ROUNDS * settled_call_s(self.seconds)


@dataclass(frozen=True)
class PlannedCell:
    """A cell to be planned.

    Args:
        key: names it among all.
        nbytes: that a call of fastfuse reads and writes.
        memory: whether peak memory is measured.
        first_turn: of its suite.
        left_out: rivals that are not measured, by title, with the reasons.
        dropped: why it is not measured at all, or nothing.
    """

    key: str
    suite: str
    variants: tuple[PlannedVariant, ...]
    nbytes: float
    memory: bool = False
    first_turn: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    dropped: str = ""
    rounds: int = MIN_ROUNDS

    def rounds_s(self) -> float:
        round_s = sum(settled_call_s(v.seconds) for v in self.variants)
        return max(LEAST_ROUNDS_S, self.rounds * round_s)

    def seconds(self, machine: MachineRates) -> float:
        prepared = min(PREPARED_MOST_S, self.nbytes / (PREPARED_RATE * machine.copy_rate))
        checked = sum(v.check_s(machine) for v in self.variants)
        peaks = sum(PEAK_S + v.seconds for v in self.variants if not v.compiles) * self.memory
        return CELL_S + prepared * len(self.variants) + checked + self.rounds_s() + peaks

    def without(self, titles: Iterable[str], reason: str) -> PlannedCell:
        gone = dict.fromkeys(titles, reason)
        variants = tuple(v for v in self.variants if v.title not in gone)
        return replace(self, variants=variants, left_out={**self.left_out, **gone})


def in_turns(cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    """One of every suite, and again; what is dropped comes last."""
    next_turn: dict[str, int] = {}
    turns = []
    for cell in cells:
        turn = next_turn.setdefault(cell.suite, cell.first_turn)
        next_turn[cell.suite] += not cell.dropped
        turns.append(math.inf if cell.dropped else turn)
    order = sorted(range(len(cells)), key=lambda i: turns[i])
    return [cells[i] for i in order]


def _affordable(cell: PlannedCell, machine: MachineRates, rival_s: float) -> PlannedCell:
    """Without rivals that take more than their share (2)."""
    if cell.dropped:
        return cell
    long = {
        v.title: v.least_s(machine)
        for v in cell.variants
        if v.rival and v.least_s(machine) > rival_s
    }
    for title, seconds in long.items():
        reason = f"would take {seconds:.0f} s, more than its share, {rival_s:.0f} s"
        cell = cell.without([title], reason)
    if any(v.rival and not v.compiles for v in cell.variants):
        return cell
    least = min(long.values(), default=0.0)
    reason = f"every rival would take {least:.0f} s or more, over its share, {rival_s:.0f} s"
    return replace(cell, dropped=reason)


def _least(cell: PlannedCell) -> PlannedCell:
    """With as little as may be measured of it (3)."""
    titles = [v.title for v in cell.variants if v.compiles]
    return replace(cell.without(titles, "no time was left to compile it"), memory=False)


def estimated(
    cells: Sequence[PlannedCell],
    estimate: Callable[[PlannedCell], PlannedCell],
    machine: MachineRates,
    budget_s: float,
    now: float = 0.0,
) -> list[PlannedCell]:
    """The cells as ``estimate`` gives them, those that come too late dropped (1)."""
    left = budget_s - now
    rooms = {most: most for most in (left, ESTIMATED_MOST * left)}
    waiting: dict[str, deque[PlannedCell]] = {}
    for cell in cells:
        waiting.setdefault(cell.suite, deque()).append(cell)
    found: list[PlannedCell] = []
    for turn in itertools.count():
        if all(room < most / 20 for most, room in rooms.items()) or not any(waiting.values()):
            break
        for queue in waiting.values():
            taken = not queue or turn < queue[0].first_turn
            while queue and not taken:
                found.append(estimate(queue.popleft()))
                affordable = _affordable(found[-1], machine, RIVAL_SHARE * budget_s)
                taken = not affordable.dropped  # else it does not use up the turn (2)
                needed = _least(affordable).seconds(machine)
                for most, room in rooms.items():
                    if taken and needed <= min(left, room):
                        rooms[most] = room - needed
    reason = f"cells before it take more than the {left:.0f} s that there are"
    return found + [replace(cell, dropped=reason) for queue in waiting.values() for cell in queue]


class Plan:
    """RULE applied to cells; ``cells`` are those to come, in order.

    Args:
        budget_s: the whole time.
        now: seconds of it that have passed.
    """

    def __init__(
        self, cells: Sequence[PlannedCell], machine: MachineRates, budget_s: float, now: float = 0.0
    ) -> None:
        self.machine, self.budget_s = machine, budget_s
        self.rival_s = RIVAL_SHARE * budget_s
        self.spent, self.estimated = 0.0, 0.0
        self.cells = in_turns([_affordable(cell, machine, self.rival_s) for cell in cells])
        self.planned = {cell.key: cell for cell in self.fit(now)}

    @property
    def pace(self) -> float:
        """Seconds that an estimated one took so far; one cell's surprise is not believed whole."""
        assumed = self.budget_s / 12
        return (self.spent + assumed) / (self.estimated + assumed)

    def fit(self, now: float) -> list[PlannedCell]:
        """The cells to come as they are measured or dropped, ``now`` seconds after the start."""
        left = self.budget_s - now
        pace, machine = self.pace, self.machine
        found: list[PlannedCell] = []
        for cell in self.cells:
            if not cell.dropped:
                plain = _least(cell)
                needed = pace * plain.seconds(machine)
                if needed <= left:
                    left, cell = left - needed, plain
                else:
                    reason = f"would take {needed:.0f} s of the {max(left, 0):.0f} s left"
                    cell = replace(cell, dropped=reason)
            found.append(cell)
        for added in (self._compiled, self._with_peaks):
            for i, (cell, asked) in enumerate(zip(found, self.cells, strict=True)):
                more = added(cell, asked)
                needed = pace * (more.seconds(machine) - cell.seconds(machine))
                if not cell.dropped and needed <= left:
                    found[i], left = more, left - needed
        return self._with_rounds(found, left)

    def _compiled(self, cell: PlannedCell, asked: PlannedCell) -> PlannedCell:
        return replace(cell, variants=asked.variants, left_out=asked.left_out)

    def _with_peaks(self, cell: PlannedCell, asked: PlannedCell) -> PlannedCell:
        return replace(cell, memory=asked.memory)

    def _with_rounds(self, cells: list[PlannedCell], left: float) -> list[PlannedCell]:
        """All with the most rounds that fit (5)."""
        kept = [cell for cell in cells if not cell.dropped]

        def more(rounds: int) -> float:
            extended = (replace(c, rounds=rounds).rounds_s() - c.rounds_s() for c in kept)
            return self.pace * sum(extended)

        possible = range(MAX_ROUNDS, MIN_ROUNDS, -1)
        rounds = next((n for n in possible if more(n) <= left), MIN_ROUNDS)
        return [c if c.dropped else replace(c, rounds=rounds) for c in cells]

    def start(self, key: str, now: float) -> PlannedCell:
        """The cell of that key, which is next, as it is measured or dropped."""
        cell = next(c for c in self.fit(now) if c.key == key)
        self.cells = [c for c in self.cells if c.key != key]
        return cell

    def finish(self, cell: PlannedCell, seconds: float) -> None:
        """``cell``, as ``start`` returned it, took so long."""
        self.spent += seconds
        self.estimated += cell.seconds(self.machine)
