"""``python -m fastfuse calibrate | report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastfuse._commands import build_model, guarded, say
from fastfuse.calibration import calibrate
from fastfuse.calibration.images import IMAGENET_MEAN, IMAGENET_STD, ImageFolder
from fastfuse.calibration.plot import check_plot_path
from fastfuse.calibration.report import check_numbers_path, report, save_report, table
from fastfuse.calibration.statistics_file import check_statistics_path, save_calibration

__all__ = ["add_commands"]


def _calibrate(args: argparse.Namespace) -> int:
    check_statistics_path("calibrate", args.output)
    model, images = _model_and_images(args)
    statistics = calibrate(model, images, **_options(args))
    save_calibration(statistics, args.output)
    _say_left_out(images)
    count = max(max(s.count) for s in statistics.values())
    say(f"{len(statistics)} equalizers calibrated on {count} images: {args.output}")
    return 0


def _report(args: argparse.Namespace) -> int:
    check_plot_path(args.output)
    check_numbers_path(args.output)
    model, images = _model_and_images(args)
    branches = report(model, images, **_options(args))
    written = save_report(branches, args.output)
    _say_left_out(images)
    Console(width=None if sys.stdout.isatty() else 110).print(table(branches))
    say(" and ".join(map(str, written)))
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    encoder = None if args.encoder == "none" else args.encoder
    return {"encoder": encoder, "max_batches": args.max_batches}


def _model_and_images(args: argparse.Namespace) -> tuple[nn.Module, ImageFolder]:
    if not args.output.resolve().parent.is_dir():
        raise ValueError(f"--output must be in a folder that exists; got {str(args.output)!r}")
    if args.max_batches is not None and args.max_batches < 1:
        raise ValueError(f"--max-batches must be at least 1; got {args.max_batches}")
    options = {name: getattr(args, name) for name in ("size", "mean", "std", "skip_unreadable")}
    images = ImageFolder(args.data, args.batch_size, **options)
    say(f"{len(images.files)} images in {args.data}")
    torch.manual_seed(args.seed)
    return build_model(args.factory), images


def _say_left_out(images: ImageFolder) -> None:
    """After a pass, when it is known."""
    if images.skipped:
        say(f"{len(images.skipped)} of {len(images.files)} images are skipped:")
        for why in images.skipped.values():
            say(f"  {why}")
    if images.dropped is not None:
        say(f"{images.dropped} is left out: alone in the last batch, which BatchNorm cannot take")


def add_commands(commands: Any) -> None:
    for name, run, text, output in (
        (
            "calibrate",
            _calibrate,
            "find the statistics of scale equalizers",
            "FILE.json, .safetensors",
        ),
        ("report", _report, "plot every branch's scale before and after", "FILE.png, .svg, .pdf"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("factory", help="package.module:factory, which returns the model")
        command.add_argument("--data", type=Path, required=True, metavar="DIR", help="images")
        command.add_argument("--output", type=Path, required=True, metavar="FILE", help=output)
        command.add_argument("--batch-size", type=int, default=16, metavar="N")
        command.add_argument("--max-batches", type=int, metavar="N")
        command.add_argument(
            "--size", type=int, nargs=2, metavar=("H", "W"), help="resize every image"
        )
        command.add_argument(
            "--skip-unreadable",
            action="store_true",
            help="go on without images that cannot be read, and list them",
        )
        for option, value in (("--mean", IMAGENET_MEAN), ("--std", IMAGENET_STD)):
            command.add_argument(
                option,
                type=float,
                nargs=3,
                default=value,
                metavar=("R", "G", "B"),
                help=f"of pixels in 0..1; default: ImageNet's, {value}",
            )
        command.add_argument(
            "--encoder",
            default="backbone",
            metavar="NAME",
            help="what stays in evaluation mode; 'none': nothing (default: backbone)",
        )
        command.add_argument(
            "--seed", type=int, default=0, metavar="N", help="of the model's weights"
        )
        command.set_defaults(run=guarded(name, run))
