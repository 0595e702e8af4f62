"""Builds the compiled module with sanitizers and runs the tests that walk memory on it.

``python tests/support/sanitizer.py [pytest arguments]``; exit code as pytest's. Any invalid access
or undefined behaviour aborts the run with the sanitizer's report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import native

from fastfuse import _extension


def build(isas: Sequence[str]) -> Path:
    return native.build("sanitize", isas, FASTFUSE_SANITIZE="address,undefined")


def environment(module: Path) -> dict[str, str]:
    compiler = os.environ.get("CXX", "g++")
    # The C++ library too: libasan looks for its __cxa_throw when it is loaded.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    inherited = {name: value for name, value in os.environ.items() if name != "FASTFUSE_ISA"}
    return {
        **inherited,
        "FASTFUSE_EXTENSION": str(module),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run(arguments: Sequence[str], isas: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments]
    if not any((native.ROOT / word.partition("::")[0]).exists() for word in arguments):
        # Only these files: to collect all tests takes a minute here.
        tests = (native.ROOT / "tests").rglob("test_*.py")
        command += [
            str(path) for path in tests if "mark.walks_memory" in path.read_text(encoding="utf-8")
        ]
    env = environment(build(isas))
    return subprocess.run(command, cwd=native.ROOT, env=env, text=True, check=False)


def supported_isas() -> list[str]:
    assert _extension.module is not None, _extension.failure
    return _extension.module.supported_isas()


if __name__ == "__main__":
    sys.exit(run(["-m", "walks_memory", *sys.argv[1:]], supported_isas()).returncode)
