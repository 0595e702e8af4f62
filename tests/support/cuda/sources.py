"""CUDA C++ sources and what is compiled of them, kept under .cache/ by what they say."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from workers import alone, write

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / ".cache" / "cuda"
EMULATOR = Path(__file__).resolve().parent
# Where "cuda/NAME" of an include is looked for; examples of the tests are in the second.
INCLUDES = (ROOT / "csrc", EMULATOR.parent)

Texts = dict[str, str]  # of files, by the name that includes have for them
Edit = Callable[[Texts], Texts]


class MissingCompilerError(Exception):
    """Why nothing can be compiled here."""


def nvcc() -> Path:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise MissingCompilerError("needs nvcc, of CUDA 12.8 or later; it is not on the PATH")
    return Path(found)


def include_directory() -> Path:
    """Of the CUDA headers."""
    for directory in (nvcc().resolve().parents[1], Path("/usr/local/cuda")):
        if (directory / "include" / "cuda_bf16.h").exists():
            return directory / "include"
    raise MissingCompilerError("needs the headers of CUDA beside nvcc; there is no cuda_bf16.h")


def _read(name: str) -> str | None:
    for directory in INCLUDES:
        if (path := directory / name).exists():
            return path.read_text(encoding="utf-8")
    return None


def _closure(name: str) -> Texts:
    """A file and those it includes."""
    texts: Texts = {}
    names = [name]
    while names:
        if (name := names.pop()) in texts:
            continue
        text = _read(name)
        if text is None:
            raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, INCLUDES))}")
        texts[name] = text
        names += re.findall(r'#include "(cuda/[^"]+)"', text)
    return texts


def _hash(*said: object) -> str:
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


@cache
def _version(compiler: str | Path) -> str:
    command = [str(compiler), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile(command: Sequence[str | Path], directory: Path, name: str, also: str = "") -> Path:
    """Runs a command that ends in "-o"; ``also`` is what it reads besides."""
    words = list(map(str, command))
    made = directory / f"{_hash(words, _version(words[0]), also)}-{name}"
    if made.exists():
        return made
    with alone(made):
        if made.exists():  # another process was quicker
            return made
        partial = made.with_name(f"{made.name}.{os.getpid()}")
        result = subprocess.run([*words, str(partial)], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}:\n{result.stdout}{result.stderr}")
        partial.replace(made)
    return made


@dataclass(frozen=True)
class Program:
    """A .cu file of csrc/cuda or of the tests, maybe edited, and all it includes."""

    name: str
    edit: Edit = field(default=dict)
    flags: tuple[str, ...] = ()

    @cached_property
    def texts(self) -> Texts:
        return self.edit(_closure(f"cuda/{self.name}.cu"))

    @cached_property
    def directory(self) -> Path:
        """Has the sources as they are compiled, and what was made of them."""
        directory = CACHE / f"{self.name}-{_hash(sorted(self.texts.items()))}"
        for name, text in self.texts.items():
            if not (path := directory / "source" / name).exists():
                write(path, text)
        return directory

    @property
    def _file(self) -> Path:
        return self.directory / "source" / "cuda" / f"{self.name}.cu"

    def library(self) -> Path:
        """Emulated by the CPU."""
        emulator = "".join(p.read_text(encoding="utf-8") for p in sorted(EMULATOR.glob("*.h")))
        command: list[str | Path] = [
            os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g1", "-fPIC", "-fno-gnu-unique",
            "-fno-threadsafe-statics", "-fsanitize=thread", "-Wno-unknown-pragmas",
            "-DFASTFUSE_EMULATED", f"-I{self.directory / 'source'}", f"-I{EMULATOR}",
            "-isystem", include_directory(), *self.flags, "-x", "c++", "-c", self._file, "-o",
        ]  # fmt: skip
        made = _compile(command, self.directory, "emulated.o", emulator)
        # Not the sanitizer's own library: the checker has its hooks.
        command = [command[0], "-shared", "-Wl,-Bsymbolic", made, "-o"]
        return _compile(command, self.directory, "emulated.so")

    def _nvcc(self, kind: str, arch: str) -> Path:
        command: list[str | Path] = [
            nvcc(), "-std=c++17", "-O3", f"-I{self.directory / 'source'}", *self.flags,
            f"-arch={arch}", f"-{kind}", self._file, "-o",
        ]  # fmt: skip
        return _compile(command, self.directory, f"{arch}.{kind}")

    def ptx(self, arch: str) -> str:
        return self._nvcc("ptx", arch).read_text(encoding="utf-8")

    def cubin(self, arch: str) -> Path:
        return self._nvcc("cubin", arch)
