"""OpenVINO and ONNX Runtime as rivals of the benchmarks."""

from __future__ import annotations

import importlib.util

import bench_heads
import bench_models
import networks
import pytest
import runtimes
import torch
from agreement import check_agreement
from cell import FORWARD, Cell, compiles, variants_of
from torch import nn

from fastfuse.ops.policy import policy_of

PACKAGES = {
    runtimes.OPENVINO: ("openvino",),
    runtimes.ONNXRUNTIME: ("onnxruntime", "onnx", "onnxscript"),
}


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
@pytest.mark.parametrize("shape", ["UPerHead 64x64", "UPerNet ResNet-50 64x64"])
def test_a_runtime_agrees(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    monkeypatch.setattr(bench_heads, "SIZES", {"64x64": (64, 64)})
    monkeypatch.setattr(bench_models, "IMAGE", (64, 64))
    suite = bench_heads if "Head" in shape else bench_models
    cell = Cell(shape, "float32", FORWARD, ((name, "contiguous"),))
    variants = variants_of(cell, suite.build, "cpu")
    found = check_agreement(variants, networks.tolerances(cell))
    assert [v.name for v in found.usable] == ["fastfuse", "fastfuse", name]
    assert found.left_out == found.wrong == {}


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_calls_compute_anew(name: str) -> None:
    """Of the same images as they are, not what the first call left."""
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    x, model = torch.randn(1, 3, 8, 8), nn.Conv2d(3, 4, 3).eval()
    runtime = runtimes.Runtime(name, model, sequence=False)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(runtime(x), model(x), rtol=1e-4, atol=1e-5)
            x.mul_(2)


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_what_is_not_installed_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(bench_heads, "SIZES", {"64x64": (64, 64)})
    cell = Cell(
        "PSPHead 64x64", "float32", FORWARD, (("eager", "contiguous"), (name, "contiguous"))
    )
    found = check_agreement(variants_of(cell, bench_heads.build, "cpu"), {"output": 1e-3})
    missing = ", ".join(PACKAGES[name])
    assert found.left_out == {
        f"{name}, contiguous": f"ImportError: {missing} not installed: "
        "pip install 'fastfuse[runtimes]'"
    }


def test_dtypes_without_kernels_are_left_out() -> None:
    x, model = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), nn.Conv2d(3, 4, 3).bfloat16()
    refusals = {runtimes.ONNXRUNTIME: "ONNX Runtime's convolutions on CPUs have no bfloat16"}
    if torch.bfloat16 not in policy_of("cpu").native:
        refusals[runtimes.OPENVINO] = "the processor has no instructions for bfloat16"
    for name, message in refusals.items():
        for package in PACKAGES[name]:
            pytest.importorskip(package)
        with pytest.raises(RuntimeError, match=message):
            runtimes.Runtime(name, model, sequence=False)(x)


def test_runtimes_are_rivals_of_forward_passes() -> None:
    for suite in (bench_heads, bench_models):
        for cell in suite.cells(False, "fresh", "cpu"):
            names = {name for name, _ in cell.rivals}
            assert (set(runtimes.RUNTIMES) <= names) == (cell.mode == FORWARD), cell
        quick = {name for cell in suite.cells(True, "fresh", "cpu") for name, _ in cell.rivals}
        assert not any(map(compiles, quick))


def test_plans_leave_what_compiles_for_last() -> None:
    assert all(map(compiles, ("compiled", "compiled, linear", *runtimes.RUNTIMES)))
    assert not compiles("eager")
    assert not compiles("fastfuse")
