"""Tensors of tests that walk memory lie between pages that nobody may touch.

Where guarded_memory.cpp is preloaded, as the Makefile does on Linux, an access behind one ends the
process, and pytest names the test. Elsewhere nothing is guarded.

``python tests/support/guarded_memory.py PATH`` builds what is to be preloaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def switch() -> Callable[[bool], None] | None:
    """Turns guards on or off for memory that is asked for from now on; None: not preloaded."""
    return getattr(ctypes.CDLL(None), "fastfuse_guard_memory", None)


@contextmanager
def guarded(wanted: bool) -> Iterator[None]:
    turn = switch() if wanted else None
    if turn is None:
        yield
        return
    turn(True)
    try:
        yield
    finally:
        turn(False)


def build(path: Path) -> None:
    """What is to be preloaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, "-o", str(path), str(SOURCE)], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
