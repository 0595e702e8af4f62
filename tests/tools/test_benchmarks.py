"""The benchmark harness: it must refuse to time what is wrong, and keep to its time."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_ced_block
import bench_cednet
import bench_depthwise_conv2d
import bench_fusion_conv2d
import bench_heads
import bench_lr_ced_block
import bench_models
import bench_overhead
import bench_tap_sum
import bench_upsample_add
import bench_upsample_argmax
import bench_upsample_cross_entropy
import bench_upsample_equalize_concat
import block_stages
import ced_blocks
import compact
import counts
import cuda_or_triton
import fusion_stages
import machine
import measure
import networks
import plan
import plot
import pytest
import rates
import regimes
import report
import torch
from agreement import Agreement, check_agreement
from cell import DTYPES, FORWARD, LAYOUTS, Cell, every, variants_of
from peak_memory import of_variants
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from variants import BY_TRITON, EXACT, Variant, tensors

import fastfuse
from fastfuse.ops import OPERATIONS
from fastfuse.ops.policy import policy_of, use_policy
from fastfuse.verify import MismatchError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BLOCKS = (bench_ced_block, bench_lr_ced_block)
SUITES = (
    *BLOCKS,
    bench_depthwise_conv2d,
    bench_fusion_conv2d,
    bench_tap_sum,
    bench_upsample_add,
    bench_upsample_argmax,
    bench_upsample_cross_entropy,
    bench_upsample_equalize_concat,
)


def _ours() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def _variant(change: Callable[[Tensor], Tensor], **options: object) -> Variant:
    return Variant("rival", lambda: change(_ours()), **options)


OURS = Variant("fastfuse", _ours, rival=False)


def _spoil(x: Tensor, value: float) -> Tensor:
    x[1, 2, 3, 3] = value
    return x


def test_equal_results_are_timed() -> None:
    found = check_agreement([OURS, _variant(lambda x: x)], {"output": 1e-6})
    assert len(found.usable) == 2
    assert not found.left_out
    assert not found.wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 1.001, "differ in output: relative error"),
        (lambda x: _spoil(x, float("nan")), "relative error inf"),
        (lambda x: _spoil(x, 0.9), "relative error"),
        (lambda x: x[:1], r"output is torch.float32 \(1, 3, 4, 4\)"),
        (lambda x: x.double(), "output is torch.float64"),
        (lambda x: (x, _ours().flatten() + 1), "differ in gradient"),
    ],
)
def test_wrong_results_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    ours = Variant("fastfuse", lambda: (_ours(), _ours().flatten()), rival=False)
    with pytest.raises(MismatchError, match=message):
        check_agreement([ours, _variant(change)], {"output": 1e-6, "gradient": 1e-6})


def _check_against_float64(rival: float, ours: float) -> Agreement:
    """Of two tensors; the second one's values are that many times the truth."""

    def variant(name: str, factor: float) -> Variant:
        call = lambda: (_ours(), factor * _ours())  # noqa: E731
        return Variant(name, call, rival=name != "fastfuse")

    def exact() -> tuple[Tensor, Tensor]:
        return _ours().double(), _ours().double()

    variants = [variant("fastfuse", ours), variant("rival", rival)]
    return check_agreement(variants, {"output": 1e-4, "gradient": 1e-4}, exact)


def test_float64_decides_who_is_wrong() -> None:
    found = _check_against_float64(rival=2, ours=1.00001)
    assert len(found.usable) == 2
    assert found.wrong == {"rival": "wrong gradient, 1.0e+00 off float64 and fastfuse 1.0e-05"}
    message = "fastfuse: gradient is 1.00e-01 > 1.00e-04 off float64, rival 0.00e"
    with pytest.raises(MismatchError, match=message):
        _check_against_float64(rival=1, ours=1.1)
    # Each within the tolerance of the truth, on either side of it.
    assert not _check_against_float64(rival=1 + 9e-5, ours=1 - 9e-5).wrong


def test_float64_does_not_excuse_fastfuse() -> None:
    other = Variant("fastfuse", lambda: _ours() * 1.1, "other layout", rival=False)
    with pytest.raises(MismatchError, match="fastfuse, other layout and fastfuse differ"):
        check_agreement([OURS, other], {"output": 1e-6}, lambda: _ours().double())


def test_something_must_be_comparable() -> None:
    with pytest.raises(MismatchError, match="nothing was checked"):
        check_agreement([OURS, _variant(lambda x: x, differs="by definition")], {"output": 1e-6})


def test_rivals_that_convolve_are_there_twice_on_a_gpu() -> None:
    """Once by the algorithms that cuDNN times, whose setting is as it was afterwards."""
    seen: list[tuple[str, bool]] = []

    def build(name: str, *_: Any) -> Callable[[], Tensor]:
        return lambda: seen.append((name, torch.backends.cudnn.benchmark)) or torch.ones(1)

    cell = Cell("a shape", "float32", FORWARD, every("eager", "compiled", layouts=LAYOUTS[:1]))
    before = torch.backends.cudnn.benchmark
    for variant in variants_of(cell, build, "cuda", convolves=True):
        variant.call()
        assert torch.backends.cudnn.benchmark == before
    assert seen == [("fastfuse", False)] * 2 + [
        ("eager", False), ("eager", True), ("compiled", False),
    ]  # fmt: skip
    assert len(variants_of(cell, build, "cpu", convolves=True)) == 4


def test_ours_are_measured_without_cuda_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a CUDA library; Triton's time over its is what the policy follows."""
    cell = Cell("a shape", "float32", FORWARD, every("eager"))

    def build(*_: Any) -> Callable[[], str]:
        return fastfuse.backends.requested_backend

    assert not [v for v in variants_of(cell, build, "cuda") if v.name.endswith(BY_TRITON)]
    monkeypatch.setattr(fastfuse._cuda, "library", object())
    ours = [v for v in variants_of(cell, build, "cuda") if not v.rival]
    assert [v.call() for v in ours] == ["auto", "auto", "triton", "triton"]
    times = [
        {"name": v.name, "layout": v.layout, "rival": False, "median_ms": time}
        for v, time in zip(ours, (1.0, 2.0, 3.0, 1.0), strict=True)
    ]
    measured = {**dataclasses.asdict(cell), "op": "an op", "variants": times}
    found = cuda_or_triton.ratios([measured])
    assert [ratio for _, _, ratio in found] == [3.0, 0.5]


def test_a_gpu_has_sixteen_images_of_a_block() -> None:
    for suite, device in product(BLOCKS, ("cpu", "cuda")):
        of_op = suite.cells(quick=True, regime="fresh", device=device)
        batches = {suite.SHAPES[cell.shape].batch for cell in of_op if cell.shape != "tiny"}
        assert batches == {16 if device == "cuda" else 1}


def test_an_optional_rival_may_be_missing_and_no_other() -> None:
    def broken(x: Tensor) -> Tensor:
        raise OSError("no compiler")

    variants = [OURS, _variant(lambda x: x), _variant(broken, layout="slow", optional=True)]
    found = check_agreement(variants, {"output": 1e-6})
    assert found.left_out == {"rival, slow": "OSError: no compiler"}
    with pytest.raises(OSError, match="no compiler"):
        check_agreement([OURS, _variant(broken)], {"output": 1e-6})


def test_every_suite_can_be_collected() -> None:
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-o", "python_files=bench_*.py"]
    run = subprocess.run(
        [*command, "--collect-only", "-q", "--quick"], capture_output=True, text=True, check=False
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
    of_regime = [suite.cells(quick, regime, device) for regime in regimes.REGIMES]
    assert of_regime[0]
    for cells in of_regime:
        assert len(set(map(str, cells))) == len(cells)
        for cell in cells:
            assert cell.shape in suite.SHAPES
            assert len(set(cell.rivals)) == len(cell.rivals)
            assert all(layout in LAYOUTS for _, layout in cell.rivals)
            if suite in BLOCKS:
                assert len(set(cell.ours)) == len(cell.ours)
                assert all(layout in LAYOUTS for _, layout in cell.ours)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs is Linux's")
def test_peaks_of_a_suite_that_pytest_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports files of this folder as parts of the project: ``benchmarks.bench_tap_sum``."""

    def build(**_: Any) -> None:
        raise AssertionError("it is to be imported by the process of its own")

    suite = bench_upsample_add
    build.__module__, build.__name__ = f"benchmarks.{suite.__name__}", suite.build.__name__
    cell = suite.Cell("tiny", "float32", FORWARD)
    peaks = of_variants(build, cell, {"shape": "tiny"}, "cpu")
    (peak,) = peaks([Variant("fastfuse", lambda: None, "contiguous")])
    assert peak is not None


def test_regimes_without_cells_are_skipped() -> None:
    arguments = argparse.Namespace(device="cpu", quick=True)
    suite = BENCHMARKS / "bench_fusion_conv2d.py"
    assert report._regimes(suite, arguments) == ["fresh"]
    arguments.device = "cuda"
    assert report._regimes(suite, arguments) == ["fresh"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("suite", "mode"),
    [
        *(
            (suite, mode)
            for suite in (bench_depthwise_conv2d, bench_fusion_conv2d, bench_upsample_add)
            for mode in ("forward", "forward + backward")
        ),
        *((bench_tap_sum, m) for m in ("forward", "backward")),
        *((bench_upsample_cross_entropy, m) for m in ("forward", "forward + backward")),
        (bench_upsample_argmax, "forward"),
    ],
)
def test_builders_agree(suite: ModuleType, layout: str, dtype: str, mode: str) -> None:
    variants = [
        Variant(name, suite.build(name, layout, "tiny", dtype, mode), layout)
        for name in ("fastfuse", "eager")
    ]
    cell = Cell("tiny", dtype, mode, ())
    device = ("cpu",) if suite is bench_fusion_conv2d else ()
    tolerances = suite._tolerances(cell, *device)
    exact = suite.build(EXACT, layout, "tiny", dtype, mode)
    compared = suite.chosen(cell) if suite is bench_upsample_argmax else None
    results = tensors(compared(exact()) if compared else exact())
    assert len(tolerances) == len(results) == len(tensors(variants[0].call()))
    assert all(tensor.dtype == torch.float64 for tensor in results)
    assert len(check_agreement(variants, tolerances, exact, compared).usable) == 2


@pytest.mark.parametrize(
    ("suite", "shape", "mode"),
    [
        (bench_heads, "UPerHead 64x64", networks.TRAINING),
        (bench_heads, "SepASPPHead 64x64", FORWARD),
        (bench_models, "PSPNet ResNet-50 64x64", FORWARD),
        (bench_cednet, "RetinaNet 64x64", FORWARD),
        (bench_cednet, "backbone 64x64", networks.TRAINING),
        (bench_cednet, "UPerNet 64x64", networks.TRAINING),
    ],
)
def test_whole_heads_and_models_agree(
    monkeypatch: pytest.MonkeyPatch, suite: ModuleType, shape: str, mode: str
) -> None:
    monkeypatch.setattr(bench_heads, "SIZES", {"64x64": (64, 64)})
    monkeypatch.setattr(bench_models, "IMAGE", (64, 64))
    cell = Cell(shape, "float32", mode)
    names = (networks.OURS, *getattr(suite, "RIVALS", (networks.PLAIN,)))
    layouts = (*LAYOUTS, LAYOUTS[0])
    variants = [
        Variant(n, suite.build(n, layout, shape, "float32", mode), layout)
        for n, layout in zip(names, layouts, strict=False)
    ]
    assert len(check_agreement(variants, networks.tolerances(cell)).usable) == len(names)
    if mode == FORWARD:
        with FlopCounterMode(display=False) as counter:
            variants[0].call()
        assert counts.count_work(lambda: variants[0].call)[0] == counter.get_total_flops()


def test_labels_are_judged_by_the_values_of_their_classes() -> None:
    cell = Cell("tiny", "float32", "forward")
    call = bench_upsample_argmax.build("fastfuse", "contiguous", "tiny", "float32", "forward")
    ours = Variant("fastfuse", call, rival=False)

    def wrong() -> Tensor:
        labels = ours.call()
        labels[0, 3, 3] = (labels[0, 3, 3] + 1) % 8
        return labels

    judge = bench_upsample_argmax.chosen(cell)
    tolerances = bench_upsample_argmax._tolerances(cell)
    same = Variant("same", lambda: ours.call().clone())
    assert len(check_agreement([ours, same], tolerances, None, judge).usable) == 2
    with pytest.raises(MismatchError, match="values of the classes"):
        check_agreement([ours, Variant("wrong", wrong)], tolerances, None, judge)


def test_random_labels_of_the_loss() -> None:
    labels = bench_upsample_cross_entropy.labels("19, 90x120 to 360x480", "cpu")
    ignored = labels == bench_upsample_cross_entropy.IGNORED
    assert 0.09 < ignored.float().mean() < 0.11
    assert labels[~ignored].unique().tolist() == list(range(19))


def test_overhead_is_that_of_every_op() -> None:
    assert set(bench_overhead.SHAPES) == set(OPERATIONS)
    cells = bench_overhead.cells(False, "fresh", "cpu")
    assert {cell.shape for cell in cells if cell.mode == "forward"} == set(OPERATIONS)
    differentiable = {name for name, op in OPERATIONS.items() if op.differentiable}
    assert {cell.shape for cell in cells if cell.mode != "forward"} == differentiable
    assert bench_overhead.cells(True, "fresh", "cpu") == []
    for cell in cells:
        ours, eager = (
            tensors(bench_overhead.build(name, "contiguous", cell.shape, cell.dtype, cell.mode)())
            for name in ("fastfuse", "eager")
        )
        assert sum(tensor.numel() for tensor in ours) < 5000
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_quick_cells_of_whole_heads_and_models() -> None:
    for suite in (bench_heads, bench_models, bench_cednet):
        every, quick = suite.cells(False, "fresh", "cpu"), suite.cells(True, "fresh", "cpu")
        assert set(map(str, quick)) < set(map(str, every))
        assert len(set(map(str, every))) == len(every)
        assert suite.cells(False, "warm", "cpu") == []


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suite", BLOCKS)
def test_blocks_agree(suite: ModuleType, dtype: str, mode: str) -> None:
    block = suite.SHAPES["tiny"]
    ours = every(networks.OURS, ced_blocks.KEEPING)
    cell = Cell("tiny", dtype, mode, every(*ced_blocks.EAGER), ours)
    variants = variants_of(cell, suite.build, "cpu")
    tolerances = ced_blocks.tolerances(block, cell)
    assert len(tolerances) == len(tensors(variants[0].call()))
    exact = suite.build(EXACT, "contiguous", "tiny", dtype, mode)
    found = check_agreement(variants, tolerances, exact)
    assert len(found.usable) == len(variants) == 8
    assert not found.left_out


def test_bytes_that_blocks_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(
        suite: ModuleType, name: str, mode: str = "forward + backward", shape: str = "tiny"
    ) -> float:
        """Of the image's."""
        call = suite.build(name, "channels_last", shape, "float32", mode)
        of_image: int = call.x.nbytes
        return counts.kept_bytes(call, call.parameters) / of_image

    assert kept(bench_ced_block, "fastfuse", "forward") == 0
    for suite, more in ((bench_ced_block, 6), (bench_lr_ced_block, 9)):
        monkeypatch.setitem(suite.SHAPES, "wide", ced_blocks.BlockShape(8, 32, 32, dilation=3))
        assert kept(suite, "fastfuse", shape="wide") == 1
        assert kept(suite, "fastfuse") == more  # no more than parameters and gradients
        assert kept(suite, "fastfuse, recompute=False") == more
    # x, the convolution's, the norm's, two of the hidden width, the MLP's, a mean and a deviation
    assert kept(bench_ced_block, "eager, linear") == 12 + 2 / 8
    assert kept(bench_ced_block, "eager, 1x1 conv") == 12 + 2 / 8


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
def test_conventional_flops_are_those_of_the_ops(mode: str) -> None:
    for suite, shape in ((bench_ced_block, "352x32x32"), (bench_lr_ced_block, "512x25x40")):
        arguments = ("fastfuse", "channels_last", shape, "float32", mode)
        counted, _ = counts.count_work(lambda a=arguments, s=suite: s.build(*a))
        assert ced_blocks.conventional_flops(suite.SHAPES[shape], mode) == counted
    passes = 1 if mode == "forward" else 3
    flops = bench_depthwise_conv2d.conventional_flops("192x64x64, 7x7", mode)
    assert flops == passes * 2 * 49 * 192 * 64 * 64


def test_flops_are_those_of_a_variant_itself() -> None:
    cell = Cell("SegFormer", "float32", "forward")
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
            "peak_bytes": None, "kept_bytes": None, "wrong": "", "differs": "",
        }  # fmt: skip

    return {
        "op": op, "shape": "a shape", "dtype": "float32", "mode": "forward", "series": series,
        "regime": "fresh", "ours": "fastfuse", "left_out": {"compiled": "no compiler"},
        "bytes": 10**6, "flops": work, "copy_gbs": 4.0,
        "variants": [variant("fastfuse", 2.0), variant("eager", 3.0)],
    }  # fmt: skip


MACHINE = plan.MachineRates(copy_rate=1e10, gemm_rates={"float32": 1e11}, compile_s=4.0)


def _planned(
    key: str, suite: str, seconds: float, compiled: bool = False, rivals: int = 1
) -> plan.PlannedCell:
    variants = [plan.PlannedVariant("fastfuse", 0.01, rival=False)]
    variants += [plan.PlannedVariant(f"eager {i}", seconds) for i in range(rivals)]
    variants += [plan.PlannedVariant("compiled", 0.01, compiles=True)] * compiled
    return plan.PlannedCell(key, suite, tuple(variants), nbytes=10**6)


def _keys(cells: list[plan.PlannedCell], dropped: bool = False) -> list[str]:
    return [cell.key for cell in cells if bool(cell.dropped) == dropped]


def test_a_call_takes_what_its_flops_and_bytes_do() -> None:
    assert plan.call_s(2 * 10**11, 10**10, "float32", MACHINE) == 3


def test_cells_are_planned_in_turns() -> None:
    cells = [_planned(f"{suite}{i}", suite, 0.01) for suite in "ab" for i in range(3)]
    planned = plan.Plan(cells, MACHINE, 1000)
    assert _keys(planned.fit(0)) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert {cell.rounds for cell in planned.fit(0)} == {plan.MAX_ROUNDS}


def _estimated(cells: list[plan.PlannedCell], budget: float) -> tuple[list[str], plan.Plan]:
    """The cells that were estimated, and the plan."""
    asked: list[str] = []
    known = {cell.key: cell for cell in cells}

    def estimate(cell: plan.PlannedCell) -> plan.PlannedCell:
        asked.append(cell.key)
        return known[cell.key]

    unknown = [plan.PlannedCell(cell.key, cell.suite, (), nbytes=0) for cell in cells]
    found = plan.estimated(unknown, estimate, MACHINE, budget)
    assert sorted(cell.key for cell in found) == sorted(known)
    return asked, plan.Plan(found, MACHINE, budget)


def test_cells_that_cannot_come_to_their_turn_are_not_estimated() -> None:
    cells = [_planned(f"{suite}{i}", suite, 0.3) for suite in "ab" for i in range(40)]
    cells[1] = _planned("a1", "a", 60.0)  # over its share: takes none of the time, and no turn
    budget = 10.5 * cells[0].seconds(MACHINE)
    asked, planned = _estimated(cells, budget)
    assert asked[:6] == ["a0", "b0", "a1", "a2", "b1", "a3"]
    assert len(asked) == 1 + 20
    assert _keys(planned.fit(0)) == _keys(plan.Plan(cells, MACHINE, budget).fit(0))
    assert planned.fit(0)[-1].dropped.startswith("cells before it take more than the ")


def test_small_cells_after_large_ones_are_estimated() -> None:
    large = [_planned(f"a{i}", "a", 0.5, rivals=20) for i in range(4)]
    small = [_planned(f"a{i}", "a", 0.1) for i in range(4, 10)]
    budget = 1.5 * large[0].seconds(MACHINE)
    _, planned = _estimated(large + small, budget)
    assert _keys(planned.fit(0)) == ["a0", *(cell.key for cell in small)]


def test_a_rival_that_takes_more_than_its_share_is_left_out() -> None:
    slow, fast = _planned("a0", "a", 5.0), _planned("a1", "a", 0.01)
    quick = plan.PlannedVariant("quick", 0.01)
    mixed = plan.PlannedCell("b0", "b", (*slow.variants, quick), nbytes=1)
    planned = plan.Plan([slow, fast, mixed], MACHINE, 160).fit(0)
    assert _keys(planned) == ["a1", "b0"]  # what is dropped does not use up a turn
    assert [v.title for v in planned[1].variants] == ["fastfuse", "quick"]
    assert planned[1].left_out == {"eager 0": "would take 20 s, more than its share, 10 s"}
    assert planned[2].dropped == "every rival would take 20 s or more, over its share, 10 s"


def test_rounds_are_reduced_before_cells_are_dropped_and_compiled_rivals_before_cells() -> None:
    cells = [_planned(f"a{i}", "a", 0.4, compiled=True) for i in range(5)]
    least = [cell.without(["compiled"], "").seconds(MACHINE) for cell in cells]
    compiling = cells[0].seconds(MACHINE) - least[0]

    def fit(budget: float) -> list[plan.PlannedCell]:
        generous = plan.Plan(cells, MACHINE, 1000)  # whose share leaves no rival out
        return generous.fit(1000 - budget)

    everything = fit(900)
    assert all("compiled" in (v.title for v in cell.variants) for cell in everything)
    assert {cell.rounds for cell in everything} == {plan.MAX_ROUNDS}
    some = fit(sum(least) + 2.5 * compiling)
    assert [len(cell.variants) for cell in some] == [3, 3, 2, 2, 2]
    assert some[2].left_out == {"compiled": "no time was left to compile it"}
    assert {cell.rounds for cell in some} == {measure.MIN_ROUNDS}
    few = fit(sum(least) - 1)
    assert _keys(few) == ["a0", "a1", "a2", "a3"]
    assert few[4].dropped.startswith("would take ")


@pytest.mark.parametrize("pace", [0.3, 1.0, 2.0, 5.0])
def test_a_run_exceeds_its_budget_by_no_more_than_a_cell(pace: float) -> None:
    cells = [
        _planned(f"{suite}{i}", suite, 0.05 * (i + 1), compiled=i == 0)
        for suite in "abcde"
        for i in range(6)
    ]
    budget, now, longest, done = 100.0, 0.0, 0.0, []
    run = plan.Plan(cells, MACHINE, budget)
    for key in [cell.key for cell in run.cells]:
        cell = run.start(key, now)
        if cell.dropped:
            continue
        spent = pace * cell.seconds(MACHINE)
        run.finish(cell, spent)
        longest, now = max(longest, spent), now + spent
        done.append(key)
    assert now <= budget + longest
    assert done[:5] == ["a0", "b0", "c0", "d0", "e0"]
    assert now > 0.6 * budget or len(done) == len(cells)


def test_a_rivals_slower_layout_and_long_calls_have_no_rounds() -> None:
    def variant(name: str, layout: str = "", rival: bool = True) -> Variant:
        return Variant(name, _ours, layout, rival=rival)

    variants = [
        variant("fastfuse", rival=False), variant("eager", "a"), variant("eager", "b"),
        variant("eager", "c"), variant("slow"),
    ]  # fmt: skip
    seconds = [9.0, 1.0, 1.2, 2.0, 4.0]
    timed = [measure.Timed(v, s) for v, s in zip(variants, seconds, strict=True)]
    assert measure.too_long(timed, rival_s=10) == {
        "eager, c": "2.0 times as slow as its other layout when checked",
        "slow": "a call takes 4.0 s, and 3 rounds more than its share of the time, 10 s",
    }
    assert measure.too_long(timed[:2], rival_s=1) == {}


def test_quick_cells_begin_with_every_dtype_and_mode() -> None:
    for suite in SUITES:
        quick = suite.cells(True, "fresh", "cpu")
        ways = {(cell.dtype, cell.mode) for cell in quick if cell.shape != "tiny"}
        first = quick[: len(ways)]
        assert len(ways) in (2, 4)
        assert {(cell.dtype, cell.mode) for cell in first} == ways
        assert all(cell.shape != "tiny" for cell in first)


def test_work_of_a_suite_is_counted_and_not_done() -> None:
    cell = Cell("UPer fusion", "bfloat16", "forward")
    flops, nbytes = bench_fusion_conv2d.work("compiled", cell, "cpu")
    outputs, channels = 512 * 128**2, 2048
    assert flops == 2 * 9 * channels * outputs
    assert nbytes > 2 * 2 * (channels * 128**2 + outputs)


def test_rate_of_products_takes_no_longer_where_they_are_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def rate(device: str, dtype: torch.dtype, n: int, rounds: int) -> float:
        sizes.append(n)
        return flops_per_s

    monkeypatch.setattr(rates, "_gemm_rate", rate)
    for flops_per_s, largest in ((1e9, 256), (2e10, 1024), (2e11, 2048)):
        sizes.clear()
        assert rates.gemm_rate("cpu", torch.float32) == flops_per_s
        assert max(sizes) == largest


def test_compact_reports_can_be_loaded(tmp_path: Path) -> None:
    cell = _cell("op", "main", 3e8)
    cell["variants"][0]["median_ms"] = 2.000049
    text = compact.compact({"environment": {"copy": 1 / 3}, "failures": [], "cells": [cell]})
    assert len(text.splitlines()) == 1 + len(cell["variants"]) + 1
    (tmp_path / "report.json").write_text(text)
    loaded = compact.load(tmp_path / "report.json")
    assert loaded["environment"] == {"copy": 0.3333}
    cell["variants"][0]["median_ms"] = 2.0
    assert loaded["cells"] == [cell]


def test_committed_results_are_small() -> None:
    results = BENCHMARKS / "results"
    if not results.exists():
        pytest.skip("no results beside the package")
    for file in results.glob("*.png"):
        assert file.stat().st_size <= 200_000, file.name
    for file in results.glob("*.json"):
        assert file.stat().st_size <= 100_000, file.name
        assert len(file.read_text().splitlines()) <= 500, file.name


def test_environment_tells_the_commit_the_caches_and_what_is_forced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert machine.commit(tmp_path) == "not a git checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert re.fullmatch("[0-9a-f]{40}, clean", machine.commit(tmp_path))
    (tmp_path / "new").touch()
    assert re.fullmatch("[0-9a-f]{40}, with changes", machine.commit(tmp_path))
    assert machine.commit(tmp_path / "new") == "not a git checkout"
    monkeypatch.setenv("PATH", "")
    assert machine.commit(tmp_path) == "not a git checkout"

    for i, (level, kind, size) in enumerate((("1", "Data", "32K"), ("2", "Unified", "512K"))):
        (index := tmp_path / f"index{i}").mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(f"{value}\n")
    assert machine.caches(tmp_path) == {"L1 data": "32K", "L2": "512K"}
    assert machine.caches(tmp_path / "none") == {}

    monkeypatch.setattr(rates, "gemm_rate", lambda device, dtype: 1e11)
    for name in machine.FORCED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    about = machine.environment("cpu")
    assert about["forced"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert "forced: ONEDNN_MAX_CPU_ISA=AVX2" in machine.describe(about | {"copy_gbs": None})


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As from a shell, though these tests are run by make themselves."""
    command = ["make", "--dry-run", "--always-make", *arguments]
    of_make = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "CPU")
    clean = {name: value for name, value in os.environ.items() if name not in of_make}
    return subprocess.run(
        command, cwd=BENCHMARKS.parent, env=clean, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", ["bench", "bench-full", "test", "test-all"])
def test_make_forces_a_lower_processor(target: str) -> None:
    assert "FASTFUSE_ISA=" not in _make(target).stdout
    for cpu, forced in (
        ("avx2", "FASTFUSE_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2"),
        ("portable", "FASTFUSE_ISA=portable ONEDNN_MAX_CPU_ISA=SSE41"),
    ):
        *_, line = _make(target, f"CPU={cpu}").stdout.splitlines()
        assert line.startswith(forced)
    unknown = _make(target, "CPU=avx3")
    assert unknown.returncode != 0
    assert "CPU must be one of avx2, avx512, portable; got avx3" in unknown.stderr


def test_overview_and_verdict() -> None:
    slower = _cell("op", "main", None)
    slower["variants"][1]["median_ms"] = 1.0
    faster = _cell("op", "main", None) | {"dtype": "bfloat16"}
    dropped = {"op": "op", "shape": "b", "dtype": "float32", "mode": "forward", "dropped": "why"}
    cells = [slower, faster, dropped]
    assert report.overview(cells).rows == [
        ["op", "0.500", "1.50", "a shape, float32, forward: 0.500x (fastfuse is slower)"]
    ]
    assert report.verdict(cells) == [
        "slower than a rival: op, a shape, float32, forward: eager takes 0.500x our time",
        "2 rivals were left out of cells, with reasons in the report",
        "1 cells were not measured for want of time, see the report: 1 of op",
    ]
    assert report.verdict([faster])[0] == "none of 1 cells is slower than a rival"


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
@pytest.mark.parametrize("whole", [False, True], ids=["library", "whole"])
def test_stages_of_a_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: bool, suite: ModuleType
) -> None:
    shape = dataclasses.replace(suite.SHAPES["tiny"], channels=64, height=16, width=16)
    monkeypatch.setitem(suite.SHAPES, "small", shape)
    dtypes = frozenset([torch.float32] if whole else [])
    with use_policy(policy_of("cpu"), whole_mlp=dtypes, whole_mlp_pixels=0.0):
        passes = block_stages.stages(suite, "small", "float32", rounds=2)
    forward = passes.pop("forward")
    assert set(passes) == {"backward", "backward, recompute"}
    assert forward.pop("its weight's gradient") == 0
    assert forward.pop("sums") >= 0
    of_library = {"products", "GELU", "residual"}
    if suite is bench_ced_block:
        of_library.add("layer norm")
    absent = of_library if whole else {"MLP as one kernel"}
    for spent in (forward, *passes.values()):
        assert {stage for stage, milliseconds in spent.items() if milliseconds == 0} == absent
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


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_launches_over_a_driver_that_only_counts() -> None:
    """Forward and with backward; times are not held to anything, nor is what is printed of them."""
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, str(BENCHMARKS / "host_time.py"), "--rounds", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    row = re.compile(r"^(.*?)  +[\d.]+ +(\d+) +[\d.]+ +(\d+)$", re.MULTILINE)
    launches = {name: (int(forward), int(both)) for name, forward, both in row.findall(run.stdout)}
    assert launches == {
        "upsample_equalize_concat, 4 levels": (4, 8),
        "upsample_add": (1, 2),
        "depthwise_conv2d": (1, 4),
        "ced_block": (4, 15),
        "fusion_conv2d, 4 levels": (1, 4),
        "fusion_conv2d, equalized": (5, 12),
        "upsample_cross_entropy": (1, 2),
    }


def test_gpu_script_ends_within_nine_minutes() -> None:
    text = (BENCHMARKS / "gpu.sh").read_text(encoding="utf-8")
    limits = {name: int(limit) for name, limit in re.findall(r'step "([^"]+)" (\d+)', text)}
    dry = [name for name in limits if name.startswith("collect")]
    twice = limits["compute-sanitizer $tool"]  # benchmarks come last: the quick ones' limit counts
    assert sum(limit for name, limit in limits.items() if name not in dry) + twice <= 540
    assert limits["benchmarks"] <= 180


def test_gpu_script_is_sound() -> None:
    script = BENCHMARKS / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    usage = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "usage:" in usage.stderr
    usage = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert usage.returncode == 0
    assert usage.stdout.startswith("Builds, checks and measures fastfuse")
    assert "--wheels DIR" in usage.stdout
    assert "set -uo" not in usage.stdout
