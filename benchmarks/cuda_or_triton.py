"""Where CUDA C++ or Triton is faster, by the report of a GPU: the policy has it in ``cuda_ops``.

python benchmarks/cuda_or_triton.py REPORT.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from variants import BY_TRITON

Ratio = tuple[str, str, float]  # op, cell and layout, Triton's time over CUDA's


def ratios(cells: list[dict[str, Any]]) -> Iterator[Ratio]:
    for cell in cells:
        times = {
            (v["name"], v["layout"]): v["median_ms"]
            for v in cell["variants"]
            if not v.get("rival", True)
        }
        for (name, layout), time in times.items():
            other = times.get((name + BY_TRITON, layout))
            if other is not None:
                what = ", ".join((cell["shape"], cell["dtype"], cell["mode"], layout))
                yield cell["op"], what, other / time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    found = list(ratios(json.loads(parser.parse_args().report.read_text())["cells"]))
    if not found:
        print("no cell has both: the report is not of a GPU, or fastfuse has no CUDA library")
        return 1
    by_op: dict[str, list[float]] = {}
    for op, what, ratio in found:
        by_op.setdefault(op, []).append(ratio)
        print(f"{op:24} {what:60} {ratio:.2f}x")
    for op, values in by_op.items():
        mean = geometric_mean(values)
        faster = "CUDA C++" if mean > 1 else "Triton"
        print(f"{op}: {faster}, geometric mean of Triton's time over CUDA's {mean:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
