"""The tests that walk memory, on a build with the address and undefined-behaviour sanitizers.

Everywhere else they run between guard pages (guarded_memory.py), which see accesses too.
"""

from __future__ import annotations

import shutil
import sys

import pytest
import sanitizer


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)
def test_sanitizers_find_nothing() -> None:
    """On this processor's fastest instruction set; ``make test-sanitize`` has all it can run."""
    isas = sanitizer.supported_isas()
    family = isas[-1].partition("_")[0]  # avx512_bf16 has kernels of bfloat16 alone
    fastest = [isa for isa in isas if isa.startswith(family)]
    # float16 is as wide as bfloat16 and walked alike.
    definition = "tests/ops/test_contracts.py::test_equals_the_definition"
    without = [f"--deselect={definition}[{isa}-float16" for isa in fastest]
    result = sanitizer.run(["-m", "walks_memory and not slow", *without], fastest)
    assert result.returncode == 0, "see the sanitizer's report above"
