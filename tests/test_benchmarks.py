"""The benchmark harness: it must refuse to time what is wrong."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfuse.verify import MismatchError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_fusion_conv2d  # noqa: E402
import bench_tap_sum  # noqa: E402
import bench_upsample_equalize_concat  # noqa: E402
import fusion_stages  # noqa: E402
import measure  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402

SUITES = (bench_fusion_conv2d, bench_tap_sum, bench_upsample_equalize_concat)


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
    for cell in ("UPerNet", "UPer fusion", "64 to 128, 3x3"):
        assert f"{cell}, float32, forward" in run.stdout


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_cells_are_distinct_and_their_shapes_known(
    suite: ModuleType, device: str, quick: bool
) -> None:
    of_regime = [suite.cells(quick, regime, device) for regime in measure.REGIMES]
    assert of_regime[0]
    for cells in of_regime:
        assert len(set(map(str, cells))) == len(cells)
        for cell in cells:
            assert cell.shape in suite.SHAPES
            assert len(set(cell.rivals)) == len(cell.rivals)
            assert all(layout in suite.LAYOUTS for _, layout in cell.rivals)


def test_regimes_without_cells_are_skipped() -> None:
    arguments = argparse.Namespace(device="cpu", quick=True)
    suite = BENCHMARKS / "bench_fusion_conv2d.py"
    assert report._regimes(suite, arguments) == ["fresh"]
    arguments.device = "cuda"
    assert report._regimes(suite, arguments) == ["fresh"]


@pytest.mark.parametrize("layout", bench_fusion_conv2d.LAYOUTS)
@pytest.mark.parametrize("dtype", bench_fusion_conv2d.DTYPES)
@pytest.mark.parametrize(
    ("suite", "mode"),
    [
        *((bench_fusion_conv2d, m) for m in ("forward", "forward + backward")),
        *((bench_tap_sum, m) for m in ("forward", "backward")),
    ],
)
def test_builders_agree(suite: ModuleType, layout: str, dtype: str, mode: str) -> None:
    variants = [
        measure.Variant(name, suite.build(name, layout, "tiny", dtype, mode), layout)
        for name in ("fastfuse", "eager")
    ]
    cell = suite.Cell("tiny", dtype, mode, ())
    if suite is bench_fusion_conv2d:
        tolerances = suite._tolerances(cell, "cpu")
        assert len(tolerances) == len(measure._tensors(variants[0].call()))
    else:
        tolerances = [suite._tolerance(cell)]
    usable, _ = measure.check_agreement(variants, tolerances)
    assert len(usable) == 2


def test_flops_are_those_of_a_variant_itself() -> None:
    cell = bench_fusion_conv2d.Cell("SegFormer", "float32", "forward")
    flops = bench_fusion_conv2d._flops(cell, "cpu")
    side, channels = 128, 768
    assert flops["eager"] == 2 * side**2 * 4 * channels * channels
    levels = sum((side >> i) ** 2 for i in range(4))
    products = 2 * levels * channels * channels
    assert products < flops["fastfuse"] < 1.01 * products  # and the sums of the taps
    assert flops["compiled"] == flops["eager"]


def _cell(op: str, series: str, work: float | None) -> dict[str, Any]:
    def variant(name: str, milliseconds: float) -> dict[str, Any]:
        return {
            "title": name, "name": name, "layout": "", "rival": name != "fastfuse",
            "median_ms": milliseconds, "iqr_ms": 0.1, "speedup": milliseconds / 2, "gbs": 1.0,
            "share": 0.25, "gflops": None if work is None else work / milliseconds / 1e6,
            "peak_bytes": None,
        }  # fmt: skip

    return {
        "op": op, "shape": "a shape", "dtype": "float32", "mode": "forward", "series": series,
        "regime": "fresh", "ours": "fastfuse", "left_out": {"compiled": "no compiler"},
        "bytes": 10**6, "flops": work, "copy_gbs": 4.0,
        "variants": [variant("fastfuse", 2.0), variant("eager", 3.0)],
    }  # fmt: skip


def test_report_shows_flops_where_they_are_counted(tmp_path: Path) -> None:
    rates = {"float32": 100.0}
    cells = [
        _cell(op, series, work)
        for op, work in (("moves", None), ("multiplies", 1e8))
        for series in ("main", "growth")
    ]
    tables = {table.title: table for table in report.tables(cells, rates)}
    for title, table in tables.items():
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert ("of the GEMM rate" in table.columns) == title.startswith("multiplies"), title
    details = tables["multiplies, memory: fresh"]
    shares = [row[details.columns.index("of the GEMM rate")] for row in details.rows]
    assert shares == ["50 %", "33 %", ""]
    (growth,) = (t for title, t in tables.items() if "per multiply-add" in title)
    assert growth.rows[0][2:] == ["0.050", "2.00", "40.0", "50 %"]

    about = {
        "gemm_gflops": rates, "copy_gbs": 4.0, "name": "a CPU", "threads": 1,
        "versions": {"torch": "2"}, "date": "2026-01-01",
    }  # fmt: skip
    picture = tmp_path / "report.png"
    assert plot.draw({"cells": cells, "environment": about}, picture)
    assert picture.stat().st_size > 10_000


def test_stages_of_a_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    small = bench_fusion_conv2d.Fusion(bench_fusion_conv2d._pyramid(64, 16, 16, levels=2), 64)
    monkeypatch.setitem(bench_fusion_conv2d.SHAPES, "small", small)
    stages = fusion_stages.stages("small", "float32", rounds=2)
    assert set(stages) == set(fusion_stages.STAGES)
    assert all(milliseconds > 0 for milliseconds in stages.values())


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
