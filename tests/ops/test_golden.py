"""Every backend against golden float64 files, so that reference and kernels cannot drift together.

The files are written by ``tests/ops/golden/make_<op>.py``, which share no code with either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfuse
from fastfuse.backends import backend_refusals
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
    probe = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device)
    refusals = backend_refusals(OPERATIONS[op], probe)
    if backend not in refusals or refusals[backend]:
        pytest.skip(f"{backend}: {refusals.get(backend, 'no such backend of this op')}")


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=TOLERANCE, atol=TOLERANCE)


every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_backend = pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("reference", "cpu"),
        ("cpu", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("reference", "triton")),
    ],
)


@every_layout
@every_backend
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


def cases_of(op: str) -> list[str]:
    return [name for name in golden("fusion_conv2d") if name.startswith(f"{op}, ")]


@every_layout
@every_backend
@pytest.mark.parametrize("name", cases_of("tap_sum"))
def test_tap_sum(name: str, backend: str, device: str, layout: str) -> None:
    skip_unless_it_runs("tap_sum", backend, device)
    case = golden("fusion_conv2d")[name]
    taps = tensor(case["taps"], case["taps_shape"], device, layout).requires_grad_()
    offsets = torch.tensor(case["offsets"], dtype=torch.float64, device=device, requires_grad=True)
    how = {key: case[key] for key in ("kernel_size", "padding", "align_corners")}
    with fastfuse.backend(backend):
        output = fastfuse.tap_sum(taps, case["size"], offsets=offsets, **how)
        output.backward(tensor(case["grad_output"], case["output_shape"], device, layout))

    close(output.detach(), tensor(case["output"], case["output_shape"], device, layout))
    assert taps.grad is not None
    assert offsets.grad is not None
    close(taps.grad, tensor(case["taps_gradient"], case["taps_shape"], device, layout))
    close(offsets.grad, torch.tensor(case["offsets_gradient"], dtype=torch.float64).to(device))


@every_layout
@every_backend
@pytest.mark.parametrize("name", cases_of("fusion_conv2d"))
def test_fusion_conv2d(name: str, backend: str, device: str, layout: str) -> None:
    skip_unless_it_runs("fusion_conv2d", backend, device)
    case = golden("fusion_conv2d")[name]
    features = [
        tensor(values, shape, device, layout).requires_grad_()
        for values, shape in zip(case["features"], case["shapes"], strict=True)
    ]
    weight = tensor(case["weight"], case["weight_shape"], device, layout).requires_grad_()
    bias = torch.tensor(case["bias"], dtype=torch.float64, device=device, requires_grad=True)
    how = {key: case[key] for key in ("size", "mean", "std", "padding", "align_corners")}
    with fastfuse.backend(backend):
        output = fastfuse.fusion_conv2d(features, weight, bias, **how)
        output.backward(tensor(case["grad_output"], case["output_shape"], device, layout))

    close(output.detach(), tensor(case["output"], case["output_shape"], device, layout))
    expected = [*case["gradients"], case["weight_gradient"], case["bias_gradient"]]
    for leaf, values in zip([*features, weight, bias], expected, strict=True):
        assert leaf.grad is not None
        close(leaf.grad, torch.tensor(values, dtype=torch.float64).to(device).view(leaf.shape))


@every_layout
@every_backend
@pytest.mark.parametrize("name", golden("depthwise_conv2d"))
def test_depthwise_conv2d(name: str, backend: str, device: str, layout: str) -> None:
    skip_unless_it_runs("depthwise_conv2d", backend, device)
    case = golden("depthwise_conv2d")[name]
    x = tensor(case["x"], case["shape"], device, layout).requires_grad_()
    weight = tensor(case["weight"], case["weight_shape"], device, layout).requires_grad_()
    leaves = [x, weight]
    if case["bias"] is not None:
        leaves.append(
            torch.tensor(case["bias"], dtype=torch.float64, device=device, requires_grad=True)
        )
    with fastfuse.backend(backend):
        output = fastfuse.depthwise_conv2d(*leaves, dilation=case["dilation"])
        output.backward(tensor(case["grad_output"], case["shape"], device, layout))

    close(output.detach(), tensor(case["output"], case["shape"], device, layout))
    for leaf, of in zip(leaves, ("gradient", "weight_gradient", "bias_gradient"), strict=False):
        assert leaf.grad is not None
        close(leaf.grad, torch.tensor(case[of], dtype=torch.float64).to(device).view(leaf.shape))


@every_layout
@every_backend
@pytest.mark.parametrize("name", golden("upsample_add"))
def test_upsample_add(name: str, backend: str, device: str, layout: str) -> None:
    skip_unless_it_runs("upsample_add", backend, device)
    case = golden("upsample_add")[name]
    x = tensor(case["x"], case["shape"], device, layout).requires_grad_()
    skip = tensor(case["skip"], case["output_shape"], device, layout).requires_grad_()
    with fastfuse.backend(backend):
        output = fastfuse.upsample_add(x, skip, align_corners=case["align_corners"])
        output.backward(tensor(case["grad_output"], case["output_shape"], device, layout))

    close(output.detach(), tensor(case["output"], case["output_shape"], device, layout))
    assert x.grad is not None
    assert skip.grad is not None
    close(x.grad, tensor(case["gradient"], case["shape"], device, layout))
    close(skip.grad, tensor(case["grad_output"], case["output_shape"], device, layout))


@every_layout
@every_backend
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("name", golden("ced_block"))
def test_blocks(name: str, recompute: bool, backend: str, device: str, layout: str) -> None:
    """Derivatives of the file are differences in 60 digits."""
    op = name.partition(",")[0]
    skip_unless_it_runs(op, backend, device)
    case = golden("ced_block")[name]
    x, *parameters = (
        torch.tensor(values, dtype=torch.float64, device=device).view(shape)
        for values, shape in zip(case["inputs"], case["shapes"], strict=True)
    )
    x = x.contiguous(memory_format=LAYOUTS[layout])
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    options = {"eps": case["eps"], "recompute": recompute}
    if case["dilation"] is not None:
        options["dilation"] = case["dilation"]
    if case["keep"] is not None:
        options["keep"] = torch.tensor(case["keep"], dtype=torch.float64, device=device)
    with fastfuse.backend(backend):
        output = getattr(fastfuse, op)(*leaves, **options)
        output.backward(tensor(case["grad_output"], case["shapes"][0], device, layout))

    close(output.detach(), tensor(case["output"], case["shapes"][0], device, layout))
    for leaf, values in zip(leaves, case["gradients"], strict=True):
        assert leaf.grad is not None
        close(leaf.grad, torch.tensor(values, dtype=torch.float64).to(device).view(leaf.shape))
