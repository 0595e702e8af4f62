"""Accesses behind memory and after its life end the process; before it, writes, and whole pages."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import guarded_memory
import pytest
import torch

SEGFAULT = -signal.SIGSEGV
START = """
import ctypes, json, os, torch
from guarded_memory import guarded
torch.set_num_threads(1)  # a process that forks has no threads
def read(address): ctypes.c_char.from_address(address).value
with guarded(True):
    tensors = [torch.ones(n) for n in (1, 5, 1023, 1024, 1025, 100_000) for _ in range(4)]
x = tensors[4]
page = next(t for t in tensors if t.numel() == 1024)  # as long as one
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
with guarded(True): scratch = libc.aligned_alloc(64, 128)
statuses = {}
for name, code in ACCESSES.items():
    child = os.fork()
    if child == 0:
        exec(code)
        os._exit(0)
    statuses[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""
ACCESSES = {
    "inside": ("for t in tensors: read(t.data_ptr()); read(t.data_ptr() + 4 * t.numel() - 1)", 0),
    **{
        f"behind {i}": (f"read(tensors[{i}].data_ptr() + 4 * tensors[{i}].numel())", SEGFAULT)
        for i in range(24)
    },
    "before a page": ("read(page.data_ptr() - 1)", SEGFAULT),
    "written before": (
        "ctypes.c_char.from_address(x.data_ptr() - 3).value = 0; tensors[4] = x = None",
        -signal.SIGABRT,
    ),
    "after": ("address = x.data_ptr(); tensors[4] = x = None; read(address)", SEGFAULT),
    "twice": ("libc.free(scratch); libc.free(scratch)", -signal.SIGABRT),
    "a kernel's": ("read(scratch + 128)", SEGFAULT),
    "inside of it": ("read(scratch); read(scratch + 127); libc.free(scratch)", 0),
    "fresh": ("with guarded(True): assert torch.empty(100).isnan().all()", 0),
    # More than all addresses, beside tensors that stay where they are.
    "again": (
        "with guarded(True):\n"
        "  for i in range(5): torch.empty(1 << 27)\n"
        "  again = [torch.zeros(1000) for _ in range(100)]\n"
        "assert all((t == 1).all() for t in tensors) and all((t == 0).all() for t in again)",
        0,
    ),
    "too large": ("with guarded(True): x = torch.empty(1 << 30); read(x.data_ptr())", 0),
    "off": ("assert torch.ones(5).data_ptr() % 64 == 0", 0),
}


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None or mmap.PAGESIZE != 4096,
    reason="needs g++ on Linux with pages of 4 KiB",
)
def test_accesses(tmp_path: Path) -> None:
    library = tmp_path / "guarded_memory.so"
    guarded_memory.build(library)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": str(guarded_memory.SOURCE.parent),
    }
    codes = {name: code for name, (code, _) in ACCESSES.items()}
    run = subprocess.run(
        [sys.executable, "-c", f"ACCESSES = {codes!r}\n{START}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {name: status for name, (_, status) in ACCESSES.items()}


def test_what_is_preloaded_is_used() -> None:
    preloaded = "guarded_memory" in os.environ.get("LD_PRELOAD", "")
    assert (guarded_memory.switch() is not None) == preloaded


@pytest.mark.walks_memory
@pytest.mark.skipif(
    guarded_memory.switch() is None or mmap.PAGESIZE != 4096, reason="no guards: see make test"
)
def test_marked_tests_are_guarded() -> None:
    assert torch.empty(100).isnan().all()


@pytest.mark.skipif(guarded_memory.switch() is None, reason="no guards: see make test")
def test_others_are_not() -> None:
    assert all(torch.empty(5).data_ptr() % 64 == 0 for _ in range(8))
