"""setup.py: what it asks CMake for."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parents[2]


def _configuration(monkeypatch: pytest.MonkeyPatch, build: Path) -> list[str]:
    pytest.importorskip("pybind11")
    commands: list[list[str]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    namespace: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    command = namespace["CMakeBuild"](Distribution({"name": "fastfuse", "version": "0"}))
    command.build_lib, command.extensions = str(build), []
    command.build_extension(setuptools.Extension("fastfuse._C", sources=[]))
    return commands[0]


def test_capabilities_of_an_earlier_build_are_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`make test` builds for one, `make wheel` for all, in the same folder."""
    name = "FASTFUSE_CUDA_ARCHS"
    monkeypatch.setenv(name, "90a")
    some = _configuration(monkeypatch, tmp_path)
    assert some.index(f"-U{name}") < some.index(f"-D{name}=90a")
    monkeypatch.delenv(name)
    every = _configuration(monkeypatch, tmp_path)
    assert f"-U{name}" in every
    assert not any(argument.startswith(f"-D{name}") for argument in every)
