"""The policy: what follows from a machine's facts, and that everything follows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import images

import fastfuse
from fastfuse import _extension
from fastfuse._info import routes
from fastfuse.backends import DTYPES
from fastfuse.ops import OPERATIONS, policy
from fastfuse.ops.costs import CPU_COSTS
from fastfuse.ops.policy import CPU_CLASSES, Machine, cpu_policy, policy_of, use_isa, use_policy
from fastfuse.tolerances import relative_error, tolerance

KIB, MIB = 1 << 10, 1 << 20
MACHINES = {
    "Zen 3": Machine("avx2", "AuthenticAMD", 2, 32 * KIB, 512 * KIB, 32 * MIB),
    "Zen 4": Machine("avx512_bf16", "AuthenticAMD", 2, 32 * KIB, MIB, 32 * MIB, True),
    "Skylake": Machine("avx512", "GenuineIntel", 8, 32 * KIB, MIB, 11 * MIB, True),
    "unknown": Machine(),
}
needs_module = pytest.mark.skipif(_extension.module is None, reason="needs the compiled module")


# ---- facts --------------------------------------------------------------------------------------


def test_caches_as_the_system_tells_them(tmp_path: Path) -> None:
    for index, (kind, level, size) in enumerate(
        [
            ("Data", 1, "48K"),
            ("Instruction", 1, "32K"),
            ("Unified", 2, "2048K"),
            ("Unified", 3, "1G"),
        ]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "index9").mkdir()  # tells nothing
    for name, value in (("type", "Unified"), ("level", "4"), ("size", "0K")):
        (tmp_path / "index9" / name).write_text(value)
    assert policy._cache_sizes(tmp_path) == {1: 48 * KIB, 2: 2 * MIB, 3: 1 << 30}
    assert policy._cache_sizes(tmp_path / "none") == {}


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(policy, "_CACHES", tmp_path)
    machine = Machine.here()
    assert (machine.l1, machine.l2, machine.l3) == (32 * KIB, 512 * KIB, 8 * MIB)
    assert cpu_policy(machine).kernels is not None


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_sizes_follow_from_the_caches(machine: Machine) -> None:
    found = cpu_policy(machine)
    assert found.kernels is not None
    assert found.kernels.ring_bytes == 768 * KIB
    assert found.kernels.depthwise_ring_bytes < machine.l1
    assert found.taps_bytes <= machine.l3
    larger = cpu_policy(dataclasses.replace(machine, l1=2 * machine.l1, l2=4 * MIB))
    assert larger.kernels is not None
    assert larger.kernels.ring_bytes == 3 * MIB
    assert larger.kernels.depthwise_ring_bytes == 2 * found.kernels.depthwise_ring_bytes


def test_dtypes_with_products_of_their_own() -> None:
    wide = {torch.float64, torch.float32}
    assert {name: cpu_policy(machine).native for name, machine in MACHINES.items()} == {
        "Zen 3": wide,
        "Zen 4": wide | {torch.bfloat16},
        "Skylake": wide,  # emulated: slower than float32
        "unknown": wide,
    }
    assert policy_of("cuda").native == set(DTYPES)


def test_an_unknown_class() -> None:
    with pytest.raises(ValueError, match=r"machine.isa must be .*portable, avx2.*; got 'neon'"):
        cpu_policy(Machine(isa="neon"))
    assert set(CPU_CLASSES) >= set(_extension.module.supported_isas() if _extension.module else [])


@needs_module
def test_kernels_are_told(isa: str) -> None:
    assert _extension.module is not None
    found = policy_of("cpu")
    assert found.machine is not None
    assert found.machine.isa == isa
    assert found.kernels is not None
    assert _extension.module.sizes() == dataclasses.asdict(found.kernels)
    sizes = dataclasses.replace(found.kernels, grain=7)
    with use_policy(found, kernels=sizes):
        assert _extension.module.sizes()["grain"] == 7
    assert _extension.module.sizes()["grain"] == found.kernels.grain


@needs_module
def test_an_unknown_instruction_set_changes_nothing() -> None:
    before = policy_of("cpu")
    with pytest.raises(ValueError, match="expected an instruction set"), use_isa("sse9"):
        pass
    assert policy_of("cpu") is before


def test_policies_entered_and_left_by_threads() -> None:
    """Left in the order in which they were entered: what was in force at first is again."""
    usual = policy_of("cpu")
    first, second = (use_policy(usual, little_macs=n) for n in (1, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert policy_of("cpu").little_macs == 2
    second.__exit__(None, None, None)
    assert policy_of("cpu") is usual


# ---- routes -------------------------------------------------------------------------------------


def ops_of(call: Callable[[], Any]) -> set[str]:
    """Names of the ops that a call runs, as the dispatcher sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


@needs_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fusion_follows_the_policy(dtype: torch.dtype) -> None:
    levels = images((1, 64, 32, 32), (1, 64, 8, 8), dtype=dtype, channels_last=True)
    weight = (torch.randn(64, 128, 3, 3) / 34).to(dtype)
    usual = policy_of("cpu")
    anywhere = policy.WinogradRule(channels=1, pixels=0, work=0)
    expected = fastfuse.upsample_equalize_concat(levels).double()
    expected = torch.conv2d(expected, weight.double(), padding=1)

    def run(**changes: Any) -> set[str]:
        results = []
        with use_policy(usual, **changes):
            ops = ops_of(lambda: results.append(fastfuse.fusion_conv2d(levels, weight)))
        assert relative_error(results[0], expected) <= tolerance(dtype, reduction=1152, roundings=2)
        return ops

    assert "fastfuse::fusion_conv2d" not in run(little_macs=10**12)
    ops = run(little_macs=0, winograd={dtype: anywhere})
    assert {"fastfuse::winograd_product", "fastfuse::tap_sum_into"} <= ops
    ops = run(little_macs=0, winograd={})
    assert "fastfuse::winograd_product" not in ops
    assert "fastfuse::tap_sum_into" in ops
    dear = dataclasses.replace(CPU_COSTS, tap_macs=10**9)
    ops = run(little_macs=0, winograd={}, fusion_costs={dtype: dear})
    assert "fastfuse::tap_sum_into" not in ops


@needs_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_a_processor_without_the_dtype_are_float32(dtype: torch.dtype) -> None:
    """No product of a block, a fusion or a convolution has the narrow dtype."""
    products = {"aten::mm", "aten::addmm", "aten::convolution", "mkldnn::_linear_pointwise"}
    found: set[torch.dtype] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.name().partition(".")[0] in (*products, "aten::convolution_backward"):
                found.update(t.dtype for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    block = fastfuse.nn.CEDBlock(16).to(dtype)
    fusion = fastfuse.nn.MultiLevelFusion([16, 16], 16).to(dtype)
    convolution = fastfuse.nn.Conv2d(16, 16, 3, stride=2, padding=1).to(dtype)
    levels = images((2, 16, 16, 16), (2, 16, 8, 8), dtype=dtype)
    machine = dataclasses.replace(Machine.here(), onednn_bfloat16=False)
    with use_policy(cpu_policy(machine), little_macs=0), Watch():
        for call in (block, convolution, lambda x: fusion([x, levels[1]])):
            x = levels[0].clone().requires_grad_()
            y = call(x)
            assert y.dtype == dtype
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.dtype == dtype
    assert found == {torch.float32}


@needs_module
def test_depthwise_convolution_follows_the_policy() -> None:
    (x,), weight = images((1, 32, 24, 24), channels_last=True), torch.randn(32, 1, 7, 7)
    for library in (False, True):
        with use_policy(policy_of("cpu"), library_depthwise=lambda *_, answer=library: answer):
            ops = ops_of(lambda: fastfuse.depthwise_conv2d(x, weight))
            described = routes(x.shape)["depthwise_conv2d"]["7x7, dilation 1, without derivatives"]
        assert ("fastfuse::depthwise_conv2d" in ops) != library
        assert described == ("oneDNN" if library else "cpu")


@needs_module
def test_depthwise_rules_of_two_classes() -> None:
    (large,) = images((1, 16, 256, 256), channels_last=True)
    name = "{0}x{0}, dilation 1, without derivatives".format
    expected = {"Zen 3": {3: "oneDNN", 7: "cpu"}, "Zen 4": {3: "oneDNN", 7: "oneDNN"}}
    for machine, kernels in expected.items():
        with use_policy(cpu_policy(MACHINES[machine])):
            told = routes(large.shape)["depthwise_conv2d"]
            assert {k: told[name(k)] for k in kernels} == kernels
            narrow = routes(large.shape, torch.bfloat16)["depthwise_conv2d"][name(3)]
            assert narrow == ("oneDNN" if machine == "Zen 4" else "cpu")


@needs_module
@pytest.mark.parametrize("shape", [(1, 512, 128, 128), (1, 8, 4, 4), (2, 7, 33, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_tells_its_routes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = routes(shape, dtype)
    assert set(found) == set(OPERATIONS)
    assert all(calls and all(calls.values()) for calls in found.values())
    with fastfuse.backend("reference"):
        for calls in routes(shape, dtype).values():
            assert set(calls.values()) == {"reference"}


@needs_module
def test_small_calls_are_told_apart() -> None:
    name = "3x3 of 4 levels, each half as large"
    assert routes((1, 8, 4, 4))["fusion_conv2d"][name] == "reference, for so little work"
    large = routes((1, 512, 128, 128))["fusion_conv2d"][name]
    assert "128x128 by Winograd's F(4x4, 3x3) in float32" in large
    assert "64x64 at its own resolution" in large
    with use_policy(cpu_policy(MACHINES["Zen 3"])):
        told = routes((1, 96, 128, 128), torch.bfloat16)["ced_block"]["hidden 4 C"]
    assert "products in float32" in told


@pytest.mark.parametrize("shape", [(512, 128), (1, 0, 4, 4), (1, 2, 3, 4, 5)])
def test_shapes_that_no_op_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape must be N, C, H, W, each at least 1, .*; got"):
        routes(shape)


def test_shapes_beyond_memory() -> None:
    with pytest.raises(ValueError, match=r"shape must have fewer than 2\^63 bytes; got"):
        routes((10**8, 10**8, 10**7, 10**8))


def test_routes_of_a_backend_that_cannot_run() -> None:
    with fastfuse.backend("triton"):
        told = routes((1, 8, 4, 4))
    expected = "none (tap_sum: backend 'triton' cannot run: expected CUDA tensors, got cpu)"
    assert told["tap_sum"] == {"": expected}


def test_dtypes_that_no_op_takes() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of float64, .*; got torch.int32"):
        routes((1, 2, 3, 4), torch.int32)
