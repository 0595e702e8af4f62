"""Builds of the compiled module besides the installed one, which FASTFUSE_EXTENSION names.

``python tests/support/native.py`` builds AVX-512's kernels for this processor, which may have none
(csrc/cpu/emulated_avx512.h), and prints where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(kind: str, isas: Sequence[str], **wanted: str) -> Path:
    """The path of the module for these instruction sets; rebuilt only where sources changed.

    Args:
        kind: names the folder, beside the sets.
        wanted: variables for setup.py.
    """
    out = ROOT / "build" / "-".join((kind, *isas))
    usual = {"FASTFUSE_SANITIZE": "", "FASTFUSE_EMULATE_AVX512": "", "FASTFUSE_CUDA": "OFF"}
    environment = {**os.environ, **usual, "FASTFUSE_ISAS": ";".join(isas), **wanted}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(out)],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (module,) = (out / "fastfuse").glob("_C*.so")
    return module


if __name__ == "__main__":
    print(build("emulated", ("avx512", "avx512_bf16"), FASTFUSE_EMULATE_AVX512="1"))
