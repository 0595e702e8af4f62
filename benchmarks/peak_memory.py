"""The most memory that one call holds beyond its inputs, its result included.

``python peak_memory.py CASES``, a JSON object {"target": "module:function", "cases": [arguments],
"warm_up": arguments}, prints the peaks in bytes, a JSON list with null where the system does not
tell.
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
from pathlib import Path
from typing import Any

import torch

__all__ = ["peak_extra_memory"]

_CLEAR_REFS = Path("/proc/self/clear_refs")

Arguments = Mapping[str, Any]


def peak_extra_memory(
    target: str, cases: Sequence[Arguments], *, warm_up: Arguments, device: str = "cpu"
) -> list[int | None]:
    """Most bytes that one call holds beyond its inputs, its result included, for every case.

    On the CPU each case runs in a fresh process that has called nothing but the warm-up: one
    process imports, and forks one for each case. Elsewhere than on Linux the peaks are None.

    Args:
        target: "module:function" in this folder; it builds the inputs and returns the call.
        cases: keyword arguments of the target, JSON-able.
        warm_up: what a case takes over to become a tiny first call that loads libraries.
    """
    if device == "cuda":
        return [_peak_on_cuda(_resolve(target)(**case)) for case in cases]
    request = json.dumps({"target": target, "cases": list(cases), "warm_up": warm_up})
    command = [sys.executable, str(Path(__file__).resolve()), request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {target} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


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
    _CLEAR_REFS.write_text("5")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _peaks(target: str, cases: Sequence[Arguments], warm_up: Arguments) -> list[int | None]:
    if not os.access(_CLEAR_REFS, os.W_OK):
        return [None] * len(cases)
    build = _resolve(target)
    peaks: list[int | None] = []
    for case in cases:  # no thread runs yet, so that a fork is a whole process
        read_end, write_end = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(write_end, str(_peak_here(build, case, warm_up)).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as stream:
            answer = stream.read()
        os.waitpid(child, 0)
        if not answer:
            raise RuntimeError(f"the process of {dict(case)} ended without an answer")
        peaks.append(int(answer))
    return peaks


if __name__ == "__main__":
    print(json.dumps(_peaks(**json.loads(sys.argv[1]))))
