"""The tables of *CEDNet: A Cascade Encoder-Decoder Network for Dense Prediction*, beside ours.

    python benchmarks/paper_tables.py [--tables counts|speed|all] [--quick] [--json FILE]
        [--size HxW] [--dtype float32|bfloat16]... [--rounds N]

Counts take seconds: parameters, GFLOPs, blocks moved between stages, the time of feature fusion,
ConvNeXt's baselines. Speed is that of RetinaNet on CEDNet-T in its three styles and on ConvNeXt-T
with FPN: plain PyTorch its best way of four, and fastfuse, whose results must agree with all of
them before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import check_agreement
from cell import DTYPES, LAYOUTS, OURS
from compact import lines
from measure import LONG_CALL_S, SETTLING_BYTES
from networks import PLAIN
from paper_counts import (
    GFLOPS,
    PARAMETERS,
    Count,
    FusionTime,
    baseline_rows,
    depth_rows,
    flops_rows,
    fusion_rows,
    paper_gflops,
    parameter_rows,
)
from plain_cednet import CEDNet as PlainCEDNet
from plain_cednet import ConvNeXtFPN, Features
from plain_cednet import RetinaNet as PlainRetinaNet
from rates import Clock, CopyRoof, gemm_rate
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from variants import CHANNELS_LAST, Variant

from fastfuse._terminal import spell_out
from fastfuse.models import cednet_retinanet_tiny
from fastfuse.ops.layout import memory_format
from fastfuse.tolerances import tolerance

SIZE, QUICK_SIZE = (800, 1280), (256, 384)
ROUNDS, QUICK_ROUNDS = 5, 3
TABLE_WIDTH = 150  # where there is no terminal
ROUNDINGS = 32  # of a whole forward pass, as for the other models
LEVELS = 5  # P3 to P7
MLPS = ("linear", "conv")
BASELINE = "ConvNeXt-T + FPN"
# Frames per second on an RTX 3090, in plain PyTorch.
PAPER_SPEED = {
    BASELINE: 20.0,
    "CEDNet-T, fpn": 17.1,
    "CEDNet-T, unet": 16.7,
    "CEDNet-T, hourglass": 15.9,
}
STYLES = {model: model.split(", ")[1] for model in PAPER_SPEED if model != BASELINE}

Progress = Callable[[str], None]


# Speed


@dataclass(frozen=True)
class Way:
    """One measured way to run a model."""

    title: str
    rival: bool
    median_ms: float
    iqr_ms: float


@dataclass(frozen=True)
class Speed:
    """A model as plain PyTorch, its best way, or as fastfuse.

    Args:
        way: the title of what was fastest.
        ratio: to plain ConvNeXt-T with FPN, of the same dtype.
        paper_ratio: the paper's, of plain models on its GPU.
        fused_over_plain: speedup over the same model in plain PyTorch; None for plain itself.
        gemm_share: GFLOPs of the full-resolution model over time, as a share of a large product's.
        ways: everything measured for it.
    """

    model: str
    dtype: str
    name: str
    way: str
    images_per_s: float
    ratio: float
    paper_ratio: float
    fused_over_plain: float | None
    gemm_share: float
    ways: tuple[Way, ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ways": [asdict(way) for way in self.ways]}


@dataclass(frozen=True)
class Rates:
    """What the machine gives to each dtype: copies in GB/s, a large product in GFLOP/s."""

    dtype: str
    copy_gbs: float
    gemm_gflops: float
    threads: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def randomize(model: nn.Module) -> nn.Module:
    """Weights of a fixed seed, by name, under which every layer bears upon the result."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters(), key=lambda named: named[0]):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            gain = 2 if parameter.dim() == 4 else 1
            parameter.data.copy_(noise * (gain / parameter[0].numel()) ** 0.5)
        elif name.endswith(("norm.weight", "layer_scale")):
            parameter.data.copy_(1 + 0.1 * noise)
        else:
            parameter.data.copy_(0.1 * noise)
    return model.eval()


def fused_model(style: str) -> nn.Module:
    return randomize(cednet_retinanet_tiny(style=style, layer_scale=1.0))


def plain_model(model: str, mlp: str, weights: dict[str, Tensor]) -> nn.Module:
    """A model of a name in PAPER_SPEED around these weights, which are not copied."""
    with torch.device("meta"):
        if model in STYLES:
            levels: nn.Module = Features(PlainCEDNet("tiny", STYLES[model], mlp=mlp))
        else:
            levels = ConvNeXtFPN("tiny", mlp=mlp)
        plain = PlainRetinaNet(levels)
    plain.load_state_dict(weights, assign=True)
    return plain.eval()


def _run(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        logits, deltas = model(images)
    return [*logits, *deltas]


def variants(model: str, size: tuple[int, int], dtype: str) -> list[Variant]:
    """fastfuse first, where it has the model, then plain PyTorch in every way."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, *size, generator=generator).to(getattr(torch, dtype))
    result = []
    if model in STYLES:
        fused = fused_model(STYLES[model]).to(images.dtype)
        weights = fused.state_dict()
        result.append(Variant(OURS, partial(_run, fused, images), rival=False))
    else:
        weights = randomize(PlainRetinaNet(ConvNeXtFPN("tiny"))).to(images.dtype).state_dict()
    for layout in LAYOUTS:
        format_ = memory_format(layout == CHANNELS_LAST)
        layed_out = {
            key: w.contiguous(memory_format=format_) if w.dim() == 4 else w
            for key, w in weights.items()
        }
        given = images.contiguous(memory_format=format_)
        for mlp in MLPS:
            plain = plain_model(model, mlp, layed_out)
            result.append(Variant(f"{PLAIN} {mlp}", partial(_run, plain, given), layout))
    return result


def check(listed: Sequence[Variant], dtype: str) -> None:
    """Raises MismatchError unless logits and deltas of every level agree."""
    allowed = tolerance(getattr(torch, dtype), roundings=ROUNDINGS)
    check_agreement(listed, {f"map {i}": allowed for i in range(2 * LEVELS)})


def _settle(call: Callable[[], Any], seconds: float) -> None:
    """As ``measure`` does before a timed call: its own caches and pages, not another's."""
    if seconds > LONG_CALL_S:
        torch.ones(SETTLING_BYTES, dtype=torch.int8)
    else:
        call()


def time_all(
    listed: dict[str, list[Variant]], rounds: int, progress: Progress
) -> dict[str, list[list[float]]]:
    """Seconds of every variant of every model: each once in a round, after one untimed round."""
    clock = Clock("cpu")
    flat = [(model, i) for model, ways in listed.items() for i in range(len(ways))]
    progress("warms up")
    first = {(model, i): clock(listed[model][i].call) for model, i in flat}
    seconds: dict[str, list[list[float]]] = {model: [[] for _ in w] for model, w in listed.items()}
    for done in range(rounds):
        progress(f"round {done + 1} of {rounds}")
        start = done * len(flat) // rounds
        for model, i in flat[start:] + flat[:start]:
            call = listed[model][i].call
            _settle(call, first[model, i])
            seconds[model][i].append(clock(call))
    return seconds


def _way(variant: Variant, seconds: Sequence[float]) -> Way:
    spread = 0.0
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = high - low
    median = statistics.median(seconds)
    return Way(variant.title, variant.rival, median * 1e3, spread * 1e3)


def speed_rows(
    ways: dict[str, list[Way]], dtype: str, gflops: dict[str, float], gemm_gflops: float
) -> list[Speed]:
    """Plain and fused rows of every model, plain's by its best way."""
    best = {
        (model, name): min(group, key=lambda way: way.median_ms)
        for model, listed in ways.items()
        for name in (PLAIN, OURS)
        if (group := [way for way in listed if way.rival == (name == PLAIN)])
    }
    baseline = best[BASELINE, PLAIN].median_ms
    return [
        Speed(
            model=model,
            dtype=dtype,
            name=name,
            way=way.title,
            images_per_s=1e3 / way.median_ms,
            ratio=baseline / way.median_ms,
            paper_ratio=PAPER_SPEED[model] / PAPER_SPEED[BASELINE],
            fused_over_plain=best[model, PLAIN].median_ms / way.median_ms if name == OURS else None,
            gemm_share=2 * gflops[model] / (way.median_ms / 1e3) / gemm_gflops,
            ways=tuple(w for w in ways[model] if w.rival == way.rival),
        )
        for (model, name), way in best.items()
    ]


def measure_speed(
    size: tuple[int, int], dtype: str, rounds: int, progress: Progress = lambda text: None
) -> tuple[list[Speed], Rates]:
    """Of all models in one run.

    Raises:
        MismatchError: fastfuse and plain PyTorch differ; nothing has been timed.
    """
    listed = {}
    for model in PAPER_SPEED:
        progress(f"{dtype}: checks that {model}'s ways agree")
        listed[model] = variants(model, size, dtype)
        check(listed[model], dtype)
    gflops = {m: paper_gflops(partial(_bare, m), (1, 3, *size)) for m in PAPER_SPEED}
    roof = CopyRoof("cpu")
    rates = Rates(
        dtype,
        roof.rate / 1e9,
        gemm_rate("cpu", getattr(torch, dtype)) / 1e9,
        torch.get_num_threads(),
    )
    del roof
    seconds = time_all(listed, rounds, lambda text: progress(f"{dtype}: {text}"))
    ways = {m: [_way(v, s) for v, s in zip(listed[m], seconds[m], strict=True)] for m in listed}
    return speed_rows(ways, dtype, gflops, rates.gemm_gflops), rates


def _bare(model: str) -> nn.Module:
    backbone: nn.Module = ConvNeXtFPN("tiny")
    if model in STYLES:
        backbone = Features(PlainCEDNet("tiny", STYLES[model]))
    return PlainRetinaNet(backbone)


# What is printed


@dataclass
class Results:
    """Everything printed; the JSON has the same names."""

    parameters: list[Count] = field(default_factory=list)
    gflops: list[Count] = field(default_factory=list)
    depths: list[Count] = field(default_factory=list)
    fusion_time: list[FusionTime] = field(default_factory=list)
    baselines: list[Count] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    rates: list[Rates] = field(default_factory=list)
    size: tuple[int, int] | None = None  # of the images of speed

    def as_dict(self) -> dict[str, Any]:
        tables = {name: value for name, value in vars(self).items() if name != "size"}
        rows = {name: [row.as_dict() for row in table] for name, table in tables.items()}
        return {**rows, "size": self.size and list(self.size)}

    def write(self, path: Path) -> None:
        path.write_text(lines(self.as_dict()) + "\n", encoding="utf-8")


def _table(title: str, columns: Sequence[str], caption: str = "", left: int = 1) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i < left)
    return table


def _number(value: float | None, quantity: str, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign},.0f}" if quantity == PARAMETERS else f"{value:{sign},.1f}"


def count_table(title: str, rows: Sequence[Count], caption: str) -> Table:
    executed = any(row.executed is not None for row in rows)
    mixed = len({row.quantity for row in rows}) > 1
    columns = ["model", "ours", "derived", "difference", "paper", "verdict"]
    columns += ["fastfuse executes"] * executed
    table = _table(title, columns, caption)
    last = None
    for row in rows:
        q = row.quantity
        name = "" if mixed and row.model == last else row.model
        last = row.model
        cells = [
            name,
            _number(row.ours, q) + (" G" if q == GFLOPS and mixed else ""),
            _number(row.derived, q),
            _number(row.difference, q, "+"),
            ", ".join(row.paper) or "not known",
            row.verdict,
        ]
        table.add_row(*cells, *([_number(row.executed, q)] * executed))
    return table


def fusion_table(rows: Sequence[FusionTime]) -> Table:
    table = _table(
        "Time of feature fusion: parameters used before the first fusion, of all",
        ("model", "before", "all", "fraction", "paper"),
        "Of what makes P3 to P7 of an image, without heads. The first fusion is the first addition "
        "of an upsampled map, after the 1x1 convolution of the coarser map and the lateral block "
        "or convolution of the finer one. The paper's Figure 1 is not known in numbers.",
    )
    for row in rows:
        table.add_row(
            row.model, f"{row.before:,}", f"{row.all:,}", f"{row.fraction:.3f}", "not known"
        )
    return table


def speed_table(rows: Sequence[Speed], rates: Rates, size: tuple[int, int]) -> Table:
    table = _table(
        f"RetinaNet, one image of {size[0]}x{size[1]}, {rates.dtype}, {rates.threads} threads",
        ("model", "way", "images/s", f"ratio to plain {BASELINE}", "paper's, plain", "fused/plain",
         "share of GEMM"),
        f"Copies {rates.copy_gbs:.1f} GB/s, a large product {rates.gemm_gflops:.0f} GFLOP/s. The "
        "paper's ratios are of plain PyTorch on an RTX 3090. Plain is eager; bench_cednet.py has "
        "torch.compile.",
        left=2,
    )  # fmt: skip
    for row in rows:
        gain = "" if row.fused_over_plain is None else f"{row.fused_over_plain:.2f}"
        table.add_row(
            row.model,
            row.way,
            f"{row.images_per_s:.3f}",
            f"{row.ratio:.3f}",
            f"{row.paper_ratio:.3f}",
            gain,
            f"{row.gemm_share:.2f}",
        )
    return table


def ways_table(rows: Sequence[Speed]) -> Table:
    table = _table(f"All ways, {rows[0].dtype}", ("model", "way", "median ms", "IQR ms"), left=2)
    for row in rows:
        for way in row.ways:
            table.add_row(row.model, way.title, f"{way.median_ms:.1f}", f"{way.iqr_ms:.1f}")
    return table


PARAMETERS_CAPTION = (
    "derived: by hand from the paper's description; paper: as it prints. A match equals the one "
    "and rounds to the other."
)
GFLOPS_CAPTION = (
    "1e9 multiply-adds at full resolution, half of PyTorch's count under the reference backend, "
    "plus elements as the papers' counter adds them: biases of convolutions, ReLU, pooling, and "
    "twice those of batch norms. A match is within a tenth of what is derived and 0.5 % of the "
    "paper's. fastfuse executes: multiply-adds alone, by the formulas of the ops that run for "
    "float32 CPU tensors, interpolation included."
)
DEPTHS_CAPTION = (
    "Blocks in the stem; of each stage at 1/8, 1/16, 1/32. Their totals are the same everywhere. "
    "The paper varies depths stage by stage; which ones, and their counts, are not known."
)


def count_all(results: Results, console: Console, progress: Progress) -> None:
    results.parameters = list(parameter_rows())
    console.print(count_table("Parameters", results.parameters, PARAMETERS_CAPTION))
    results.gflops = list(flops_rows(progress))
    console.print(count_table("GFLOPs", results.gflops, GFLOPS_CAPTION))
    progress("counts depths")
    results.depths = list(depth_rows())
    title = "RetinaNet on CEDNet-T, blocks moved between stages: parameters and GFLOPs, 1280x800"
    console.print(count_table(title, results.depths, DEPTHS_CAPTION))
    results.fusion_time = list(fusion_rows())
    console.print(fusion_table(results.fusion_time))
    results.baselines = list(baseline_rows())
    title = "ConvNeXt's baselines, in plain PyTorch: parameters and GFLOPs, 1280x800"
    console.print(count_table(title, results.baselines, "Counted as above."))


def time_all_dtypes(
    results: Results, dtypes: Sequence[str], rounds: int, console: Console, progress: Progress
) -> None:
    assert results.size is not None
    for dtype in dtypes:
        rows, rates = measure_speed(results.size, dtype, rounds, progress)
        results.speed += rows
        results.rates.append(rates)
        console.print(speed_table(rows, rates, results.size))
        console.print(ways_table(rows))


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HxW, like 800x1280; got {text!r}") from None
    if height < 32 or width < 32 or height % 32 or width % 32:
        raise argparse.ArgumentTypeError(f"expected multiples of 32; got {text!r}")
    return height, width


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an int of at least 1; got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> Results:
    spell_out()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", choices=("counts", "speed", "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="speed of smaller images, float32")
    parser.add_argument("--size", type=_size, metavar="HxW", help="of the images, for speed")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="for speed; repeatable")
    parser.add_argument("--rounds", type=_rounds, metavar="N", help="for speed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes what is printed")
    options = parser.parse_args(arguments)
    quick = options.quick
    console, log = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)

    def progress(text: str) -> None:
        log.print(text, style="dim", highlight=False)

    results = Results()
    if options.tables != "speed":
        count_all(results, console, progress)
    if options.tables != "counts":
        results.size = options.size or (QUICK_SIZE if quick else SIZE)
        dtypes = options.dtype or (DTYPES[:1] if quick else DTYPES)
        rounds = options.rounds or (QUICK_ROUNDS if quick else ROUNDS)
        time_all_dtypes(results, dtypes, rounds, console, progress)
    if options.json:
        results.write(options.json)
        console.print(f"wrote {options.json}")
    return results


if __name__ == "__main__":
    main()
