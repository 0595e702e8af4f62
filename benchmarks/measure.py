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

import contextlib
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastfuse.ops.layout import memory_format
from fastfuse.verify import MismatchError

__all__ = [
    "CHANNELS_LAST",
    "CONTIGUOUS",
    "EXACT",
    "MIN_ROUNDS",
    "REGIMES",
    "Agreement",
    "Allowance",
    "Clock",
    "CopyRoof",
    "Variant",
    "check_agreement",
    "compare",
    "compile_seconds",
    "count_work",
    "current_regime",
    "gemm_rate",
    "kept_bytes",
    "plain_float32",
    "random_tensors",
    "settled_call_s",
    "tensors",
    "too_long",
    "work",
]

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
EXACT = "exact"  # the variant that computes in float64
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
GEMM_SIZE = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 8192)}
GEMM_CALL_S = 0.2

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
class Variant:
    """One way to compute a cell. ``call`` takes nothing and returns a tensor or several.

    Args:
        layout: of inputs and results; for the tables.
        rival: False for fastfuse itself.
        differs: why its values are not ours by definition; only shapes and dtypes are then checked.
        optional: needs what a machine may lack (a compiler); left out with the reason if it raises.
        timed: False for one that only checks the others.
    """

    name: str
    call: Callable[[], Any] = field(repr=False)
    layout: str = ""
    rival: bool = True
    differs: str = ""
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


def random_tensors(name: str, layout: str, dtype: str, device: str) -> Callable[..., Tensor]:
    """A source of a variant's inputs, ``(*size, scale=1)``: the same values for every variant.

    For the variant EXACT these values, rounded to the dtype, are float64.
    """
    generator = torch.Generator().manual_seed(0)
    format_ = memory_format(layout == CHANNELS_LAST)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(size, generator=generator).mul_(scale)
        x = x.to(device, getattr(torch, dtype))
        x = x.double() if name == EXACT else x
        return x.contiguous(memory_format=format_) if len(size) == 4 else x

    return random


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


class _Bytes(TorchDispatchMode):
    """Counts the bytes of every op's operands and results; views have none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, results))
            self.count += sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        return results


def count_work(build: Callable[[], Callable[[], Any]]) -> tuple[int, int]:
    """FLOPs of the call that ``build`` returns, by the formulas of its ops, and bytes that these
    read and write; nothing is computed. What is built before holds real tensors, and may.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as flops:
        call = build()
        with _Bytes() as moved:
            call()
    return flops.get_total_flops(), moved.count


def work(build: Callable[..., Any], name: str, cell: Any, device: str) -> tuple[int, int]:
    """FLOPs and bytes of a variant of a cell, a compiled one's as its eager one's."""
    name = name.replace("compiled", "eager")
    arguments = (name, CHANNELS_LAST, cell.shape, cell.dtype, cell.mode, device)
    return count_work(lambda: build(*arguments))


def compile_seconds(device: str) -> float:
    """Of a compilation by torch.compile, after one that loads the compiler; or until it failed.

    A constant of its own keeps it from being found in the caches of earlier runs.
    """
    shift = time.time() % 1

    def add(x: Tensor) -> Tensor:
        return x + 1

    def fuse(x: Tensor) -> Tensor:
        up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.cat([(up - shift) / 0.5, (up - 0.2) / 0.7], dim=1)

    x, seconds = torch.ones(1, 8, 64, 64, device=device), 0.0
    for function in (add, fuse):
        begin = time.perf_counter()
        with contextlib.suppress(Exception), torch.no_grad():
            torch.compile(function, dynamic=False)(x)
        seconds = time.perf_counter() - begin
    torch._dynamo.reset()
    return seconds


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a square product: the better of ``F.linear`` and a 1x1 conv2d.

    The product is as large as takes GEMM_CALL_S at most: it lasts about as long on every machine.
    """
    rate, n = 0.0, GEMM_SIZE[device][0]
    for size in GEMM_SIZE[device]:
        if rate and 2 * size**3 / rate > GEMM_CALL_S:
            break
        n = size
        rate = _gemm_rate(device, dtype, n, rounds=2)
    return max(rate, _gemm_rate(device, dtype, n, rounds=3))


def _gemm_rate(device: str, dtype: torch.dtype, n: int, rounds: int) -> float:
    x = torch.randn(n, n, device=device, dtype=dtype)
    weight = torch.randn(n, n, device=device, dtype=dtype)
    pixels = x.view(1, n // 32, 32, n).permute(0, 3, 1, 2)  # channels_last
    clock = Clock(device)
    with torch.no_grad():
        best = min(
            clock(call)
            for _ in range(rounds)
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


@dataclass
class Agreement:
    """What ``check_agreement`` found, by the variants' titles."""

    usable: list[Variant]
    left_out: dict[str, str] = field(default_factory=dict)  # why it cannot run
    wrong: dict[str, str] = field(default_factory=dict)  # tensors, and how far they are off
    seconds: dict[str, float] = field(default_factory=dict)  # of the call that was checked


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _relative_error(result: Tensor, expected: Tensor) -> float:
    """As in ``fastfuse.tolerances``, one image and a few channels at a time to stay small."""
    difference, scale = 0.0, 1e-30
    widest = torch.promote_types(result.dtype, expected.dtype)
    wide = torch.promote_types(widest, torch.float32)
    result, expected = torch.atleast_1d(result), torch.atleast_1d(expected)
    axis = min(1, result.ndim - 1)
    for a, b in zip(result.split(64, axis), expected.split(64, axis), strict=True):
        error = (a.to(wide) - b.to(wide)).abs_().max().item()
        if error != error:  # NaN
            return float("inf")
        difference, scale = max(difference, error), max(scale, b.abs().max().item())
    return difference / scale


def check_agreement(
    variants: Sequence[Variant],
    tolerances: Mapping[str, float],
    exact: Callable[[], Any] | None = None,
    compared: Callable[[Any], Any] | None = None,
) -> Agreement:
    """Runs every variant once and holds its tensors against the first variant's.

    Tensors beyond ``tolerances`` (gradients of a rival's own parameters) are not compared. Where a
    rival differs, ``exact`` decides: ours must be within the tolerance of it, and what is wrong
    with the rival is recorded.

    Args:
        tolerances: largest relative error of each compared tensor of a result, by its name.
        exact: computes the same in float64, of the same inputs.
        compared: what of a result is compared, if not all of it as it is.

    Raises:
        MismatchError: with what differs and by how much; or when nothing could be compared.
    """
    ours, found = variants[0], Agreement([variants[0]])
    truth: list[Tensor] = []

    def run(variant: Variant) -> list[Tensor]:
        begin = time.perf_counter()
        result = variant.call()
        found.seconds[variant.title] = time.perf_counter() - begin
        return seen(result)

    def seen(result: Any) -> list[Tensor]:
        return tensors(compared(result) if compared else result)

    expected, agreeing = run(ours), 0
    for variant in variants[1:]:
        try:
            results = run(variant)
        except Exception as reason:
            if not variant.optional:
                raise
            first_line = str(reason).partition("\n")[0]
            found.left_out[variant.title] = f"{type(reason).__name__}: {first_line[:200]}"
            continue
        wrong = []
        for i, (name, tolerance) in enumerate(tolerances.items()):
            a, b = results[i], expected[i]
            if a.shape != b.shape or a.dtype != b.dtype:
                raise MismatchError(
                    f"{variant.title}: {name} is {a.dtype} {tuple(a.shape)}; "
                    f"{ours.title} has {b.dtype} {tuple(b.shape)}"
                )
            if variant.differs or (error := _relative_error(a, b)) <= tolerance:
                continue
            if exact is None or not variant.rival:
                raise MismatchError(
                    f"{variant.title} and {ours.title} differ in {name}: relative error "
                    f"{error:.2e} > {tolerance:.2e}"
                )
            truth = truth or seen(exact())
            own, theirs = _relative_error(b, truth[i]), _relative_error(a, truth[i])
            if not own <= tolerance:
                raise MismatchError(
                    f"{ours.title}: {name} is {own:.2e} > {tolerance:.2e} off float64, "
                    f"{variant.title} {theirs:.2e}"
                )
            if not theirs <= tolerance:
                wrong.append(f"wrong {name}, {theirs:.1e} off float64 and fastfuse {own:.1e}")
        if wrong:
            found.wrong[variant.title] = "; ".join(wrong)
        agreeing += variant.rival and not variant.differs
        found.usable.append(variant)
    if not agreeing:
        raise MismatchError(f"{ours.title}: no variant computes the same, so nothing was checked")
    return found


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


def compare(
    benchmark: Any,
    variants: Sequence[Variant],
    *,
    info: Mapping[str, Any],
    tolerances: Mapping[str, float],
    budget_s: float,
    allowance: Allowance,
    exact: Callable[[], Any] | None = None,
    compared: Callable[[Any], Any] | None = None,
    max_rounds: int = 20,
    device: str = "cpu",
    nbytes: int | None = None,
    flops: Mapping[str, int] | None = None,
    host: bool = False,
    memory: Callable[[Sequence[Variant]], list[int | None]] | None = None,
    kept: Callable[[Variant], int] | None = None,
) -> dict[str, Any]:
    """Checks, times and records the variants of one cell. The first variant must be fastfuse.

    Args:
        benchmark: pytest-benchmark's fixture; its own statistics are those of the fastfuse that
            was faster while warming up.
        info: what names the cell (op, shape, dtype, mode), copied to ``extra_info``.
        tolerances, exact, compared: as ``check_agreement`` takes them.
        budget_s: about how long the rounds may take, and no longer than the allowance has; at
            least ``MIN_ROUNDS`` are run.
        nbytes: bytes that must move: each input read once, each result written once.
        flops: floating-point operations of each variant, by its name.
        host: time until a call returns to Python: the dispatch overhead of a tiny call.
        memory: the peak extra memory of each variant, in bytes.
        kept: the bytes that a variant keeps for backward.

    Returns:
        ``benchmark.extra_info``: ``ours`` (title of the faster fastfuse), ``copy_gbs`` (this cell's
        roof), ``variants`` (median_ms, iqr_ms, speedup of ours over it, gbs, share of the copy
        roof, gflops, peak_bytes, kept_bytes, wrong), ``left_out``.
    """
    allowance.say("checks that the variants agree")
    agreement = check_agreement(variants, tolerances, exact, compared)
    variants = [variant for variant in agreement.usable if variant.timed]
    clock = Clock(device, host=host)
    roof = CopyRoof(device) if nbytes else None

    allowance.say("warms up")
    estimates = {v.title: _estimate(clock, v, agreement.seconds[v.title]) for v in variants}
    left_out = {**allowance.left_out, **agreement.left_out}
    if allowance.rival_s < math.inf:
        left_out |= too_long(variants, estimates, allowance.rival_s)
    variants = [v for v in variants if v.title not in left_out]
    first = min((v for v in variants if not v.rival), key=lambda v: estimates[v.title])
    others = [v for v in variants if v is not first]
    per_round = sum(settled_call_s(estimates[v.title]) for v in variants)
    rounds = int(min(budget_s, allowance.rounds_s) / max(per_round, 1e-6))
    rounds = max(MIN_ROUNDS, min(rounds, max_rounds))
    seconds: dict[str, list[float]] = {v.title: [] for v in variants}
    done = 0

    def run_others() -> None:
        nonlocal done
        if done % max(1, rounds // 10) == 0:
            allowance.say(f"round {done + 1} of {rounds}")
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

    allowance.say("measures peak memory")
    peaks = memory(variants) if memory and allowance.memory else [None] * len(variants)

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
                "wrong": agreement.wrong.get(variant.title, ""),
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


def settled_call_s(seconds: float) -> float:
    """What a call of so many seconds takes together with ``_settle``."""
    if seconds > LONG_CALL_S:
        return seconds + SETTLING_S
    calls = min(MAX_SETTLING_CALLS, math.ceil(SETTLING_S / max(seconds, 1e-9)))
    return (calls + 1) * seconds


def too_long(
    variants: Sequence[Variant], estimates: Mapping[str, float], rival_s: float
) -> dict[str, str]:
    """Rivals that need no more rounds or may have none, by title, with the reasons.

    A rival's slower layout is told by its first calls. The fastest rival always stays.
    """
    rivals = sorted((v for v in variants if v.rival), key=lambda v: estimates[v.title])
    found: dict[str, str] = {}
    best: dict[str, float] = {}
    for i, variant in enumerate(rivals):
        seconds = estimates[variant.title]
        faster = best.setdefault(variant.name, seconds)
        if seconds > SLOWER_LAYOUT * faster:
            ratio = seconds / faster
            found[variant.title] = f"{ratio:.1f} times as slow as its other layout when checked"
        elif i and MIN_ROUNDS * settled_call_s(seconds) > rival_s:
            found[variant.title] = (
                f"a call takes {seconds:.1f} s, and {MIN_ROUNDS} rounds more than its share of "
                f"the time, {rival_s:.0f} s"
            )
    return found


def _rotated(variants: Sequence[Variant], by: int) -> Iterator[Variant]:
    for i in range(len(variants)):
        yield variants[(i + by) % len(variants)]
