"""``python -m fastfuse info | verify | convert | bench | calibrate | report``."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastfuse._commands import build_model, guarded, image_shape
from fastfuse._info import info, routes
from fastfuse._terminal import spell_out
from fastfuse.backends import DTYPES
from fastfuse.calibration.cli import add_commands
from fastfuse.conversion import convert
from fastfuse.ops import OPERATIONS
from fastfuse.verify import BACKENDS, self_test, verify

__all__ = ["main"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_LAYOUTS = ("channels_last", "contiguous")
_WHOLE = ("heads", "models", "cednet")  # suites of more than one op
_OF_SUITES, _OF_A_MODEL = ("quick", "budget", "op"), ("input", "dtype", "layout", "no_training")
_STYLES = {"passed": "green", "failed": "bold red", "coarse": "magenta", "skipped": "yellow"}


def _info(args: argparse.Namespace) -> int:
    if args.shape is None:
        if args.dtype or args.layout:
            print("info: --dtype and --layout go with --shape", file=sys.stderr)
            return 2
        print(info())
        return 0
    dtype, layout = args.dtype or "float32", args.layout or "channels_last"
    try:
        found = routes(args.shape, _DTYPES[dtype], channels_last=layout == "channels_last")
    except ValueError as error:
        print(f"info: --shape: {error}", file=sys.stderr)
        return 2
    print(info())
    table = Table(title=f"what runs on {'x'.join(map(str, args.shape))}, {dtype}, {layout}")
    table.add_column("op", no_wrap=True)
    for column in ("call", "runs"):
        table.add_column(column, overflow="fold")
    for op, calls in found.items():
        for call, what in calls.items():
            table.add_row(op, call, escape(what))
    Console().print(table)
    return 0


def _verify(args: argparse.Namespace) -> int:
    console = Console()
    run = self_test if args.self_test else verify
    dtypes = [_DTYPES[name] for name in args.dtype] if args.dtype else None
    title = "verify --self-test" if args.self_test else "verify"

    counts = dict.fromkeys(_STYLES, 0)
    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    for op in args.op or OPERATIONS:
        table = Table(title=f"{title}: {op}")
        for column in ("backend", "dtype", "layout", "status"):
            table.add_column(column, no_wrap=True)
        table.add_column("detail", overflow="fold")
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(op)
            for check in run(ops=[op], backends=args.backend, dtypes=dtypes):
                counts[check.status] += 1
                style = _STYLES[check.status]
                where = (check.backend, check.dtype, check.layout)
                table.add_row(*where, f"[{style}]{check.status}[/]", escape(check.detail))
                progress.update(task, description=" ".join((op, *where)))
        console.print(table)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts["failed"]:
        return 1
    if not counts["passed"]:
        console.print("nothing could run: see the reasons above")
        return 1
    return 0


def _convert(args: argparse.Namespace) -> int:
    inputs = None if args.input is None else torch.empty(args.input)
    report = convert(build_model(args.factory), dry_run=args.dry_run, inputs=inputs)
    print(f"{args.factory}{', unchanged (dry run)' if args.dry_run else ''}: {report}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    others, how = (_OF_SUITES, "without") if args.model else (_OF_A_MODEL, "with")
    if wrong := [f"--{n.replace('_', '-')}" for n in others if getattr(args, n)]:
        print(f"bench: {', '.join(wrong)}: only {how} --model", file=sys.stderr)
        return 2
    if args.model and args.input is None:
        print("bench: --model needs --input NxCxHxW, such as 1x3x512x512", file=sys.stderr)
        return 2
    suite = _benchmark_folder()
    needed = () if args.model else ("pytest", "pytest_benchmark", "matplotlib")
    missing = [p for p in needed if not _installed(p)]
    if suite is None or missing:
        reason = f"{', '.join(missing)} not installed" if missing else "no benchmark suite found"
        print(f"bench: {reason}; pip install 'fastfuse[bench]'", file=sys.stderr)
        return 2
    if args.model:
        command = [sys.executable, str(suite / "user_model.py"), args.model]
        command += ["--input", "x".join(map(str, args.input))]
        command += ["--no-training"] if args.no_training else []
        for name in ("dtype", "layout", "out"):
            value = getattr(args, name)
            command += [f"--{name}={value}"] if value is not None else []
        return subprocess.run(command, check=False).returncode
    out = args.out or Path("bench-results")
    command = [sys.executable, str(suite / "report.py"), "--out", str(out)]
    command += ["--quick"] if args.quick else []
    command += [f"--budget={args.budget}"] if args.budget is not None else []
    for name in args.op or ():
        command += ["--op", name]
    return subprocess.run(command, check=False).returncode


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _benchmark_folder() -> Path | None:
    """The suite beside the package in a source tree, or inside it when installed from a wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "benchmarks", here / "_benchmarks"):
        if (folder / "report.py").exists():
            return folder
    return None


def main(argv: Sequence[str] | None = None) -> int:
    spell_out()
    parser = argparse.ArgumentParser(prog="python -m fastfuse", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("info", help="versions, devices, and what each op runs, and why")
    command.add_argument(
        "--shape",
        type=image_shape,
        help="also what runs on images of NxCxHxW, such as 1x512x128x128",
    )
    command.add_argument("--dtype", choices=_DTYPES, help="of those images (default: float32)")
    command.add_argument(
        "--layout",
        choices=_LAYOUTS,
        help="of those images (default: channels_last)",
    )
    command.set_defaults(run=_info)

    def add_op_choice(command: argparse.ArgumentParser, *more: str) -> None:
        names = [*OPERATIONS, *more]
        command.add_argument(
            "--op", action="append", choices=names, help="only this one (repeatable)"
        )

    command = commands.add_parser("verify", help="check every op against its exact definition")
    add_op_choice(command)
    command.add_argument("--backend", action="append", choices=BACKENDS)
    command.add_argument("--dtype", action="append", choices=list(_DTYPES))
    command.add_argument(
        "--self-test", action="store_true", help="plant faults and demand that they are caught"
    )
    command.set_defaults(run=_verify)

    command = commands.add_parser("convert", help="what fastfuse.convert does to a model")
    command.add_argument("factory", help="package.module:factory, or a model there")
    command.add_argument("--dry-run", action="store_true", help="change nothing, and say so")
    command.add_argument("--input", type=image_shape, help="NxCxHxW of images: counts FLOPs")
    command.set_defaults(run=guarded("convert", _convert))

    command = commands.add_parser(
        "bench", help="run the benchmark suite, write a report; or a model before and after convert"
    )
    command.add_argument("--quick", action="store_true", help="the main shapes, in minutes")
    command.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="time that a quick run has, 60 at least (default: 330)",
    )
    add_op_choice(command, *_WHOLE)
    command.add_argument(
        "--out", type=Path, help="output folder (default: bench-results); of a model a JSON file"
    )
    command.add_argument(
        "--model", metavar="PACKAGE.MODULE:FACTORY", help="a model of your own, and not the suite"
    )
    command.add_argument("--input", type=image_shape, help="its images: NxCxHxW")
    command.add_argument("--dtype", choices=_DTYPES, help="of model and images (default: float32)")
    command.add_argument("--layout", choices=_LAYOUTS, help="only this one (default: both)")
    command.add_argument("--no-training", action="store_true", help="its forward pass alone")
    command.set_defaults(run=_bench)

    add_commands(commands)

    args = parser.parse_args(argv)
    return args.run(args)
