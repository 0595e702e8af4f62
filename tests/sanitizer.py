"""Builds the compiled module with sanitizers and runs the CPU tests on it.

``python tests/sanitizer.py [pytest arguments]``; exit code as pytest's. Any invalid access or
undefined behaviour aborts the run with the sanitizer's report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "upsample_equalize_concat",
        "upsample_equalize_concat_errors",
        "upsample_add",
        "upsample_add_errors",
        "tap_sum",
        "tap_sum_machinery",
        "tap_sum_errors",
        "depthwise_conv2d",
        "depthwise_conv2d_errors",
        "pointwise",
        "ced_block",
        "ced_block_errors",
        "nn",
        "golden",
    )
]
# Inductor compiles code of its own, and peak memory means nothing with redzones around it.
DESELECT = "not compile and not export and not peak and not without_the_compiled and not broken"


def build(isas: Sequence[str] = ()) -> Path:
    """The path of the sanitized module; rebuilt only where sources changed.

    ``isas``: the instruction sets whose vector bodies are sanitized; none: all, which takes twice
    as long.
    """
    out = ROOT / "build" / "sanitize"
    sanitize = {"FASTFUSE_SANITIZE": "address,undefined", "FASTFUSE_SANITIZE_ISAS": ";".join(isas)}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(out)],
        cwd=ROOT,
        env={**os.environ, **sanitize},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (module,) = (out / "fastfuse").glob("_C*.so")
    return module


def environment(module: Path) -> dict[str, str]:
    compiler = os.environ.get("CXX", "g++")
    # The C++ library too: libasan looks for its __cxa_throw when it is loaded.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "FASTFUSE_EXTENSION": str(module),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run(arguments: list[str], isas: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", DESELECT]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment(build(isas)), text=True, check=False
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:] or ["-m", "not slow", *TESTS]).returncode)
