"""setup.py: what it asks CMake for; CMakeLists.txt: which builds have CUDA kernels."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
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


NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *) echo "unsupported GNU version" >&2; exit 1 ;;
esac
"""


@pytest.mark.skipif(sys.platform != "linux", reason="runs a shell script")
def test_an_nvcc_that_does_not_compile(tmp_path: Path) -> None:
    """It may know no compiler as new as the host's: then there are kernels of CPUs alone."""
    pybind11 = pytest.importorskip("pybind11")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None:
        pytest.skip("needs cmake and ninja")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC, encoding="utf-8")
    nvcc.chmod(0o755)

    def configure(with_cuda: str) -> subprocess.CompletedProcess[str]:
        definitions = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTFUSE_CUDA": with_cuda,
        }
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        return subprocess.run(
            [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", *options],
            env={**os.environ, "PATH": path, "CUDA_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    without = configure("auto")
    assert without.returncode == 0, without.stderr
    assert f"fastfuse: without CUDA kernels: expected {nvcc} to compile" in without.stdout
    assert "unsupported GNU version" in without.stdout
    assert configure("ON").returncode != 0
    assert "expected auto, ON or OFF; got maybe" in configure("maybe").stderr
