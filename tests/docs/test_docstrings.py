"""Every example in a public docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastfuse

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(fastfuse.__path__, "fastfuse.")
    if not name.endswith(("__main__", "._C", "._CUDA", "triton"))
]


@pytest.mark.parametrize("name", ["fastfuse", *MODULES])
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", [n for n in fastfuse.__all__ if n != "nn"])
def test_public_names_are_documented(name: str) -> None:
    assert getattr(fastfuse, name).__doc__, name
