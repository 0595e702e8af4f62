"""The benchmark harness: it must refuse to time what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
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
import bench_ced_block  # noqa: E402
import bench_cednet  # noqa: E402
import bench_depthwise_conv2d  # noqa: E402
import bench_fusion_conv2d  # noqa: E402
import bench_heads  # noqa: E402
import bench_lr_ced_block  # noqa: E402
import bench_models  # noqa: E402
import bench_tap_sum  # noqa: E402
import bench_upsample_add  # noqa: E402
import bench_upsample_equalize_concat  # noqa: E402
import block_stages  # noqa: E402
import ced_blocks  # noqa: E402
import fusion_stages  # noqa: E402
import measure  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import whole  # noqa: E402

BLOCKS = (bench_ced_block, bench_lr_ced_block)
SUITES = (
    *BLOCKS,
    bench_depthwise_conv2d,
    bench_fusion_conv2d,
    bench_tap_sum,
    bench_upsample_add,
    bench_upsample_equalize_concat,
)


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
        (lambda x: (x, _ours().flatten() + 1), "differ in tensor 1"),
    ],
)
def test_wrong_results_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    ours = measure.Variant("fastfuse", lambda: (_ours(), _ours().flatten()), rival=False)
    with pytest.raises(MismatchError, match=message):
        measure.check_agreement([ours, _variant(change)], [1e-6, 1e-6])


def test_what_is_known_to_be_wrong_is_recorded() -> None:
    def variant(change: Callable[[Tensor], Tensor], name: str) -> measure.Variant:
        call = lambda: (_ours(), change(_ours()))  # noqa: E731
        return measure.Variant(name, call, rival=name != "fastfuse", unreliable={1: "gradient"})

    def check(*changes: Callable[[Tensor], Tensor]) -> dict[str, str]:
        variants = [variant(c, f"rival {i}") for i, c in enumerate(changes)]
        wrong: dict[str, str] = {}
        usable, _ = measure.check_agreement(
            [variant(lambda x: x, "fastfuse"), *variants], [1e-6, 1e-6], None, wrong
        )
        assert len(usable) == 1 + len(changes)
        return wrong

    found = check(lambda x: x, lambda x: 2 * x)
    assert found == {"rival 1": "wrong gradient, relative error 1.0e+00"}
    with pytest.raises(MismatchError, match="tensor 1 is"):
        check(lambda x: x[:1])


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
    quick = ("UPerNet", "UPer fusion", "64 to 128, 3x3", "192x64x64, 7x7", "512x25x40")
    for cell in quick:
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
            if suite in BLOCKS:
                assert len(set(cell.ours)) == len(cell.ours)
                assert all(layout in suite.LAYOUTS for _, layout in cell.ours)


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
        *(
            (suite, mode)
            for suite in (bench_depthwise_conv2d, bench_fusion_conv2d, bench_upsample_add)
            for mode in ("forward", "forward + backward")
        ),
        *((bench_tap_sum, m) for m in ("forward", "backward")),
    ],
)
def test_builders_agree(suite: ModuleType, layout: str, dtype: str, mode: str) -> None:
    variants = [
        measure.Variant(name, suite.build(name, layout, "tiny", dtype, mode), layout)
        for name in ("fastfuse", "eager")
    ]
    cell = suite.Cell("tiny", dtype, mode, ())
    if suite is bench_tap_sum:
        tolerances = [suite._tolerance(cell)]
    else:
        device = () if suite is bench_upsample_add else ("cpu",)
        tolerances = suite._tolerances(cell, *device)
        assert len(tolerances) == len(measure._tensors(variants[0].call()))
    usable, _ = measure.check_agreement(variants, tolerances)
    assert len(usable) == 2


@pytest.mark.parametrize(
    ("suite", "shape", "mode"),
    [
        (bench_heads, "UPerHead 64x64", whole.BOTH),
        (bench_heads, "SepASPPHead 64x64", whole.FORWARD),
        (bench_models, "PSPNet ResNet-50 64x64", whole.FORWARD),
        (bench_cednet, "RetinaNet 64x64", whole.FORWARD),
        (bench_cednet, "backbone 64x64", whole.BOTH),
        (bench_cednet, "UPerNet 64x64", whole.BOTH),
    ],
)
def test_whole_heads_and_models_agree(
    monkeypatch: pytest.MonkeyPatch, suite: ModuleType, shape: str, mode: str
) -> None:
    monkeypatch.setattr(bench_heads, "SIZES", {"64x64": (64, 64)})
    monkeypatch.setattr(bench_models, "IMAGE", (64, 64))
    cell = whole.Cell(shape, "float32", mode)
    names = (whole.OURS, *getattr(suite, "RIVALS", (whole.PLAIN,)))
    layouts = (*whole.LAYOUTS, whole.CHANNELS_LAST)
    variants = [
        measure.Variant(n, suite.build(n, layout, shape, "float32", mode), layout)
        for n, layout in zip(names, layouts, strict=False)
    ]
    usable, _ = measure.check_agreement(variants, whole.tolerances(cell))
    assert len(usable) == len(names)


def test_quick_cells_of_whole_heads_and_models() -> None:
    for suite in (bench_heads, bench_models, bench_cednet):
        every, quick = suite.cells(False, "fresh", "cpu"), suite.cells(True, "fresh", "cpu")
        assert set(quick) < set(every)
        assert len(set(map(str, every))) == len(every)
        assert suite.cells(False, "warm", "cpu") == []


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", ced_blocks.DTYPES)
@pytest.mark.parametrize("suite", BLOCKS)
def test_blocks_agree(suite: ModuleType, dtype: str, mode: str) -> None:
    block = suite.SHAPES["tiny"]
    ours = ced_blocks._every(ced_blocks.OURS, ced_blocks.KEEPING)
    cell = suite.Cell("tiny", dtype, mode, ced_blocks._every(*ced_blocks.EAGER), ours)
    variants = ced_blocks._variants(block, cell, "cpu")
    tolerances = ced_blocks.tolerances(block, cell)
    assert len(tolerances) == len(measure._tensors(variants[0].call()))
    wrong: dict[str, str] = {}
    usable, left_out = measure.check_agreement(variants, tolerances, None, wrong)
    assert len(usable) == len(variants) == 8
    assert not left_out
    assert not wrong


def test_bytes_that_blocks_keep() -> None:
    def kept(suite: ModuleType, name: str, mode: str = "forward + backward") -> float:
        """Of the image's."""
        call = suite.build(name, "channels_last", "tiny", "float32", mode)
        of_image: int = call.x.nbytes
        return measure.kept_bytes(call, call.parameters) / of_image

    assert kept(bench_ced_block, "fastfuse", "forward") == 0
    for suite, more in ((bench_ced_block, 6), (bench_lr_ced_block, 9)):
        assert kept(suite, "fastfuse") == 1
        assert kept(suite, "fastfuse, recompute=False") == more
    # x, the convolution's, the norm's, two of the hidden width, the MLP's, a mean and a deviation
    assert kept(bench_ced_block, "eager, linear") == 12 + 2 / 8
    assert kept(bench_ced_block, "eager, 1x1 conv") == 12 + 2 / 8


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
def test_conventional_flops_are_those_of_the_ops(mode: str) -> None:
    for suite, shape in ((bench_ced_block, "352x32x32"), (bench_lr_ced_block, "512x25x40")):
        arguments = ("fastfuse", "channels_last", shape, "float32", mode)
        counted = measure.count_flops(lambda a=arguments, s=suite: s.build(*a))
        assert ced_blocks.conventional_flops(suite.SHAPES[shape], mode) == counted
    passes = 1 if mode == "forward" else 3
    flops = bench_depthwise_conv2d.conventional_flops("192x64x64, 7x7", mode)
    assert flops == passes * 2 * 49 * 192 * 64 * 64


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
            "peak_bytes": None, "kept_bytes": None, "wrong": "",
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


def test_report_shows_every_way_what_it_keeps_and_what_is_wrong() -> None:
    cell = _cell("block", "main", 1e8)
    ours, eager = cell["variants"]
    keeping = ours | {"title": "keeping", "name": "fastfuse, recompute=False", "median_ms": 1.0}
    cell["variants"] = [
        ours | {"kept_bytes": 1 << 20},
        keeping | {"kept_bytes": 6 << 20},
        eager | {"wrong": "wrong gradient"},
    ]
    cell["ours"] = "keeping"
    details, summary = report.tables([cell], {"float32": 100.0})
    assert [row[-1] for row in details.rows] == ["1.00", "6.00", "", ""]
    assert details.columns[-1] == "kept for backward MiB"
    assert [row[1] for row in details.rows][2] == "eager (wrong gradient)"
    position = summary.columns.index("over eager")
    assert [(row[0].partition("forward")[2], row[position]) for row in summary.rows] == [
        ("", "1.50x, whose result is wrong"),
        (", recompute=False", "3.00x, whose result is wrong"),
    ]


@pytest.mark.parametrize("suite", BLOCKS)
def test_stages_of_a_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suite: ModuleType
) -> None:
    shape = dataclasses.replace(suite.SHAPES["tiny"], channels=64, height=16, width=16)
    monkeypatch.setitem(suite.SHAPES, "small", shape)
    passes = block_stages.stages(suite, "small", "float32", rounds=2)
    forward = passes.pop("forward")
    assert set(passes) == {"backward", "backward, recompute"}
    assert forward.pop("its weight's gradient") == 0
    assert forward.pop("sums") >= 0
    for spent in (forward, *passes.values()):
        assert all(milliseconds > 0 for milliseconds in spent.values()), spent
    spent = {("a block", name): spent for name, spent in passes.items()}
    assert block_stages.table(spent).row_count == 2
    block_stages.plot(spent, tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 10_000


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
