"""The benchmark harness: it must refuse to time what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastfuse.verify import MismatchError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import measure  # noqa: E402


def _ours() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def _variant(change: Callable[[Tensor], Tensor], **options: object) -> measure.Variant:
    return measure.Variant("rival", lambda: change(_ours()), **options)


OURS = measure.Variant("fastfuse", _ours, rival=False)


def _spoil(x: Tensor, value: float) -> Tensor:
    x[1, 2, 3, 3] = value
    return x


def test_equal_results_are_timed() -> None:
    usable, left_out = measure.check_agreement([OURS, _variant(lambda x: x)], [1e-6])
    assert len(usable) == 2
    assert not left_out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 1.001, "differ in tensor 0: relative error"),
        (lambda x: _spoil(x, float("nan")), "relative error inf"),
        (lambda x: _spoil(x, 0.9), "relative error"),
        (lambda x: x[:1], r"tensor 0 is torch.float32 \(1, 3, 4, 4\)"),
        (lambda x: x.double(), "tensor 0 is torch.float64"),
    ],
)
def test_wrong_results_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        measure.check_agreement([OURS, _variant(change)], [1e-6])


def test_something_must_be_comparable() -> None:
    with pytest.raises(MismatchError, match="nothing was checked"):
        measure.check_agreement([OURS, _variant(lambda x: x, differs="by definition")], [1e-6])


def test_an_optional_rival_may_be_missing_and_no_other() -> None:
    def broken(x: Tensor) -> Tensor:
        raise OSError("no compiler")

    variants = [OURS, _variant(lambda x: x), _variant(broken, layout="slow", optional=True)]
    _, left_out = measure.check_agreement(variants, [1e-6])
    assert left_out == {"rival, slow": "OSError: no compiler"}
    with pytest.raises(OSError, match="no compiler"):
        measure.check_agreement([OURS, _variant(broken)], [1e-6])


@pytest.mark.parametrize("options", [["--quick"], []])
def test_every_suite_can_be_collected(options: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-o", "python_files=bench_*.py"]
    run = subprocess.run(
        [*command, "--collect-only", "-q", *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "UPerNet, float32, forward" in run.stdout


def test_paper_figure(tmp_path: Path) -> None:
    figure = tmp_path / "figure3.png"
    command = [sys.executable, str(BENCHMARKS / "paper_figure3.py"), "--out", str(figure)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "r = 8" in run.stdout
    assert figure.stat().st_size > 10_000


def test_gpu_script_is_sound() -> None:
    script = BENCHMARKS / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    usage = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "usage:" in usage.stderr
