"""docs/index.md against the source: pages, ops, who calls whom, what is shared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastfuse.ops import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INDEX = (DOCS / "index.md").read_text(encoding="utf-8")
OPS = ROOT / "fastfuse" / "ops"
Edge = tuple[str, str]

if not OPS.exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)


def diagram() -> str:
    (found,) = re.findall(r"```mermaid\n(.*?)```", INDEX, re.S)
    return found


def kernels(op: str) -> dict[str, str]:
    """A room's source, less what is no kernel's: definitions and samples."""
    files = (p for p in (OPS / op).glob("*.py") if p.name not in ("reference.py", "samples.py"))
    return {path.name: path.read_text() for path in files}


def calls(source: str) -> set[str]:
    """The ops that it calls: as its steps, of PyTorch's, or by the ``Op`` of another room."""
    found = set(re.findall(r"\b(?:ops|steps_of\([\w.\[\]]+\))\.(?:fastfuse\.)?(\w+)\(", source))
    for room, names in re.findall(
        r"^from fastfuse\.ops\.(\w+)\.autograd import (.*)", source, re.M
    ):
        if re.match(r"(forward|backward)\b", names):
            found.add(room)
    return found


def op_of(name: str) -> str | None:
    """The public op that ``name``, such as its backward, belongs to."""
    found = [op for op in OPERATIONS if re.fullmatch(rf"{op}(_into|_keeping|_backward\w*)?", name)]
    return max(found, key=len, default=None)


def edges_of_the_source() -> set[Edge]:
    called = {(op, op_of(n)) for op in OPERATIONS for s in kernels(op).values() for n in calls(s)}
    return {(op, other) for op, other in called if other is not None and other != op}


def test_every_page_is_linked() -> None:
    pages = {path.name for path in DOCS.glob("*.md")} - {"index.md"}
    _, _, table = INDEX.partition("## All pages")
    assert set(re.findall(r"\]\((\w+\.md)\)", table)) == pages


def test_every_op_is_in_the_diagram() -> None:
    assert set(re.findall(r"\b\w+_\w+\b|\btap_sum\b", diagram())) == set(OPERATIONS)


def test_arrows_of_the_diagram_are_the_calls_of_the_source() -> None:
    arrows = re.findall(r"^\s*(\w+) -->(?:\|[^|]*\|)? (\w+)$", diagram(), re.M)
    assert len(arrows) == len(set(arrows)) == diagram().count("-->")
    assert set(arrows) == edges_of_the_source()


def includes(path: Path) -> set[Path]:
    """Headers of csrc that a file includes, and what these include."""
    names = re.findall(r'#include "((?:cpu|cuda)/.*?)"', path.read_text(encoding="utf-8"))
    direct = {ROOT / "csrc" / name for name in names}
    return direct.union(*(includes(header) for header in direct))


def users(shared: Path) -> set[str]:
    if shared.suffix == ".h":
        end = {"cpu": "_simd.cpp", "cuda": ".cu"}[shared.parent.name]
        bodies = {op: shared.with_name(f"{op}{end}") for op in OPERATIONS}
        return {op for op, body in bodies.items() if body.exists() and shared in includes(body)}
    module = f"fastfuse.ops.{shared.stem} import"
    return {
        op
        for op in OPERATIONS
        for name, source in kernels(op).items()
        if name.endswith(("cuda.py", "triton.py")) and module in source
    }


@pytest.mark.parametrize(
    ("file", "ops"), re.findall(r"^\| `([\w/]+\.\w+)` \| [^|]* \| ([\w, ]+) \|$", INDEX, re.M)
)
def test_what_is_shared_is_shared_by_these(file: str, ops: str) -> None:
    assert ops.split(", ") == sorted(users(ROOT / file))


def test_files_that_are_named_are_there() -> None:
    named = set(re.findall(r"\b(?:fastfuse|csrc|tests)/[\w/]*(?:\.\w+|/)", INDEX))
    assert len(named) > 15
    for name in named:
        of_ops = [name.replace("NAME", op) for op in OPERATIONS] if "NAME" in name else [name]
        assert any((ROOT / path).exists() for path in of_ops), name


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), *ROOT.glob("*.md")], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To files that are there, and in Markdown to headings that are."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Those of headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
