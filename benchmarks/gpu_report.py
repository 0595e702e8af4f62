"""What can be counted of every Triton kernel without a device.

PYTHONPATH=.:tests/support python benchmarks/gpu_report.py --only tap_sum
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from gpu_bounds import DEVICES, H100, WARP, binding, bounds, resident_programs
from gpu_cases import CASES, Case
from gpu_counts import COUNTED_ON, assembled, counted
from triton_offline import recorded_programs


def launches_of(case: Case, layout: str, dtype: str) -> list[dict[str, Any]]:
    """The counts of each launch of a call."""
    rows = []
    for launch, programs in recorded_programs(lambda: case.call(layout, getattr(torch, dtype))):
        made = assembled(launch, COUNTED_ON)
        counts = counted(launch, programs)
        resident = resident_programs(made["registers"], made["shared"], counts["threads"], H100)
        rows.append(
            {
                "kernel": launch[0].__name__.strip("_"),
                "registers": made["registers"],
                "stack": made["stack"],
                "shared": made["shared"],
                "warps": resident * counts["threads"] // WARP,
                "waves": round(programs / (resident * H100.multiprocessors), 2),
                **counts,
            }
        )
    return rows


def line_of(row: dict[str, Any], itemsize: int) -> str:
    found = {device: bounds(row, device) for device in DEVICES}
    outputs = row["stores"]["useful_bytes"] / itemsize
    useful = {
        name: row[name]["useful_bytes"] / max(row[name]["moved"] * 32, 1)
        for name in ("loads", "stores")
    }
    us = " ".join(f"{name} {value * 1e6:.1f}" for name, value in found[H100].items())
    return (
        f"  {row['kernel']:26} programs {row['programs']:6} regs {row['registers']:3} "
        f"spill {row['stack']} warps/SM {row['warps']:2} waves {row['waves']:6.2f} | "
        f"useful ld {useful['loads']:.2f} st {useful['stores']:.2f} | "
        f"bank x{row['shared']['moved'] / max(row['shared']['least'], 1):.2f} | "
        f"instr/32 outputs {row['instructions'] * 32 / max(outputs, 1):6.1f} "
        f"(ptx {row['ptx_instructions'] * 32 / max(outputs, 1):6.1f}) | "
        f"us H100: {us} -> {binding(found[H100])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="what the names of cases contain")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.only not in case.name:
            continue
        for layout in case.layouts:
            for dtype in case.dtypes:
                if dtype not in arguments.dtypes.split(","):
                    continue
                start = time.perf_counter()
                rows = launches_of(case, layout, dtype)
                took = time.perf_counter() - start
                print(f"{case.name}, {layout} {dtype}: {len(rows)} launches ({took:.1f} s)")
                for row in rows:
                    print(line_of(row, getattr(torch, dtype).itemsize), flush=True)


if __name__ == "__main__":
    main()
