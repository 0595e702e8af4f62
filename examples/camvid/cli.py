"""``python -m examples.camvid``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.camvid.checkpoint import load_state
from examples.camvid.config import DTYPES, EQUALIZERS, PIPELINES, PRESETS, Config
from examples.camvid.data import DataSet, open_data
from examples.camvid.models import BACKBONES, HEADS
from examples.camvid.pictures import curves, predictions
from examples.camvid.processes import Processes, processes
from examples.camvid.scores import Scores, scores_table
from examples.camvid.study import study
from examples.camvid.synthetic import write_synthetic
from examples.camvid.training import train
from fastfuse._terminal import spell_out

__all__ = ["main"]

_SYNTHETIC: dict[str, Any] = {"size": (96, 128), "crop": (64, 96)}
_WIDTH = 100  # of output that goes to no terminal


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0, or 2 after bad input, 130 after an interruption (SIGINT)."""
    spell_out()
    args = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        for name in ("threads", "workers"):
            if (value := getattr(args, name)) < 0:
                raise ValueError(f"camvid: --{name} must be at least 0; got {value}")
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.curves:
            return _curves(args, console)
        with processes() as group:
            return _run(args, console if group.first else Console(quiet=True), group)
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith(("camvid", "load_")):
            raise  # not the user's input
        text = str(error)
        named = text.startswith(("camvid", "load_"))
        print(text if named else f"camvid: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last epoch done", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace, console: Console, group: Processes) -> int:
    config = _config(args)
    if args.study and args.head:
        raise ValueError("camvid: --head must not stand beside --study HEAD; got both")
    if args.study is not None and args.seeds < 1:
        raise ValueError(f"camvid: --seeds must be at least 1; got {args.seeds}")
    data = _data(args, config, console, group)
    counts = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    console.print(f"images: {counts}; {torch.get_num_threads()} threads", highlight=False)
    if args.study is not None:
        study(
            config,
            data,
            args.out,
            heads=args.study or [config.head],
            seeds=range(config.seed, config.seed + args.seeds),
            processes=group,
            workers=args.workers,
            console=console,
        )
        return 0
    model, state = train(
        config, data, args.out, processes=group, workers=args.workers, console=console
    )
    if group.first:
        name, found = "val", state.history[-1]
        if state.test is not None:
            name, found = "test", state.test
        curves({args.out.name: [state]}, args.out / "curves.png")
        predictions(model, config.pipeline, data, name, args.out / "predictions.png")
        title = f"{len(data.splits[name])} {name} images of {config.size[0]}x{config.size[1]}"
        console.print(title, highlight=False)
        console.print(scores_table(data.classes, Scores.of_entry(found)))
        where = f"pictures: curves.png and predictions.png in {args.out}"
        console.print(where, soft_wrap=True, markup=False)
    return 0


def _data(args: argparse.Namespace, config: Config, console: Console, group: Processes) -> DataSet:
    folder = args.data
    if folder is None:
        folder = args.out / "synthetic"
        console.print("no --data: a synthetic data set, of shapes on textures")
        if group.first:
            write_synthetic(folder)
        group.wait()
    elif not folder.is_dir():
        raise ValueError(f"camvid: --data must be a folder; got {folder}")
    return open_data(folder, config.size)


def _curves(args: argparse.Namespace, console: Console) -> int:
    """Of runs that are there, in one picture."""
    states = {}
    for folder in args.curves:
        of_study = (folder / "study.json").exists()
        for run in sorted(p for p in folder.iterdir() if p.is_dir()) if of_study else [folder]:
            if (state := load_state(run)) is not None:
                states[str(run) if run.name in states else run.name] = [state]
            elif not of_study:
                raise ValueError(
                    f"camvid: --curves must name folders of runs, or of a study; {folder} is none"
                )
    if not states:
        raise ValueError("camvid: --curves must name folders of runs; the studies have none yet")
    if (args.out / "checkpoint.json").exists():
        raise ValueError(f"camvid: --out must be no run, whose curves it has; got {args.out}")
    args.out.mkdir(parents=True, exist_ok=True)
    curves(states, args.out / "curves.png")
    console.print(f"picture: {args.out / 'curves.png'}", soft_wrap=True, markup=False)
    return 0


def _config(args: argparse.Namespace) -> Config:
    """What the options say, over what --quick and the synthetic data set make the defaults."""
    values: dict[str, Any] = dict(PRESETS["quick" if args.quick else "full"])
    if args.data is None:
        values |= PRESETS["quick"] | _SYNTHETIC
    given = {field.name: getattr(args, field.name) for field in fields(Config)}
    values |= {name: value for name, value in given.items() if value is not None}
    values |= {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
    return Config(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.camvid",
        description="Trains and evaluates a segmentation model, with the fused ops.",
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="CamVid; without it: a small synthetic data set")
    add(
        "--out",
        type=Path,
        default=Path("runs/camvid"),
        metavar="DIR",
        help="where checkpoints and pictures go (default: %(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help="minutes, not hours: other defaults for "
        + ", ".join(f"{name} ({_shown(value)})" for name, value in PRESETS["quick"].items()),
    )
    add(
        "--study",
        nargs="*",
        choices=HEADS,
        metavar="HEAD",
        help="train each head (without a name: --head's) with and without equalizers",
    )
    add("--seeds", type=int, default=3, metavar="N", help="of a study (default: %(default)s)")
    add("--curves", type=Path, nargs="+", metavar="RUN", help="only draw the curves of these runs")
    for name, choices, what in (
        ("head", HEADS, "decode head"),
        ("backbone", BACKBONES, "what it reads the maps of"),
        ("scale-equalizer", EQUALIZERS, "calibrated and kept, or folded into the first weights"),
        ("pipeline", PIPELINES, "the package's ops, or PyTorch's alone"),
        ("dtype", DTYPES, "of products; bfloat16 by autocast"),
    ):
        add(f"--{name}", choices=tuple(choices), help=f"{what}{_default(name)}")
    for name, what in (
        ("epochs", "passes over the training images, fixed when a run begins"),
        ("batch", "images of a step"),
        ("channels", "of the head"),
        ("output-stride", "of ResNets; 0: 32 for heads that read all levels, else 8"),
        ("seed", "of weights, order and augmentation"),
    ):
        add(f"--{name}", type=int, metavar="N", help=f"{what}{_default(name)}")
    for name, what in (("size", "images are resized to"), ("crop", "of crops, multiples of 32")):
        add(f"--{name}", type=int, nargs=2, metavar=("H", "W"), help=f"{what}{_default(name)}")
    add("--lr", type=float, help="the largest learning rate; 0: the backbone's (default)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images")
    add("--threads", type=int, default=0, metavar="N", help="of the ops; 0: PyTorch's default")
    return parser


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _default(name: str) -> str:
    default = {field.name: field.default for field in fields(Config)}[name.replace("-", "_")]
    return f" (default: {_shown(default)})"
