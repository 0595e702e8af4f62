"""Every backend against golden float64 files, so that reference and kernels cannot drift together.

The files are written by ``tests/golden/make_<op>.py``, which share no code with either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfuse
from fastfuse.backends import explain
from fastfuse.ops import OPERATIONS

GOLDEN = Path(__file__).with_name("golden")
TOLERANCE = 1e-12  # absolute and relative: coordinates and sums are rounded, the files are exact
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def golden(op: str) -> dict[str, dict[str, Any]]:
    return json.loads((GOLDEN / f"{op}.json").read_text())


def tensor(values: list[float], shape: list[int], device: str, layout: str) -> Tensor:
    result = torch.tensor(values, dtype=torch.float64, device=device).reshape(shape)
    return result.contiguous(memory_format=LAYOUTS[layout])


def skip_unless_it_runs(op: str, backend: str, device: str) -> None:
    if backend == "reference":
        return
    refusals = explain(OPERATIONS[op], torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device))
    if backend not in refusals or refusals[backend]:
        pytest.skip(f"{backend}: {refusals.get(backend, 'no such backend of this op')}")


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("reference", "cpu"),
        ("cpu", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("reference", "triton")),
    ],
)
@pytest.mark.parametrize("name", golden("upsample_equalize_concat"))
def test_upsample_equalize_concat(name: str, backend: str, device: str, layout: str) -> None:
    """Forward and gradients equal exact rational arithmetic, rounded once, to 1e-12."""
    skip_unless_it_runs("upsample_equalize_concat", backend, device)
    case = golden("upsample_equalize_concat")[name]
    features = [
        tensor(values, shape, device, layout).requires_grad_()
        for values, shape in zip(case["features"], case["shapes"], strict=True)
    ]
    with fastfuse.backend(backend):
        output = fastfuse.upsample_equalize_concat(
            features,
            size=case["size"],
            mean=case["mean"],
            std=case["std"],
            align_corners=case["align_corners"],
        )
        output.backward(tensor(case["grad_output"], case["output_shape"], device, layout))

    close(output.detach(), tensor(case["output"], case["output_shape"], device, layout))
    for feature, values in zip(features, case["gradients"], strict=True):
        assert feature.grad is not None
        close(feature.grad, tensor(values, list(feature.shape), device, layout))
