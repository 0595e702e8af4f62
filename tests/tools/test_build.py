"""setup.py: what it asks CMake for; CMakeLists.txt: which builds have CUDA kernels."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools.dist import Distribution
from torch.utils.cpp_extension import include_paths

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
  *) {} ;;
esac
"""


def _make_nvcc(folder: Path, otherwise: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC.format(otherwise), encoding="utf-8")
    nvcc.chmod(0o755)
    return nvcc


runs_scripts = pytest.mark.skipif(sys.platform != "linux", reason="runs a shell script")


Configure = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """CMake with these definitions, in a folder of this test."""
    pybind11 = pytest.importorskip("pybind11")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None:
        pytest.skip("needs cmake and ninja")
    usual = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}

    def run(**definitions: str) -> subprocess.CompletedProcess[str]:
        options = [f"-D{name}={value}" for name, value in {**usual, **definitions}.items()]
        return subprocess.run(
            [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", *options],
            env={**os.environ, "PATH": path, "CUDA_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return run


@runs_scripts
def test_an_nvcc_that_does_not_compile(configure: Configure, tmp_path: Path) -> None:
    """It may know no compiler as new as the host's: then there are kernels of CPUs alone."""
    nvcc = _make_nvcc(tmp_path, 'echo "unsupported GNU version" >&2; exit 1')
    without = configure(FASTFUSE_CUDA="auto")
    assert without.returncode == 0, without.stderr
    assert f"fastfuse: without CUDA kernels: expected {nvcc} to compile" in without.stdout
    assert "unsupported GNU version" in without.stdout
    assert configure(FASTFUSE_CUDA="ON").returncode != 0
    assert "expected auto, ON or OFF; got maybe" in configure(FASTFUSE_CUDA="maybe").stderr


@runs_scripts
@pytest.mark.parametrize(
    ("capabilities", "ptx"),
    [("80;90a;100", {"80"}), ("90a;100;80", {"100"}), ("90a", set())],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ptx_is_what_other_gpus_compile(
    configure: Configure, tmp_path: Path, capabilities: str, ptx: set[str]
) -> None:
    _make_nvcc(tmp_path, "exit 0")
    made = configure(FASTFUSE_CUDA="ON", FASTFUSE_CUDA_ARCHS=capabilities)
    assert made.returncode == 0, made.stderr
    commands = (tmp_path / "build" / "build.ninja").read_text(encoding="utf-8")
    assert set(re.findall(r"code=compute_(\w+)", commands)) == ptx
    assert set(re.findall(r"code=sm_(\w+)", commands)) == set(capabilities.split(";"))


def test_instruction_sets(configure: Configure) -> None:
    """``native`` is what this processor has, whatever the installed module was built for."""
    native = configure(FASTFUSE_CUDA="OFF", FASTFUSE_ISAS="native")
    assert native.returncode == 0, native.stderr
    (found,) = re.findall(r"fastfuse: for (\S+), which this processor has", native.stdout)
    assert found.split(";")[0] == "portable"
    if sys.platform == "linux" and platform.machine() == "x86_64":
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\nflags", 1)[1].split()
        named = {"avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512_bf16"}
        assert found.split(";")[1:] == [isa for flag, isa in named.items() if flag in flags]
    unknown = configure(FASTFUSE_CUDA="OFF", FASTFUSE_ISAS="portable;sse9")
    assert unknown.returncode != 0
    assert "expected native or some of" in unknown.stderr
    assert "sse9" in unknown.stderr


@pytest.mark.slow
def test_every_instruction_set_compiles(configure: Configure, tmp_path: Path) -> None:
    """Development builds leave out what this processor has not."""
    include = ";".join(include_paths())
    done = configure(FASTFUSE_CUDA="OFF", FASTFUSE_TORCH_INCLUDE=include)
    assert done.returncode == 0, done.stderr
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or "ninja"
    commands = (tmp_path / "build" / "build.ninja").read_text(encoding="utf-8")
    vectors = re.findall(r"^build (fastfuse_simd_\w+): phony", commands, re.MULTILINE)
    assert len(vectors) == (4 if platform.machine() in ("x86_64", "AMD64") else 1)
    built = subprocess.run(
        [ninja, "-C", str(tmp_path / "build"), *vectors], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout
    assert "warning:" not in built.stdout
