"""CONTRIBUTING.md's list of the files that an op touches, against the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastfuse.backends
from fastfuse.ops import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = "upsample_argmax"
# Shared by ops, not of one: who calls ops is no concern of theirs.
ABOVE = (
    "fastfuse/conversion",
    "fastfuse/nn",
    "fastfuse/heads",
    "fastfuse/models",
    "tests",
    "docs",
    "benchmarks/results",
)


def table(title: str) -> list[str]:
    """The files of a table of "Every file that an op touches"."""
    _, _, section = PAGE.partition("### Every file that an op touches")
    (rows,) = re.findall(rf"^\| {title} \| \|\n\|---\|---\|\n((?:\|.*\n)+)", section, re.M)
    return re.findall(r"^\| `([^`]+)` \|", rows, re.M)


OWN, LINES = table("its own"), table("a line or two in")
COMPOSED = [op for op in OPERATIONS if (ROOT / f"fastfuse/ops/{op}/kernel.py").exists()]
BLOCKS = [op for op in OPERATIONS if op.endswith("ced_block")]
KERNELS = ("triton.py", ".h", ".cpp", "tests/triton/test_NAME.py")
LINES_OF_KERNELS = (
    "CMakeLists.txt",
    "benchmarks/gpu_cases.py",
    "tests/triton/test_offline.py",
)


def test_as_many_as_the_text_says() -> None:
    words = {10: "ten", 12: "Twelve"}
    assert f"{words[len(OWN)]} files of its own and a line or two in {words[len(LINES)]}" in PAGE
    assert set(BLOCKS) < set(COMPOSED)


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_op_has_its_files(op: str) -> None:
    for file in OWN:
        if op in COMPOSED and file.endswith(KERNELS):
            continue
        if op in BLOCKS and file.endswith(("autograd.py", "/test_NAME.py")):  # of both
            continue
        path = ROOT / file.replace("NAME", op)
        if file.startswith("docs/") and op in BLOCKS:
            path = ROOT / "docs" / "ced_block.md"
        assert path.exists(), path


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_op_is_named_where_it_has_a_line(op: str) -> None:
    for file in LINES:
        if op in COMPOSED and file in LINES_OF_KERNELS:
            continue
        assert re.search(rf"\b(bench_)?{op}\b", (ROOT / file).read_text(encoding="utf-8")), file


def test_nothing_else_names_the_example() -> None:
    """Below the modules that call ops."""
    known = {file.replace("NAME", EXAMPLE) for file in (*OWN, *LINES)}
    patterns = ("*.py", "fastfuse/**/*.py", "csrc/**/*.*", "benchmarks/*.py", "*.txt", "*.toml")
    for pattern in (*patterns, "Makefile", "MANIFEST.in"):
        for path in ROOT.glob(pattern):
            name = path.relative_to(ROOT).as_posix()
            if name in known or name.startswith(ABOVE):
                continue
            text = path.read_text(encoding="utf-8")
            assert not re.search(rf"\b{EXAMPLE}\b", text), f"{name} is not in the list"


def test_what_a_backend_touches_is_there() -> None:
    _, _, section = PAGE.partition("## How to add a backend")
    section = section.partition("\n## ")[0]
    for name in ("DISPATCH_KEYS", "_REFUSALS"):
        assert name in section
        assert set(getattr(fastfuse.backends, name)) == {"cpu", "cuda", "triton"}
    for file in re.findall(r"`((?:fastfuse|tests)/\w[\w/]*\.py)`", section):
        assert (ROOT / file).exists(), file


def test_files_that_are_named_are_there() -> None:
    pages = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for file in re.findall(r"`((?:fastfuse|csrc|tests|benchmarks)/[\w/]+\.\w+)`", text):
            if "NAME" not in file:
                assert (ROOT / file).exists(), f"{page.name}: {file}"


def test_lines_are_short() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "docs/index.md"):
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            assert len(line) < 100 or line.startswith("|"), f"{page}: {line}"
