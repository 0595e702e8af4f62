"""The tests that walk memory, on a build with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import platform
import shutil
import sys

import pytest
import sanitizer

WALKS = (
    "definition or strides or written or empty or guards or any_levels or any_image or streaming"
)


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)
def test_sanitizers_find_nothing() -> None:
    """On two instruction sets, of 256 bits and of 512; ``make test-sanitize`` has all."""
    arguments = ["-s", "-k", WALKS, "-m", "not slow", *sanitizer.TESTS]
    x86 = platform.machine() in ("x86_64", "AMD64")
    result = sanitizer.run(arguments, isas=("avx2", "avx512_bf16") if x86 else ())
    assert result.returncode == 0, "see the sanitizer's report above"
