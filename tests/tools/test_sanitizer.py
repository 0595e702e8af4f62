"""The tests that walk memory, on a build with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import sys

import pytest
import sanitizer


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)
def test_sanitizers_find_nothing() -> None:
    """On this processor's fastest instruction set; ``make test-sanitize`` has all it can run."""
    isas = sanitizer.supported_isas()
    family = isas[-1].partition("_")[0]  # avx512_bf16 has kernels of bfloat16 alone
    fastest = [isa for isa in isas if isa.startswith(family)]
    result = sanitizer.run(["-m", "walks_memory and not slow"], fastest)
    assert result.returncode == 0, "see the sanitizer's report above"
