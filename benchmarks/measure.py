"""Measures variants of one computation against each other; every op's benchmark is built on this.

:func:`compare` first checks that the variants agree and raises ``MismatchError`` otherwise: a
wrong kernel is not timed. It then runs rounds in which every variant runs once. pytest-benchmark
times fastfuse; the set-up of each of its rounds runs and times every rival, in rotating order, and
one copy for the roof. Drift of the machine thus meets all of them alike. Each timed call follows
untimed ones of the same variant (``_settle``): it finds caches and free pages as in a loop of its
own, not as another variant left them. (Calls of over half a second settle by a block of fresh
memory alone.) Everything else ends in ``benchmark.extra_info``, as JSON.

A time spans a call up to its result; freeing the result is not in it. On CUDA devices it lies
between two events, with the L2 cache flushed before.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastfuse.verify import MismatchError

__all__ = [
    "REGIMES",
    "Clock",
    "CopyRoof",
    "Variant",
    "check_agreement",
    "compare",
    "count_flops",
    "current_regime",
    "gemm_rate",
    "kept_bytes",
    "plain_float32",
]

# How large results get their memory on the CPU; the same for every variant of a run.
REGIMES: dict[str, dict[str, str]] = {
    "fresh": {},  # as installed: fresh pages; fastfuse asks for huge ones
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},  # PyTorch asks for huge pages for everyone
    "warm": {  # the allocator keeps what it once had
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_TOP_PAD_": str(1 << 30),
    },
}
COPY_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # of one buffer; far beyond the caches
COPY_PAIRS = 2  # freshly allocated per cell: which pages a buffer gets decides its rate
L2_FLUSH_BYTES = 256 << 20
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}

MIN_ROUNDS = 5
MAX_WARM_UP_CALLS, WARM_UP_S = 2, 0.2  # of a variant, after the call whose result was checked
# Before every timed call. A virtual machine may give free pages back to its host, and fetching one
# takes milliseconds: with fewer calls that is what is measured, at random.
MAX_SETTLING_CALLS, SETTLING_S = 4, 0.1
# A longer call neither warms up nor settles: its caches are its own after a fraction of its time,
# and one block of fresh memory fetches the pages.
LONG_CALL_S, SETTLING_BYTES = 0.5, 512 << 20


@dataclass(frozen=True)
class Variant:
    """One way to compute a cell. ``call`` takes nothing and returns a tensor or several.

    Args:
        layout: of inputs and results; for the tables.
        rival: False for fastfuse itself.
        differs: why its values are not ours by definition; only shapes and dtypes are then checked.
        unreliable: tensors, by index with a name, that PyTorch gets wrong on some machines: there
            it is recorded that they do not agree, and the variant is timed all the same.
        optional: needs what a machine may lack (a compiler); left out with the reason if it raises.
        timed: False for one that only checks the others.
    """

    name: str
    call: Callable[[], Any] = field(repr=False)
    layout: str = ""
    rival: bool = True
    differs: str = ""
    unreliable: Mapping[int, str] = field(default_factory=dict)
    optional: bool = False
    timed: bool = True

    @property
    def title(self) -> str:
        return f"{self.name}, {self.layout}" if self.layout else self.name


def current_regime() -> str:
    """The regime this process was started in, from its environment."""
    names = {name for variables in REGIMES.values() for name in variables}
    found = {name: os.environ[name] for name in names if name in os.environ}
    return next((regime for regime, variables in REGIMES.items() if variables == found), "custom")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds of one call on a device; with ``host``, until the call returns to Python."""

    def __init__(self, device: str, *, host: bool = False) -> None:
        self.device, self.host = device, host
        if device == "cuda" and not host:
            self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device == "cuda" and not self.host:
            start, stop = self.events
            self.flush.zero_()
            start.record()
            result = call()
            stop.record()
            stop.synchronize()
            del result
            return start.elapsed_time(stop) / 1e3
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        synchronize(self.device)
        del result
        return seconds


class CopyRoof:
    """The copy rate, in bytes read and written per second: the best of many large float32 copies.

    ``sample`` makes one copy between warmed buffers, so that copies interleave with variants.
    """

    def __init__(self, device: str) -> None:
        self.clock = Clock(device)
        self.rate = 0.0
        count = COPY_BYTES[device] // 4
        block = torch.rand(1 << 20, device=device)
        self.pairs = [
            (block.repeat(count // block.numel()), torch.ones(count, device=device))
            for _ in range(COPY_PAIRS)
        ]
        for i in range(2 * COPY_PAIRS):
            self.sample(i)

    def sample(self, round_index: int) -> None:
        source, target = self.pairs[round_index % COPY_PAIRS]
        seconds = self.clock(lambda: target.copy_(source))
        self.rate = max(self.rate, 2 * source.nbytes / seconds)


def plain_float32() -> None:
    """Keeps GPUs from computing float32 convolutions in TF32; products already are as asked for."""
    torch.backends.cudnn.allow_tf32 = False


def count_flops(build: Callable[[], Callable[[], Any]]) -> int:
    """FLOPs of the call that ``build`` returns, by the formulas of its ops; nothing is computed."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        build()()
    return counter.get_total_flops()


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product: the better of ``F.linear`` and a 1x1 conv2d."""
    n = GEMM_SIZE[device]
    x = torch.randn(n, n, device=device, dtype=dtype)
    weight = torch.randn(n, n, device=device, dtype=dtype)
    pixels = x.view(1, n // 32, 32, n).permute(0, 3, 1, 2)  # channels_last
    clock = Clock(device)
    with torch.no_grad():
        best = min(
            clock(call)
            for _ in range(5)
            for call in (
                lambda: F.linear(x, weight),
                lambda: F.conv2d(pixels, weight[:, :, None, None]),
            )
        )
    return 2 * n**3 / best


def kept_bytes(call: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that ``call`` keeps for backward: every storage once, and none of ``parameters``."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:  # which stays alive, so that no address is used twice
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(nbytes for address, nbytes in kept.items() if address not in known)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _relative_error(result: Tensor, expected: Tensor) -> float:
    """As in ``fastfuse.tolerances``, one image and a few channels at a time to stay small."""
    difference, scale = 0.0, 1e-30
    wide = torch.promote_types(result.dtype, torch.float32)
    axis = min(1, result.ndim - 1)
    for a, b in zip(result.split(64, axis), expected.split(64, axis), strict=True):
        error = (a.to(wide) - b.to(wide)).abs_().max().item()
        if error != error:  # NaN
            return float("inf")
        difference, scale = max(difference, error), max(scale, b.abs().max().item())
    return difference / scale


def check_agreement(
    variants: Sequence[Variant],
    tolerances: Sequence[float],
    seconds: dict[str, float] | None = None,
    wrong: dict[str, str] | None = None,
) -> tuple[list[Variant], dict[str, str]]:
    """Runs every variant once and holds its tensors against the first variant's.

    Tensors beyond ``tolerances`` (gradients of a rival's own parameters) are not compared.

    Args:
        seconds: gets what each of these calls took, by title.
        wrong: gets what of the unreliable does not agree, by title.

    Returns:
        the variants that can run, and for each other one why it cannot.

    Raises:
        MismatchError: with what differs and by how much; or when nothing could be compared.
    """
    ours, seconds = variants[0], {} if seconds is None else seconds
    wrong = {} if wrong is None else wrong

    def run(variant: Variant) -> list[Tensor]:
        begin = time.perf_counter()
        result = _tensors(variant.call())
        seconds[variant.title] = time.perf_counter() - begin
        return result

    expected = run(ours)
    usable, left_out, compared = [ours], {}, 0
    for variant in variants[1:]:
        try:
            results = run(variant)
        except Exception as reason:
            if not variant.optional:
                raise
            first_line = str(reason).partition("\n")[0]
            left_out[variant.title] = f"{type(reason).__name__}: {first_line[:200]}"
            continue
        for i, tolerance in enumerate(tolerances):
            a, b = results[i], expected[i]
            if a.shape != b.shape or a.dtype != b.dtype:
                raise MismatchError(
                    f"{variant.title}: tensor {i} is {a.dtype} {tuple(a.shape)}; "
                    f"{ours.title} has {b.dtype} {tuple(b.shape)}"
                )
            if variant.differs or (error := _relative_error(a, b)) <= tolerance:
                continue
            if i in variant.unreliable:
                name = variant.unreliable[i]
                wrong[variant.title] = f"wrong {name}, relative error {error:.1e}"
            else:
                raise MismatchError(
                    f"{variant.title} and {ours.title} differ in tensor {i}: relative error "
                    f"{error:.2e} > {tolerance:.2e}"
                )
        compared += variant.rival and not variant.differs
        usable.append(variant)
    if not compared:
        raise MismatchError(f"{ours.title}: no variant computes the same, so nothing was checked")
    return usable, left_out


def compare(
    benchmark: Any,
    variants: Sequence[Variant],
    *,
    info: Mapping[str, Any],
    tolerances: Sequence[float],
    budget_s: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = 30,
    device: str = "cpu",
    nbytes: int | None = None,
    flops: Mapping[str, int] | None = None,
    host: bool = False,
    memory: Callable[[Sequence[Variant]], list[int | None]] | None = None,
    kept: Callable[[Variant], int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Checks, times and records the variants of one cell. The first variant must be fastfuse.

    Args:
        benchmark: pytest-benchmark's fixture; its own statistics are those of the fastfuse that
            was faster while warming up.
        info: what names the cell (op, shape, dtype, mode), copied to ``extra_info``.
        tolerances: largest relative error of each compared tensor of a result.
        budget_s: about how long the rounds may take; at least ``min_rounds`` are run.
        nbytes: bytes that must move: each input read once, each result written once.
        flops: floating-point operations of each variant, by its name.
        host: time until a call returns to Python: the dispatch overhead of a tiny call.
        memory: the peak extra memory of each variant, in bytes.
        kept: the bytes that a variant keeps for backward.
        progress: told what is being done.

    Returns:
        ``benchmark.extra_info``: ``ours`` (title of the faster fastfuse), ``copy_gbs`` (this cell's
        roof), ``variants`` (median_ms, iqr_ms, speedup of ours over it, gbs, share of the copy
        roof, gflops, peak_bytes, kept_bytes, wrong), ``left_out``.
    """
    progress("checks that the variants agree")
    first_calls: dict[str, float] = {}
    wrong: dict[str, str] = {}
    variants, left_out = check_agreement(variants, tolerances, first_calls, wrong)
    variants = [variant for variant in variants if variant.timed]
    clock = Clock(device, host=host)
    roof = CopyRoof(device) if nbytes else None

    progress("warms up")
    estimates = {v.title: _estimate(clock, v, first_calls[v.title]) for v in variants}
    first = min((v for v in variants if not v.rival), key=lambda v: estimates[v.title])
    others = [v for v in variants if v is not first]
    per_round = sum(t + _settling_time(t) for t in estimates.values())
    rounds = int(budget_s / max(per_round, 1e-6))
    rounds = max(min_rounds, min(rounds, max_rounds))
    seconds: dict[str, list[float]] = {v.title: [] for v in variants}
    done = 0

    def run_others() -> None:
        nonlocal done
        if done % max(1, rounds // 10) == 0:
            progress(f"round {done + 1} of {rounds}")
        for variant in _rotated(others, done):
            _settle(variant.call, estimates[variant.title], device)
            seconds[variant.title].append(clock(variant.call))
        if roof:
            roof.sample(done)
        _settle(first.call, estimates[first.title], device)
        done += 1

    def run_ours() -> None:
        seconds[first.title].append(clock(first.call))

    benchmark.pedantic(run_ours, setup=run_others, rounds=rounds, iterations=1)

    progress("measures peak memory")
    peaks = memory(variants) if memory else [None] * len(variants)

    medians = {title: statistics.median(times) for title, times in seconds.items()}
    ours = min((v.title for v in variants if not v.rival), key=medians.__getitem__)
    rows = []
    for variant, peak in zip(variants, peaks, strict=True):
        times, median = seconds[variant.title], medians[variant.title]
        quartiles = statistics.quantiles(times, n=4, method="inclusive")
        work = flops.get(variant.name) if flops else None
        rows.append(
            {
                "title": variant.title,
                "name": variant.name,
                "layout": variant.layout,
                "rival": variant.rival,
                "differs": variant.differs,
                "wrong": wrong.get(variant.title, ""),
                "median_ms": median * 1e3,
                "iqr_ms": (quartiles[2] - quartiles[0]) * 1e3,
                "min_ms": min(times) * 1e3,
                "speedup": median / medians[ours],
                "gbs": nbytes / median / 1e9 if nbytes else None,
                "share": nbytes / median / roof.rate if nbytes and roof else None,
                "gflops": work / median / 1e9 if work else None,
                "peak_bytes": peak,
                "kept_bytes": kept(variant) if kept else None,
            }
        )
    benchmark.extra_info.update(
        info,
        device=device,
        regime=current_regime(),
        threads=torch.get_num_threads(),
        rounds=rounds,
        bytes=nbytes,
        flops=flops[first.name] if flops else None,
        host=host,
        copy_gbs=roof.rate / 1e9 if roof else None,
        ours=ours,
        variants=rows,
        left_out=left_out,
    )
    return benchmark.extra_info


def _estimate(clock: Clock, variant: Variant, first_call: float) -> float:
    """Seconds of a call. The first one tells for a long one, unless it may have compiled."""
    if first_call > LONG_CALL_S and not variant.optional and clock.device == "cpu":
        return first_call
    times = [clock(variant.call)]
    while len(times) < MAX_WARM_UP_CALLS and sum(times) < WARM_UP_S:
        times.append(clock(variant.call))
    return min(times)


def _settle(call: Callable[[], Any], seconds: float, device: str) -> None:
    if seconds > LONG_CALL_S:
        torch.ones(SETTLING_BYTES, dtype=torch.int8, device=device)
        return
    until = time.perf_counter() + SETTLING_S
    for _ in range(MAX_SETTLING_CALLS):
        call()
        if time.perf_counter() >= until:
            break


def _settling_time(seconds: float) -> float:
    """What ``_settle`` takes for a call of so many seconds."""
    if seconds > LONG_CALL_S:
        return SETTLING_S
    return seconds * min(MAX_SETTLING_CALLS, math.ceil(SETTLING_S / max(seconds, 1e-9)))


def _rotated(variants: Sequence[Variant], by: int) -> Iterator[Variant]:
    for i in range(len(variants)):
        yield variants[(i + by) % len(variants)]
