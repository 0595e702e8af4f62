"""Choosing a backend: refusals with reasons, fallbacks that are logged, environment variables."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import ISAS

import fastfuse
from fastfuse import BackendError, _extension, backend, backends, upsample_equalize_concat
from fastfuse.ops import OPERATIONS, define


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


CALL = (
    "import torch, fastfuse\n"
    "x = torch.randn(1, 2, 4, 4, requires_grad=True)\n"
    "fastfuse.upsample_equalize_concat([x], size=(8, 8)).sum().backward()\n"
    "print(fastfuse.info())\n"
)


def test_backend_nests_and_restores() -> None:
    assert backends.requested_backend() == "auto"
    with backend("cpu"):
        with backend("reference"):
            assert backends.requested_backend() == "reference"
        assert backends.requested_backend() == "cpu"
        with pytest.raises(ZeroDivisionError), backend("reference"):
            raise ZeroDivisionError
        assert backends.requested_backend() == "cpu"
    assert backends.requested_backend() == "auto"


def test_backend_decorates() -> None:
    @backend("reference")
    def requested() -> str:
        return backends.requested_backend()

    assert requested() == "reference"
    assert requested() == "reference"
    assert backends.requested_backend() == "auto"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .*; got 'fast'"):
        backend("fast")


def test_backends_may_be_left_in_any_order() -> None:
    """As two threads do."""
    first, second = backend("cpu"), backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert backends.requested_backend() == "reference"
    second.__exit__()
    assert backends.requested_backend() == "auto"


def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, op = torch.randn(1, 2, 4, 4), "upsample_equalize_concat"
    with (
        backend("triton"),
        pytest.raises(
            BackendError,
            match=rf"{op}: backend 'triton' cannot run: expected CUDA tensors, got cpu",
        ),
    ):
        upsample_equalize_concat([x])
    only_cpu = OPERATIONS[op].op
    monkeypatch.setattr(only_cpu, "backends", ("cpu",))
    with (
        backend("triton"),
        pytest.raises(
            BackendError, match=rf"{op}: backend 'triton' cannot run: expected one of its backends"
        ),
    ):
        upsample_equalize_concat([x])
    with backend("cpu"), pytest.raises(BackendError, match="expected CPU tensors, got meta"):
        upsample_equalize_concat([x.to("meta")])


def test_fallback_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_extension, "module", None)
    monkeypatch.setattr(_extension, "failure", "ImportError: some missing symbol")
    monkeypatch.setattr(backends, "_logged", set())
    x = torch.randn(1, 2, 4, 4)
    with caplog.at_level(logging.WARNING, logger="fastfuse"):
        for _ in range(3):
            upsample_equalize_concat([x])
    (record,) = caplog.records
    assert "runs on the reference backend" in record.message
    assert "some missing symbol" in record.message
    with backend("cpu"), pytest.raises(BackendError, match="some missing symbol"):
        upsample_equalize_concat([x])


def test_info() -> None:
    info = fastfuse.info()
    assert info.backend_of("upsample_equalize_concat", "cpu") == "cpu"
    assert info.isa in info.supported_isas
    text = str(info)
    assert torch.__version__ in text
    assert "triton: expected CUDA tensors, got cpu" in text


def test_works_without_the_compiled_module() -> None:
    run = python(CALL, FASTFUSE_EXTENSION="/nowhere/_C.so")
    assert run.returncode == 0, run.stderr
    assert "upsample_equalize_concat on cpu: reference" in run.stdout
    assert "/nowhere/_C.so" in run.stdout  # the loader's own words
    assert run.stderr.count("runs on the reference backend") == 1


def test_a_broken_compiled_module_shows_the_loaders_words(tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not an ELF file")
    run = python(CALL, FASTFUSE_EXTENSION=str(broken))
    assert run.returncode == 0, run.stderr
    assert "invalid ELF header" in run.stdout or "file too short" in run.stdout
    assert "source tree" not in run.stdout


def test_a_source_tree_that_hides_what_was_installed(tmp_path: Path) -> None:
    """What its clone's folder imports after ``pip install .``."""
    package = Path(fastfuse.__file__).parent
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(package, tmp_path / "fastfuse", ignore=ignored)
    (tmp_path / "csrc").mkdir()
    alone = (  # without the finder of an editable installation
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
    )
    run = python(alone + CALL, FASTFUSE_EXTENSION="")
    assert run.returncode == 0, run.stderr
    assert f"imported from the source tree {tmp_path}: leave it" in run.stdout


def test_environment_chooses_the_backend() -> None:
    run = python(CALL, FASTFUSE_BACKEND="reference")
    assert "backend: reference" in run.stdout
    assert "upsample_equalize_concat on cpu: reference" in run.stdout
    run = python(CALL, FASTFUSE_BACKEND="fastest")
    assert run.returncode != 0
    assert "FASTFUSE_BACKEND: expected one of auto, reference, cpu" in run.stderr


def test_environment_chooses_the_instruction_set() -> None:
    run = python(CALL, FASTFUSE_ISA=ISAS[0])
    assert f"instruction set: {ISAS[0]}" in run.stdout
    run = python(CALL, FASTFUSE_ISA="avx1024")
    assert run.returncode != 0
    assert "FASTFUSE_ISA: expected an instruction set of this processor and build" in run.stderr
    assert "got 'avx1024'" in run.stderr


def test_set_isa_refuses() -> None:
    assert _extension.module is not None
    with pytest.raises(ValueError, match=r"set_isa: expected an instruction set .*; got 'sse9'"):
        _extension.module.set_isa("sse9")


def test_cuda_runs_every_op_of_tritons() -> None:
    """In Triton where it has no kernel of its own: a model asks for one backend."""
    for operation in OPERATIONS.values():
        gpus = [name for name in operation.backends if name != "cpu"]
        assert gpus == (["cuda", "triton"] if gpus else [])
    assert vars(define._STEPS["cuda"]).keys() == vars(define._STEPS["triton"]).keys()
