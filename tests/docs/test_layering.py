"""Imports point one way: bilinear <- reference <- ops <- nn <- heads, models <- the rest."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastfuse

PACKAGE = Path(fastfuse.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = ["ops", "nn", "heads", "models"]  # each may import those before it
ABOVE_ALL = {"cli", "verify", "calibration"}
FOUNDATION = {"_extension", "backends"}  # may import nothing above; anyone may import them


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports when it is imported itself."""
    names = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    return {name for name in imported(path) if name.split(".")[0] == "fastfuse"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in LAYERS:
        above = {*LAYERS[LAYERS.index(parts[0]) + 1 :], *ABOVE_ALL}
    elif parts[0] in FOUNDATION:
        above = {*LAYERS, *ABOVE_ALL}
    else:
        return
    for name in own(path):
        inner = name.removeprefix("fastfuse.").split(".")[0]
        assert inner not in above, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.name == "triton.py" or p.name.endswith("_triton.py")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_kernel_files_import_only_torch_triton_and_what_they_share(path: Path) -> None:
    allowed = {"torch", "triton", "collections", "__future__", "functools", "math", "typing"}
    for name in imported(path):
        shared = name.startswith("fastfuse.ops.") and "_triton" in name
        assert name.split(".")[0] in allowed or shared, f"{path.name} imports {name}"


def test_files_stay_readable() -> None:
    """Python files over 400 lines and kernel files over 600 are split."""
    root = PACKAGE.parent
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in (root / "csrc").rglob("*.*"):
        assert len(path.read_text().splitlines()) <= 600, path
