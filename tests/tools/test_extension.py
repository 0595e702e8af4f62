"""The compiled module: stable ABI only, and no code shared between instruction sets."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfuse import _extension

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)"),
    pytest.mark.skipif(_extension.module is None, reason=f"no module: {_extension.failure}"),
]


def symbols(path: Path | str, *options: str) -> dict[str, str]:
    """name -> the letter nm gives it"""
    listing = subprocess.run(
        ["nm", *options, str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in listing.splitlines():
        *_, letter, name = line.rsplit(maxsplit=2)
        found[name.split("@")[0]] = letter
    return found


def test_only_the_stable_abi_of_torch_is_used() -> None:
    assert _extension.module is not None
    undefined = set(symbols(_extension.module.__file__, "-D", "--undefined-only"))
    from_torch = set()
    for library in (Path(torch.__file__).parent / "lib").glob("lib*.so"):
        if library.name.startswith(("libtorch", "libc10")):
            from_torch |= undefined & set(symbols(library, "-D", "--defined-only"))
    standard = {name for name in from_torch if re.match(r"_Z(NK?S|St|TIS|TS)", name)}
    stable = {name for name in from_torch if re.match(r"(aoti_)?torch_\w+$", name)}
    assert stable, "expected calls into torch's C shim"
    assert from_torch == stable | standard, sorted(from_torch - stable - standard)
    mangled = {name for name in undefined if re.search(r"^_Z.*(N3c10|N2at|N5torch)", name)}
    assert not mangled, sorted(mangled)


def vector_objects() -> list[Path]:
    root = Path(_extension.__file__).parents[1]
    found = root.glob("build/py*/CMakeFiles/fastfuse_simd_*.dir/**/*_simd.cpp.o")
    return sorted(path for path in found if "sanitize" not in str(path))


@pytest.mark.skipif(not vector_objects(), reason="no build folder: installed from a wheel")
def test_vector_bodies_share_no_symbols() -> None:
    """A weak symbol in AVX-512 code might be the one the linker keeps for every processor."""
    for path in vector_objects():
        external = {n: letter for n, letter in symbols(path).items() if letter in "WVu"}
        assert not external, f"{path.name}: {external}"
        isa = re.search(r"fastfuse_simd_(\w+)\.dir", str(path))
        assert isa is not None
        defined = [n for n, letter in symbols(path, "--defined-only").items() if letter.isupper()]
        assert defined
        assert all(isa[1] in name for name in defined), defined
