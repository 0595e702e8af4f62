"""Output where the terminal's encoding lacks characters, and text files whatever the locale's."""

from __future__ import annotations

import ast
import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastfuse
from fastfuse import cli
from fastfuse._terminal import spell_out

PACKAGE = Path(fastfuse.__file__).parent
BENCHMARKS = PACKAGE.parent / "benchmarks"
FILES = [*PACKAGE.rglob("*.py"), *BENCHMARKS.glob("*.py")]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"2 x 4 -> s^2 \\xe9 \\udce9 \\u2588"),
        ("latin-1", b"2 \xd7 4 -> s\xb2 \xe9 \\udce9 \\u2588"),
        ("utf-8", "2 × 4 → s² é \\udce9 █".encode()),
    ],
)
def test_text_in_any_encoding(
    encoding: str, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last but one is a byte of a file's name that is no UTF-8."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    spell_out()
    for stream in streams.values():
        print("2 × 4 → s² é \udce9 █", end="", file=stream, flush=True)
    assert all(s.buffer.getvalue() == expected for s in streams.values())


def test_streams_that_are_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    spell_out()


def test_only_encoding_is_spelled_out() -> None:
    spell_out()
    with pytest.raises(UnicodeDecodeError):
        b"\xe9".decode("ascii", "fastfuse.spelled_out")
    assert codecs.lookup_error("fastfuse.spelled_out")


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["info", "--shape", "1x64x32x32"], 0, "what runs on 1x64x32x32"),
        (["verify", "--op", "upsample_add", "--backend", "reference"], 0, "verify: upsample_add"),
        (["calibrate", "modèle:f", "--data", ".", "--output", "é.json"], 2, "at least 2 images"),
        (["bench", "--op", "×"], 2, "invalid choice: 'x'"),
    ],
)
def test_commands_in_ascii(
    arguments: list[str], code: int, shown: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    try:
        stopped = cli.main(arguments)
    except SystemExit as stop:  # argparse's
        stopped = stop.code
    assert stopped == code
    printed = ""
    for stream in streams:
        stream.flush()
        printed += stream.buffer.getvalue().decode("ascii")
    assert shown in printed


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([str(PACKAGE.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


def test_report_on_an_ascii_terminal(tmp_path: Path) -> None:
    """Files are written, in UTF-8, and the table is printed; the folder's name is not ASCII."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "Bilder für α"
    folder.mkdir()
    for i in range(2):
        image.radial_gradient("L").resize((32 + i, 40)).resize((32, 40)).save(folder / f"{i}.png")
    output = folder / "scale.png"
    arguments = ("report", "small_models:plain", "--data", str(folder), "--output", str(output))
    found = run("-m", "fastfuse", *arguments, PYTHONIOENCODING="ascii")
    assert found.returncode == 0, found.stderr
    printed = found.stdout.decode("ascii")
    assert "before -> after calibration" in printed
    assert " -> 1.000" in printed
    assert rf"2 images in {tmp_path}/Bilder f\xfcr \u03b1" in found.stderr.decode("ascii")
    branches = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["branches"]
    assert len(branches) == printed.count(" level ")


def test_a_table_that_cannot_be_printed_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the terminal, the report is there."""
    torch.set_num_threads(1)  # the model is too small for more
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    for i in range(2):
        image.radial_gradient("L").resize((32, 40 + i)).resize((32, 40)).save(tmp_path / f"{i}.png")
    output = tmp_path / "scale.svg"

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    options = ("--data", str(tmp_path), "--output", str(output))
    assert cli.main(["report", "small_models:plain", *options]) == 2
    assert output.exists()
    assert output.with_suffix(".json").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_text_is_written_in_utf8(file: Path) -> None:
    """Whatever the locale: every file that is written names its encoding."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function, mode = node.func, ""
        name = getattr(function, "attr", getattr(function, "id", ""))
        if name in ("open", "fdopen"):
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            mode = next((c for c in constants if isinstance(c, str) and c in "rwaxb+"), "r")
        writes = name == "write_text" or any(letter in mode for letter in "wax")
        if writes and "b" not in mode:
            assert "encoding" in {k.arg for k in node.keywords}, f"{file.name}:{node.lineno}"


def prints_tables(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return "Console(" in text and "__main__" in text


@pytest.mark.parametrize("file", [*filter(prints_tables, FILES)], ids=lambda f: f.name)
def test_commands_spell_out(file: Path) -> None:
    """Those of the benchmarks have a main each."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert ast.unparse(main.body[0]) == "spell_out()"
