"""The tables of CEDNet's paper: what is counted and measured beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import paper_counts
import paper_tables
import pytest
import torch
from paper_counts import GFLOPS, MATCH, MISS, PARAMETERS, UNKNOWN, Count, FusionTime
from plain_cednet import CEDNet as PlainCEDNet
from plain_cednet import ConvNeXt, Features
from torch import nn
from variants import Variant

from fastfuse.models import CEDNet, DetectionFeatures
from fastfuse.verify import MismatchError

SIZE = (64, 64)


@pytest.fixture(scope="module")
def parameters() -> list[Count]:
    return list(paper_counts.parameter_rows())


@pytest.fixture(scope="module")
def gflops() -> list[Count]:
    return list(paper_counts.flops_rows())


@pytest.fixture(scope="module")
def depths() -> list[Count]:
    return list(paper_counts.depth_rows())


@pytest.fixture(scope="module")
def fusion() -> dict[str, FusionTime]:
    return {row.model: row for row in paper_counts.fusion_rows()}


STYLES = list(paper_tables.STYLES)


@pytest.fixture(
    scope="module", params=[STYLES[:1], pytest.param(STYLES, marks=pytest.mark.slow)], ids=len
)
def speed(request: pytest.FixtureRequest) -> tuple[list[paper_tables.Speed], paper_tables.Rates]:
    models = [paper_tables.BASELINE, *request.param]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as images this small can use
    try:
        with pytest.MonkeyPatch.context() as patch:
            chosen = {model: paper_tables.PAPER_SPEED[model] for model in models}
            patch.setattr(paper_tables, "PAPER_SPEED", chosen)
            return paper_tables.measure_speed(SIZE, "float32", 1)
    finally:
        torch.set_num_threads(threads)


# Counts


def test_parameters_are_the_derived_ones(parameters: list[Count]) -> None:
    counts = {row.model: row.ours for row in parameters}
    # of T, S, B: backbone without and with the last decoder, classifier, RetinaNet, UPerNet; of
    # T's styles RetinaNet; of other blocks backbone and RetinaNet
    assert list(counts.values()) == [
        30_718_336, 30_967_776, 33_826_152, 38_635_380, 60_976_812,
        53_067_008, 53_316_448, 56_174_824, 60_984_052, 83_325_484,
        91_114_496, 91_546_688, 94_615_528, 99_121_652, 122_896_684,
        38_884_820, 38_880_724, 38_475_636,
        31_541_376, 39_384_692, 29_267_625, 37_135_517, 25_739_200, 33_566_132,
    ]  # fmt: skip
    # The paper prints 33M of 33,566,132, which the public code has.
    assert [row.model for row in parameters if row.verdict != MATCH] == [
        "CEDNet CSwin-T, RetinaNet"
    ]
    assert counts["CEDNet-T, RetinaNet: FPN, no LR blocks"] / 1e6 == pytest.approx(38.476, abs=5e-4)


def test_gflops_of_the_smallest_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_counts, "VARIANTS", {"tiny": "T"})
    monkeypatch.setattr(paper_counts, "_STYLES", ())
    rows = list(paper_counts.flops_rows())
    assert [row.derived for row in rows] == [254.5, 962.4]
    assert {row.verdict for row in rows} == {MATCH}
    assert all(0 < row.executed < row.ours for row in rows)


@pytest.mark.slow
def test_gflops_are_the_papers(gflops: list[Count]) -> None:
    known = [row for row in gflops if row.derived is not None]
    assert [(row.derived, row.paper) for row in known] == [
        (254.5, ("255",)),
        (335.4, ("335",)),
        (962.4, ("962",)),
        (1045.2, ("1045",)),
        (1184.3, ("1184",)),
    ]
    for row in known:
        assert row.derived is not None
        assert row.ours == pytest.approx(row.derived, rel=0.005)
        assert f"{row.ours:.0f}" == row.paper[0]
    assert {row.verdict for row in known} == {MATCH}
    assert {row.verdict for row in gflops if row not in known} == {UNKNOWN}


@pytest.mark.slow
def test_fusion_executes_less(gflops: list[Count]) -> None:
    for row in gflops:
        assert row.executed is not None
        assert 0 < row.executed < row.ours


def test_executed_counts_are_those_of_real_tensors() -> None:
    make = partial(DetectionFeatures, CEDNet("tiny", depths=(1, 1, 1, 1), stages=2).eval())
    counted = paper_counts.executed_gflops(make, (1, 3, 64, 64))
    model = make()
    with torch.no_grad(), paper_counts.FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 64))
    assert counted == counter.get_total_flops() / 2e9


def test_elements_by_hand() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 1, bias=False),
            nn.AdaptiveAvgPool2d(2),
        )

    pixels = 8 * 6
    macs = pixels * (27 * 4 + 4 * 4)
    elements = pixels * 4 * (1 + 2 + 1 + 1)  # bias, batch norm, ReLU, what is averaged
    assert paper_counts.paper_gflops(make, (1, 3, 8, 6)) == pytest.approx((macs + elements) / 1e9)


@pytest.mark.slow
def test_moved_blocks_keep_counts(depths: list[Count]) -> None:
    same = [row for row in depths if "stage:" not in row.model and "stages:" not in row.model]
    assert len(same) == 12
    assert {row.ours for row in same if row.quantity == PARAMETERS} == {38_635_380}
    assert len({row.ours for row in same if row.quantity == GFLOPS}) == 1
    assert [row.verdict for row in depths[:2]] == [MATCH, MATCH]
    assert {row.verdict for row in depths[2:]} == {UNKNOWN}


def test_baselines() -> None:
    tiny, tiny_gflops, *others = paper_counts.baseline_rows()
    assert (tiny.ours, tiny.paper, tiny.verdict) == (38_759_380, ("38.76M",), MATCH)
    assert f"{tiny_gflops.ours:.1f}" == "243.1"
    assert tiny_gflops.verdict == MATCH
    assert {row.verdict for row in others} == {UNKNOWN}


@pytest.mark.parametrize(
    "wrong",
    [
        Count("off by one", PARAMETERS, 38_635_380, 38_635_381, ("39M",)),
        Count("rounds to another", PARAMETERS, 38_635_380, 38_635_380, ("39M", "38.5M")),
        Count("printed alone", PARAMETERS, 38_635_380, None, ("38M",)),
        Count("GFLOPs beyond 0.5 %", GFLOPS, 255.8, 254.5),
        Count("GFLOPs below", GFLOPS, 333.0, 335.4, ("335",)),
    ],
    ids=lambda row: row.model,
)
def test_misses_are_reported(wrong: Count) -> None:
    assert wrong.verdict == MISS
    assert wrong.as_dict()["verdict"] == MISS
    table = paper_tables.count_table("", [wrong], "")
    assert MISS in list(table.columns[5].cells)


@pytest.mark.slow
def test_a_wrong_figure_of_the_paper_is_a_miss(
    parameters: list[Count], gflops: list[Count]
) -> None:
    assert dataclasses.replace(parameters[4], paper=("62M",)).verdict == MISS
    assert dataclasses.replace(gflops[0], derived=243.1).verdict == MISS


def test_difference() -> None:
    assert Count("", PARAMETERS, 5, 3, ("1M",)).difference == 2
    assert Count("", PARAMETERS, 2_500_000, None, ("2.4M",)).difference == pytest.approx(1e5)
    assert Count("", PARAMETERS, 5).difference is None


# The time of feature fusion


def test_cednet_fuses_early(fusion: dict[str, FusionTime]) -> None:
    assert all(0 < row.fraction < 1 for row in fusion.values())
    for letter in "TSB":
        assert fusion[f"CEDNet-{letter}"].fraction < 0.4
        assert fusion[f"ConvNeXt-{letter} + FPN"].fraction > 0.8
    early, late = (fusion[f"CEDNet-T, depths: more at {end}"] for end in ("last", "first"))
    assert early.fraction < fusion["CEDNet-T"].fraction < late.fraction


@pytest.mark.parametrize("style", ["fpn", "unet", "hourglass"])
def test_parameters_before_fusion_are_the_first_stages(style: str) -> None:
    backbone = CEDNet("tiny", style)
    stage = backbone.stages[0]
    before = [backbone.stem, backbone.blocks, backbone.downsample]
    before += [stage.encoder, stage.downsample, stage.decoder.reduce[0]]
    if style == "hourglass":
        before.append(stage.decoder.lateral[0])
    row = paper_counts.fusion_time(style, lambda: DetectionFeatures(CEDNet("tiny", style)))
    assert row.before == sum(p.numel() for module in before for p in module.parameters())


def test_plain_cednet_fuses_as_early() -> None:
    plain = paper_counts.fusion_time("plain", lambda: Features(PlainCEDNet()))
    ours = paper_counts.fusion_time("plain", lambda: DetectionFeatures(CEDNet()))
    assert plain == ours


def test_a_model_that_never_fuses_is_refused() -> None:
    with pytest.raises(ValueError, match="ConvNeXt never upsamples"):
        paper_counts.fusion_time("ConvNeXt", ConvNeXt)


# Speed


def test_speed(
    speed: tuple[list[paper_tables.Speed], paper_tables.Rates], request: pytest.FixtureRequest
) -> None:
    rows, rates = speed
    styles = request.node.callspec.params["speed"]
    assert [(row.model, row.name) for row in rows] == [
        ("ConvNeXt-T + FPN", "eager"),
        *((style, name) for style in styles for name in ("eager", "fastfuse")),
    ]
    for row in rows:
        assert len(row.ways) == (4 if row.name == "eager" else 1)
        assert row.images_per_s == pytest.approx(1e3 / min(way.median_ms for way in row.ways))
        numbers = [row.images_per_s, row.ratio, row.gemm_share]
        numbers += [way.median_ms for way in row.ways]
        numbers += [] if row.fused_over_plain is None else [row.fused_over_plain]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
    assert rows[0].ratio == 1
    ratios = [0.855, 0.835, 0.795]
    assert [row.paper_ratio for row in rows[1::2]] == pytest.approx(ratios[: len(styles)])
    assert rates.copy_gbs > 0
    assert rates.gemm_gflops > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_model_is_not_timed(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paper_tables.plain_model

    def wrong(model: str, mlp: str, weights: dict[str, torch.Tensor]) -> nn.Module:
        plain = right(model, mlp, weights)
        if mlp == "conv" and model != paper_tables.BASELINE:
            norm = plain.backbone.backbone.stages[1].decoder.norm[1]
            norm.bias = nn.Parameter(norm.bias + 1)
        return plain

    torch.set_num_threads(1)
    monkeypatch.setattr(paper_tables, "PAPER_SPEED", {"CEDNet-T, fpn": 17.1})
    monkeypatch.setattr(paper_tables, "time_all", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(paper_tables, "plain_model", wrong)
    with pytest.raises(MismatchError, match=r"eager conv, channels_last and fastfuse differ"):
        paper_tables.measure_speed(SIZE, dtype, 1)


def test_ways_are_interleaved() -> None:
    ran: list[str] = []
    listed = {m: [Variant(m, lambda m=m: ran.append(m))] for m in ("a", "b", "c")}
    seconds = paper_tables.time_all(listed, 3, lambda text: None)
    assert ran[:3] == ["a", "b", "c"]
    assert ran[3:] == [m for order in ("abc", "bca", "cab") for m in order for _ in range(2)]
    assert all(len(times) == 3 for ways in seconds.values() for times in ways)


# The script


def test_json_is_what_is_printed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    speed: tuple[list[paper_tables.Speed], paper_tables.Rates],
) -> None:
    monkeypatch.setattr(paper_tables, "measure_speed", lambda *_: speed)
    path = tmp_path / "tables.json"
    arguments = ["--tables", "speed", "--size", "64x64", "--dtype", "float32", "--json", str(path)]
    results = paper_tables.main(arguments)
    results.parameters = [Count("a model", PARAMETERS, 1_000_000, 1_000_000, ("1M",))]
    results.fusion_time = [FusionTime("a model", 1, 4)]
    results.write(path)
    read = json.loads(path.read_text())
    assert read == json.loads(paper_tables.lines(results.as_dict()))
    assert read["rates"][0]["gemm_gflops"] == pytest.approx(speed[1].gemm_gflops, rel=1e-3)
    assert read["size"] == [64, 64]
    assert read["parameters"][0]["verdict"] == MATCH
    assert read["fusion_time"][0]["fraction"] == 0.25
    printed = capsys.readouterr().out
    for row in results.as_dict()["speed"]:
        assert row["model"] in printed
        assert f"{row['images_per_s']:.3f}" in printed


@pytest.mark.slow
def test_all_counts_are_printed(
    parameters: list[Count],
    gflops: list[Count],
    depths: list[Count],
    fusion: dict[str, FusionTime],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = {
        "parameter_rows": parameters,
        "flops_rows": gflops,
        "depth_rows": depths,
        "fusion_rows": list(fusion.values()),
    }
    for name, rows in counted.items():
        monkeypatch.setattr(paper_tables, name, lambda *_, rows=rows: rows)
    results = paper_tables.main(["--tables", "counts"])
    printed = " ".join(capsys.readouterr().out.split())
    for figure in ("38,635,380", "122,896,684", "254.5", "1,184.3", "38.76M", "not known"):
        assert figure in printed
    assert printed.split().count(MISS) == 1  # what the paper prints of CSwin-T
    assert not results.speed


@pytest.mark.parametrize("size", ["800", "0x64", "100x64", "axb"])
def test_sizes_are_checked(size: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        paper_tables._size(size)
