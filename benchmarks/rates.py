"""Seconds of a call, and what the machine gives: rates of copies and products, compilation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Clock", "CopyRoof", "compile_seconds", "gemm_rate", "plain_float32"]

COPY_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # of one buffer; far beyond the caches
COPY_PAIRS = 2  # freshly allocated per cell: which pages a buffer gets decides its rate
L2_FLUSH_BYTES = 256 << 20
GEMM_SIZE = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 8192)}
GEMM_CALL_S = 0.2


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds of one call on a device, whose second-level cache is cold if it is a GPU; with
    ``host``, until the call returns to Python, which ``returned_s`` tells of every call."""

    def __init__(self, device: str, *, host: bool = False) -> None:
        self.device, self.host, self.returned_s = device, host, 0.0
        if device == "cuda" and not host:
            self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device == "cuda" and not self.host:
            start, stop = self.events
            self.flush.zero_()
            synchronize(self.device)  # the host's time is not that of waiting for a full queue
            begin = time.perf_counter()
            start.record()
            result = call()
            stop.record()
            self.returned_s = time.perf_counter() - begin
            stop.synchronize()
            del result
            return start.elapsed_time(stop) / 1e3
        begin = time.perf_counter()
        result = call()
        seconds = self.returned_s = time.perf_counter() - begin
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
