"""Measures variants of one computation against each other; every op's benchmark is built on this.

:func:`compare` first checks that the variants agree (``agreement.py``): a wrong kernel is not
timed. It then runs :class:`Rounds` in which every variant runs once. Each timed call follows
untimed ones of the same variant (``_settle``): it finds caches and free pages as in a loop of its
own, not as another variant left them. (Calls of over half a second settle by a block of fresh
memory alone.) Everything else ends in ``benchmark.extra_info``, as JSON.

A time spans a call up to its result; freeing the result is not in it. On CUDA devices it lies
between two events, with the L2 cache flushed before.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from agreement import Agreement, check_agreement
from rates import Clock, CopyRoof
from regimes import current_regime
from variants import Variant

__all__ = [
    "LONG_CALL_S",
    "MIN_ROUNDS",
    "SETTLING_BYTES",
    "Allowance",
    "Measurement",
    "Timed",
    "compare",
    "settled_call_s",
    "too_long",
]

MIN_ROUNDS = 3
SLOWER_LAYOUT = 1.25  # times as slow as a rival's other layout when checked: not its better one
MAX_WARM_UP_CALLS, WARM_UP_S = 2, 0.2  # of a variant, after the call whose result was checked
# Before every timed call. A virtual machine may give free pages back to its host, and fetching one
# takes milliseconds: with fewer calls that is what is measured, at random.
MAX_SETTLING_CALLS, SETTLING_S = 4, 0.1
# A longer call neither warms up nor settles: its caches are its own after a fraction of its time,
# and one block of fresh memory fetches the pages.
LONG_CALL_S, SETTLING_BYTES = 0.5, 512 << 20


@dataclass(frozen=True)
class Measurement:
    """What is measured of a cell, and how. The first variant must be fastfuse.

    Args:
        info: what names the cell (op, shape, dtype, mode), copied to the record.
        tolerances, exact, compared: as ``check_agreement`` takes them.
        budget_s: about how long the rounds may take, and no longer than the allowance has; at
            least ``MIN_ROUNDS`` are run.
        nbytes: bytes that must move: each input read once, each result written once.
        flops: floating-point operations of each variant, by its name.
        host: time until a call returns to Python: the dispatch overhead of a tiny call.
        memory: the peak extra memory of each variant, in bytes.
        kept: the bytes that a variant keeps for backward.
    """

    variants: Sequence[Variant]
    info: Mapping[str, Any]
    tolerances: Mapping[str, float]
    budget_s: float
    max_rounds: int = 20
    device: str = "cpu"
    exact: Callable[[], Any] | None = None
    compared: Callable[[Any], Any] | None = None
    nbytes: int | None = None
    flops: Mapping[str, int] | None = None
    host: bool = False
    memory: Callable[[Sequence[Variant]], list[int | None]] | None = None
    kept: Callable[[Variant], int] | None = None


@dataclass(frozen=True)
class Allowance:
    """What a cell may take, as ``plan`` gives it; by default all that a suite asks for.

    Args:
        rounds_s: about how long the rounds may take.
        rival_s: most seconds that MIN_ROUNDS rounds of one rival may take.
        left_out: rivals that are not measured, by title, with the reasons.
        memory: whether peak memory is measured.
        say: told what is being done.
    """

    rounds_s: float = math.inf
    rival_s: float = math.inf
    left_out: Mapping[str, str] = field(default_factory=dict)
    memory: bool = True
    say: Callable[[str], None] = lambda text: None


def compare(benchmark: Any, measured: Measurement, allowance: Allowance) -> dict[str, Any]:
    """Checks, times and records the variants of one cell.

    Args:
        benchmark: pytest-benchmark's fixture; its own statistics are those of the fastfuse that
            was faster while warming up.

    Returns:
        ``benchmark.extra_info``: ``ours`` (title of the faster fastfuse), ``copy_gbs`` (this cell's
        roof), ``variants`` (median_ms, iqr_ms, host_ms, speedup of ours over it, gbs, share of the
        copy roof, gflops, peak_bytes, kept_bytes, wrong), ``left_out``.
    """
    allowance.say("checks that the variants agree")
    agreement = check_agreement(
        measured.variants, measured.tolerances, measured.exact, measured.compared
    )
    clock = Clock(measured.device, host=measured.host)
    roof = CopyRoof(measured.device) if measured.nbytes else None
    allowance.say("warms up")
    timed, left_out = _choose(agreement, clock, allowance)
    rounds = Rounds(timed, clock, roof, allowance.say)
    rounds.fit(min(measured.budget_s, allowance.rounds_s), measured.max_rounds)
    benchmark.pedantic(
        rounds.time_first, setup=rounds.time_others, rounds=rounds.count, iterations=1
    )
    if measured.memory and allowance.memory:
        allowance.say("measures peak memory")
        peaks = measured.memory([t.variant for t in timed])
        for t, peak in zip(timed, peaks, strict=True):
            t.peak_bytes = peak
    ours = min((t for t in timed if not t.variant.rival), key=lambda t: t.median)
    benchmark.extra_info.update(
        measured.info,
        device=measured.device,
        regime=current_regime(),
        threads=torch.get_num_threads(),
        rounds=rounds.count,
        bytes=measured.nbytes,
        flops=measured.flops[rounds.first.variant.name] if measured.flops else None,
        host=measured.host,
        copy_gbs=roof.rate / 1e9 if roof else None,
        ours=ours.title,
        variants=[_row(t, measured, ours.median, roof) for t in timed],
        left_out=left_out,
    )
    return benchmark.extra_info


@dataclass
class Timed:
    """A variant in the rounds, and what is found out about it.

    Args:
        call_s: seconds of a call, by its first ones.
        wrong: its tensors that are, and how far they are off.
        seconds: of its call in each round.
        host_seconds: until it returned to Python.
    """

    variant: Variant
    call_s: float
    wrong: str = ""
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def title(self) -> str:
        return self.variant.title

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """From the first to the third quartile."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def _choose(
    agreement: Agreement, clock: Clock, allowance: Allowance
) -> tuple[list[Timed], dict[str, str]]:
    """Who is timed, and who is left out, by title with the reasons."""
    timed = [
        Timed(v, _estimate(clock, v, agreement.seconds[v.title]), agreement.wrong.get(v.title, ""))
        for v in agreement.usable
        if v.timed
    ]
    left_out = {**allowance.left_out, **agreement.left_out}
    if allowance.rival_s < math.inf:
        left_out |= too_long(timed, allowance.rival_s)
    return [t for t in timed if t.title not in left_out], left_out


def _estimate(clock: Clock, variant: Variant, first_call: float) -> float:
    """Seconds of a call. The first one tells for a long one, unless it may have compiled."""
    if first_call > LONG_CALL_S and not variant.optional and clock.device == "cpu":
        return first_call
    times = [clock(variant.call)]
    while len(times) < MAX_WARM_UP_CALLS and sum(times) < WARM_UP_S:
        times.append(clock(variant.call))
    return min(times)


def too_long(timed: Sequence[Timed], rival_s: float) -> dict[str, str]:
    """Rivals that need no more rounds or may have none, by title, with the reasons.

    A rival's slower layout is told by its first calls. The fastest rival always stays.
    """
    rivals = sorted((t for t in timed if t.variant.rival), key=lambda t: t.call_s)
    found: dict[str, str] = {}
    best: dict[str, float] = {}
    for i, rival in enumerate(rivals):
        seconds = rival.call_s
        faster = best.setdefault(rival.variant.name, seconds)
        if seconds > SLOWER_LAYOUT * faster:
            ratio = seconds / faster
            found[rival.title] = f"{ratio:.1f} times as slow as its other layout when checked"
        elif i and MIN_ROUNDS * settled_call_s(seconds) > rival_s:
            found[rival.title] = (
                f"a call takes {seconds:.1f} s, and {MIN_ROUNDS} rounds more than its share of "
                f"the time, {rival_s:.0f} s"
            )
    return found


class Rounds:
    """Rounds in which every variant is timed once, so that drift of the machine meets all alike.

    pytest-benchmark times ``first``, the fastfuse that was faster while warming up; the set-up of
    each of its rounds times all others, in rotating order, and one copy for the roof.
    """

    def __init__(
        self,
        timed: Sequence[Timed],
        clock: Clock,
        roof: CopyRoof | None,
        say: Callable[[str], None],
    ) -> None:
        self.first = min((t for t in timed if not t.variant.rival), key=lambda t: t.call_s)
        self.others = [t for t in timed if t is not self.first]
        self.clock, self.roof, self.say = clock, roof, say
        self.count, self.done = MIN_ROUNDS, 0

    def fit(self, budget_s: float, most: int) -> None:
        """As many as fit, within bounds."""
        round_s = sum(settled_call_s(t.call_s) for t in (self.first, *self.others))
        self.count = max(MIN_ROUNDS, min(int(budget_s / max(round_s, 1e-6)), most))

    def time_others(self) -> None:
        if self.done % max(1, self.count // 10) == 0:
            self.say(f"round {self.done + 1} of {self.count}")
        for i in range(len(self.others)):
            timed = self.others[(i + self.done) % len(self.others)]
            _settle(timed, self.clock.device)
            self._time(timed)
        if self.roof:
            self.roof.sample(self.done)
        _settle(self.first, self.clock.device)
        self.done += 1

    def time_first(self) -> None:
        self._time(self.first)

    def _time(self, timed: Timed) -> None:
        timed.seconds.append(self.clock(timed.variant.call))
        timed.host_seconds.append(self.clock.returned_s)


def _settle(timed: Timed, device: str) -> None:
    if timed.call_s > LONG_CALL_S:
        torch.ones(SETTLING_BYTES, dtype=torch.int8, device=device)
        return
    until = time.perf_counter() + SETTLING_S
    for _ in range(MAX_SETTLING_CALLS):
        timed.variant.call()
        if time.perf_counter() >= until:
            break


def settled_call_s(seconds: float) -> float:
    """What a call of so many seconds takes together with ``_settle``."""
    if seconds > LONG_CALL_S:
        return seconds + SETTLING_S
    calls = min(MAX_SETTLING_CALLS, math.ceil(SETTLING_S / max(seconds, 1e-9)))
    return (calls + 1) * seconds


def _host_ms(timed: Timed, measured: Measurement) -> float | None:
    """Where it is another than the device's."""
    if measured.device == "cpu" or measured.host:
        return None
    return statistics.median(timed.host_seconds) * 1e3


def _row(
    timed: Timed, measured: Measurement, ours_s: float, roof: CopyRoof | None
) -> dict[str, Any]:
    """A variant in the record."""
    variant, median, nbytes = timed.variant, timed.median, measured.nbytes
    flops = measured.flops.get(variant.name) if measured.flops else None
    return {
        "title": variant.title,
        "name": variant.name,
        "layout": variant.layout,
        "rival": variant.rival,
        "differs": variant.differs,
        "wrong": timed.wrong,
        "median_ms": median * 1e3,
        "iqr_ms": timed.spread * 1e3,
        "min_ms": min(timed.seconds) * 1e3,
        "host_ms": _host_ms(timed, measured),
        "speedup": median / ours_s,
        "gbs": nbytes / median / 1e9 if nbytes else None,
        "share": nbytes / median / roof.rate if nbytes and roof else None,
        "gflops": flops / median / 1e9 if flops else None,
        "peak_bytes": timed.peak_bytes,
        "kept_bytes": measured.kept(variant) if measured.kept else None,
    }
