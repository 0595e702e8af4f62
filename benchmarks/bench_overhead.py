"""Tiny calls of every op, whose time is that of checks, choices and autograd: one thread.

Shapes are the suites' own "tiny" ones, of a few hundred values; the rival is eager PyTorch's
composition. Not in quick runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import bench_ced_block
import bench_depthwise_conv2d
import bench_fusion_conv2d
import bench_lr_ced_block
import bench_tap_sum
import bench_upsample_add
import bench_upsample_argmax
import bench_upsample_cross_entropy
import bench_upsample_equalize_concat
import counts
import torch
from cell import BOTH, FORWARD, TINY_ROUNDS, Cell
from measure import Allowance, Measurement, compare
from variants import CONTIGUOUS, Variant, random_tensors, tensors

import fastfuse
from fastfuse.ops.tap_sum.reference import reference as summed_taps
from fastfuse.tolerances import tolerance

__all__ = ["SHAPES", "Cell", "build", "cells", "work"]

OP = "overhead"
# The suite of an op, and what it calls eager PyTorch.
SHAPES: dict[str, tuple[ModuleType, str]] = {
    "upsample_equalize_concat": (bench_upsample_equalize_concat, "eager"),
    "tap_sum": (bench_tap_sum, "eager"),
    "fusion_conv2d": (bench_fusion_conv2d, "eager"),
    "depthwise_conv2d": (bench_depthwise_conv2d, "eager"),
    "ced_block": (bench_ced_block, "eager, linear"),
    "lr_ced_block": (bench_lr_ced_block, "eager, linear"),
    "upsample_add": (bench_upsample_add, "eager"),
    "upsample_argmax": (bench_upsample_argmax, "eager"),
    "upsample_cross_entropy": (bench_upsample_cross_entropy, "eager"),
}
WITHOUT_DERIVATIVE = ("upsample_argmax",)


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if quick or regime != "fresh":
        return []
    return [
        Cell(op, "float32", mode, (("eager", CONTIGUOUS),))  # whose shape is an op's name
        for op in SHAPES
        for mode in (FORWARD, BOTH)
        if mode == FORWARD or op not in WITHOUT_DERIVATIVE
    ]


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> Callable[[], Any]:
    suite, eager = SHAPES[shape]
    if suite is bench_tap_sum and mode == BOTH:
        return _tap_sum(name, layout, dtype, device)
    name = eager if name == "eager" else name
    return suite.build(name, layout, "tiny", dtype, mode, device)


def _tap_sum(name: str, layout: str, dtype: str, device: str) -> Callable[[], Any]:
    """Whose suite has forward and backward alone."""
    random, what = random_tensors(name, layout, dtype, device), bench_tap_sum.SHAPES["tiny"]
    k, size = what.kernel_size, what.output_shape[2:]
    taps = random(*what.taps_shape).requires_grad_()
    gradient = random(*what.output_shape)

    def both() -> tuple[torch.Tensor, ...]:
        if name == "fastfuse":
            output = fastfuse.tap_sum(taps, size, kernel_size=k)
        else:
            output = summed_taps(taps, None, size, k, k // 2)
        return output.detach(), *torch.autograd.grad(output, taps, gradient)

    return both


work = partial(counts.work, build)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def test_overhead(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    variants = [
        Variant(
            name,
            build(name, CONTIGUOUS, cell.shape, cell.dtype, cell.mode, device),
            rival=name != "fastfuse",
        )
        for name in ("fastfuse", *(rival for rival, _ in cell.rivals))
    ]
    with one_thread():
        results = tensors(variants[0].call())
        close = tolerance(torch.float32, roundings=16, reduction=64)
        measured = Measurement(
            variants,
            info={
                "op": OP,
                "shape": cell.shape,
                "dtype": cell.dtype,
                "mode": cell.mode,
                "series": "overhead",
            },
            tolerances={f"result {i}": close for i in range(len(results))},
            budget_s=1,
            max_rounds=TINY_ROUNDS,
            device=device,
            host=True,
        )
        assert compare(benchmark, measured, allowance)["variants"]
