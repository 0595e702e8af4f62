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
    isas = sanitizer.supported_isas()[-1:]
    result = sanitizer.run(["-m", "walks_memory and not slow"], isas)
    assert result.returncode == 0, "see the sanitizer's report above"
