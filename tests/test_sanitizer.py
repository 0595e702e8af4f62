"""The tests that walk memory, on a build with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

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
    result = sanitizer.run(["-s", "-k", WALKS, "-m", "not slow", *sanitizer.TESTS])
    assert result.returncode == 0, "see the sanitizer's report above"
