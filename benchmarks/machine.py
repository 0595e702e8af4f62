"""What a report says about where it was measured: the code, the processor, and what forces it."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import rates
import torch

import fastfuse

__all__ = ["FORCED", "describe", "environment"]

HERE = Path(__file__).resolve().parent
CPU = Path("/sys/devices/system/cpu/cpu0/cache")
# Variables that make a library take a lower class of instructions than the processor has.
FORCED = ("FASTFUSE_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def environment(device: str) -> dict[str, Any]:
    rates.plain_float32()
    info = fastfuse.info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(HERE.parent),
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "versions": info.versions,
        "backends": {op: info.backend_of(op, d) for op, d in _first(info, device).items()},
        "isa": info.isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "caches": caches(CPU),
        "forced": {name: os.environ[name] for name in FORCED if name in os.environ},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gemm_gflops": {
            str(dtype).removeprefix("torch."): rates.gemm_rate(device, dtype) / 1e9
            for dtype in DTYPES
        },
    }


def commit(root: Path) -> str:
    """Of the checkout at ``root``, and whether it has changes that are not committed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "not a git checkout"
        state = "with changes" if git("status", "--porcelain") else "clean"
        return f"{git('rev-parse', 'HEAD')}, {state}"
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def caches(folder: Path) -> dict[str, str]:
    """Sizes of the first core's, such as {"L1 data": "32K"}; none where the system has no list."""
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        kind = "" if kind == "Unified" else f" {kind.lower()}"
        found[f"L{level}{kind}"] = size
    return found


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1] if match else "unknown CPU"


def _first(info: fastfuse.Info, device: str) -> dict[str, str]:
    """op -> the first device of a kind."""
    found = {}
    for op, devices in info.operations.items():
        found[op] = next(name for name in devices if name.startswith(device))
    return found


def describe(e: dict[str, Any]) -> list[str]:
    products = ", ".join(f"{rate:.3g} GFLOP/s in {name}" for name, rate in e["gemm_gflops"].items())
    copy = f"{e['copy_gbs']:.3g}" if e["copy_gbs"] else "?"
    lines = [
        f"{e['date']}, {e['name']}, {e['threads']} threads on {e['cores']} cores",
        f"instruction set {e['isa']} (PyTorch: {e['torch_isa']}), caches "
        + (", ".join(f"{name} {size}" for name, size in e["caches"].items()) or "unknown"),
        f"commit: {e['commit']}",
        ", ".join(f"{name} {version}" for name, version in e["versions"].items()),
        "backends: " + ", ".join(f"{op}: {name}" for op, name in e["backends"].items()),
        f"measured roofs: copy {copy} GB/s read and written, GEMM {products}",
    ]
    if e["forced"]:
        lines.insert(2, "forced: " + ", ".join(f"{n}={v}" for n, v in e["forced"].items()))
    return lines
