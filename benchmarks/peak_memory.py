"""The most memory that one call holds beyond its inputs, its result included.

``python peak_memory.py`` answers every line of its input, a JSON object {"target":
"module:function", "cases": [arguments], "warm_up": arguments, "folder": where cases run}, with a
line: a JSON list of the peaks in bytes, with null where the system does not tell, or an object
{"error": text}.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from variants import BY_TRITON, TIMED, Variant

__all__ = ["of_variants", "peak_extra_memory"]

_CLEAR_REFS = Path("/proc/self/clear_refs")

Arguments = Mapping[str, Any]


def peak_extra_memory(
    target: str, cases: Sequence[Arguments], *, warm_up: Arguments, device: str = "cpu"
) -> list[int | None]:
    """Most bytes that one call holds beyond its inputs, its result included, for every case.

    On the CPU each case runs in a fresh process that has called nothing but the warm-up: one
    process imports, once for all calls of this function, and forks one for each case, in the
    folder that is the current one now. Elsewhere than on Linux the peaks are None.

    Args:
        target: "module:function" in this folder; it builds the inputs and returns the call.
        cases: keyword arguments of the target, JSON-able.
        warm_up: what a case takes over to become a tiny first call that loads libraries.
    """
    if device == "cuda":
        return [_peak_on_cuda(_resolve(target)(**case)) for case in cases]
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {"target": target, "cases": list(cases), "warm_up": warm_up, "folder": os.getcwd()}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline() or '{"error": "the process ended"}')
    if isinstance(answer, dict):
        raise RuntimeError(f"peak memory of {target} failed: {answer['error']}")
    return answer


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve())]
    # What is freed goes back to the system: holes that an allocator keeps, 60 MB of a backbone's
    # step and others in every process, are held by no call.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def of_variants(
    build: Callable[..., Any], cell: Any, warm_up: Arguments, device: str
) -> Callable[[Sequence[Variant]], list[int | None]]:
    """Peaks of a cell's variants, as ``Measurement`` takes them; None of those that compile or are
    there twice.

    Args:
        build: the suite's function of that name.
    """

    def memory(variants: Sequence[Variant]) -> list[int | None]:
        where = {"shape": cell.shape, "dtype": cell.dtype, "mode": cell.mode, "device": device}
        known = [v for v in variants if not (v.optional or v.name.endswith((TIMED, BY_TRITON)))]
        cases = [{"name": v.name, "layout": v.layout, **where} for v in known]
        module = build.__module__.rpartition(".")[2]  # pytest imports it as a part of the project
        target = f"{module}:{build.__name__}"
        peaks = peak_extra_memory(target, cases, warm_up=warm_up, device=device)
        by_title = {v.title: peak for v, peak in zip(known, peaks, strict=True)}
        return [by_title.get(v.title) for v in variants]

    return memory


def _peak_on_cuda(call: Callable[[], Any]) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resolve(target: str) -> Callable[..., Callable[[], Any]]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(match[1]) << 10


def _peak_here(build: Callable[..., Callable[[], Any]], case: Arguments, warm_up: Arguments) -> int:
    build(**{**case, **warm_up})()
    call = build(**case)
    _CLEAR_REFS.write_text("5", encoding="utf-8")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _peaks(
    target: str, cases: Sequence[Arguments], warm_up: Arguments, folder: str
) -> list[int | None]:
    if not os.access(_CLEAR_REFS, os.W_OK):
        return [None] * len(cases)
    build = _resolve(target)
    peaks: list[int | None] = []
    for case in cases:  # no thread runs yet, so that a fork is a whole process
        read_end, write_end = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.chdir(folder)
                os.write(write_end, json.dumps({"peak": _peak_here(build, case, warm_up)}).encode())
            except BaseException as error:
                traceback.print_exc()
                os.write(
                    write_end, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
                )
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, encoding="utf-8") as stream:
            answer = stream.read()
        _, status = os.waitpid(child, 0)
        found = json.loads(answer or f'{{"error": "ended with exit status {status}"}}')
        if "error" in found:
            raise RuntimeError(f"the process of {dict(case)}: {found['error']}")
        peaks.append(found["peak"])
    return peaks


def _answer(request: str) -> str:
    try:
        return json.dumps(_peaks(**json.loads(request)))
    except Exception as error:
        traceback.print_exc()
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    for line in sys.stdin:
        print(_answer(line), flush=True)
