"""What ops refuse of GPUs and of tensors on them: the sentence names op, argument, what was
expected and what came. Devices are made up, tensors have no memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastfuse
from fastfuse import BackendError, _cuda, backend, backends
from fastfuse.ops import OPERATIONS, checks
from fastfuse.ops.define import Sample

each_op = pytest.mark.parametrize("op", OPERATIONS)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device of compute capability 9.0; what was found of it is asked anew."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    caches = backends._gpu_failure, _cuda.failure_on
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def sample_of(op: str) -> Sample:
    options = {"device": "cpu", "dtype": torch.float32, "channels_last": True, "small": True}
    return next(iter(OPERATIONS[op].samples(**options)))


OLD: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "capability": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)),
        r"expected compute capability 8\.0 or newer, got 7\.5",
    ),
    "triton": (
        lambda patch: patch.setattr("triton.__version__", "3.5.1+git"),
        r"expected the package triton 3\.6 or newer .*, got 3\.5\.1\+git",
    ),
    "a triton of no number": (
        lambda patch: patch.setattr("triton.__version__", "main"),
        r"expected the package triton 3\.6 or newer .*, got main",
    ),
    "a triton of no version": (
        lambda patch: patch.delattr("triton.__version__"),
        r"expected the package triton 3\.6 or newer .*, got no version",
    ),
    "no triton": (
        lambda patch: patch.setitem(sys.modules, "triton", None),
        r"expected the package triton 3\.6 or newer .*, got ModuleNotFoundError",
    ),
    "ROCm": (
        lambda patch: patch.setattr(torch.version, "hip", "7.0"),
        r"expected an NVIDIA GPU, got ROCm 7\.0",
    ),
}


@each_op
@pytest.mark.parametrize("old", OLD)
def test_old_devices_and_software(op: str, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, message = OLD[old]
    patch(monkeypatch)
    refusal = rf"^{op}: backend 'triton' cannot run: {message}"
    with FakeTensorMode(), backend("triton"), pytest.raises(BackendError, match=refusal):
        backends.select(OPERATIONS[op], torch.empty(1, 3, 4, 5, device="cuda"))


def test_old_devices_run_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(backends, "_logged", set())
    with FakeTensorMode(), caplog.at_level(logging.WARNING, "fastfuse"):
        x = torch.empty(1, 3, 4, 5, device="cuda")
        assert fastfuse.upsample_equalize_concat([x], size=(8, 9)).shape == (1, 3, 8, 9)
    assert "triton: expected compute capability 8.0 or newer, got 7.5" in caplog.text


def test_new_devices_and_software() -> None:
    with FakeTensorMode():
        assert backends.triton_refusal(torch.empty(1, device="cuda")) is None


@pytest.mark.parametrize("error", [0, 209])
def test_a_library_built_for_other_devices(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are left out, wherever they were preferred."""

    def name_of_error(error: Any) -> bytes:
        return b"cudaErrorNoKernelImageForDevice"

    library = SimpleNamespace(
        fastfuse_check_device=lambda: error, fastfuse_error_name=name_of_error
    )
    monkeypatch.setattr(_cuda, "library", library)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    is_preferred = pytest.importorskip("fastfuse.ops.launch_cuda").is_preferred
    with FakeTensorMode():
        image = torch.empty(1, 3, 4, 5, device="cuda:0")
    assert is_preferred("tap_sum", image.device) == (error == 0)
    assert backends.select(OPERATIONS["tap_sum"], image) == ("triton" if error else "cuda")
    refusal = backends.cuda_refusal(image)
    if error:
        assert refusal == (
            "expected fastfuse/lib/_CUDA.so to run on cuda:0, "
            "got cudaErrorNoKernelImageForDevice (209)"
        )
    else:
        assert refusal is None


def test_a_library_of_an_older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_cuda, "FILE", "__init__.py")  # some file that is there
    monkeypatch.setattr(_cuda.ctypes, "PyDLL", lambda path: object())
    assert _cuda._load() == (
        None, "expected fastfuse/__init__.py as this version builds it, got an older one"
    )  # fmt: skip


def test_a_compiled_graph_takes_the_answer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo cannot trace how it was found."""
    torch._dynamo.reset()
    device = torch.device("cuda")

    def step(x: Tensor) -> Tensor:
        return x + 1 if backends._constant_gpu_failure(device) is None else x

    x = torch.zeros(1)
    assert torch.compile(step, fullgraph=True, backend="eager")(x) == 1
    torch._dynamo.reset()
    backends._gpu_failure.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert torch.compile(step, fullgraph=True, backend="eager")(x) == 0


@pytest.mark.parametrize("op", ["fusion_conv2d", "depthwise_conv2d", "upsample_add", "tap_sum"])
def test_traced_for_a_device(op: str) -> None:
    """All of a call, the choice of a backend included, without the device."""
    sample = sample_of(op)

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return sample.call(*inputs)

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        inputs = tuple(mode.from_tensor(tensor).to("cuda:0") for tensor in sample.inputs)
    with backend("triton"):
        program = torch.export.export(Module(), inputs, strict=True)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any(target.startswith(f"fastfuse.{op}") for target in targets)


@each_op
def test_tensors_on_two_devices(op: str) -> None:
    sample = sample_of(op)
    expected = rf"^{op}: \w+ must be on .* device.*; (got one|features\[0\] is) on cuda:[01]"
    for moved in range(1, len(sample.inputs)):
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=expected):
            sample.call(*[
                mode.from_tensor(tensor).to(f"cuda:{int(i == moved)}")
                for i, tensor in enumerate(sample.inputs)
            ])  # fmt: skip


def test_a_target_on_another_device() -> None:
    expected = "^upsample_cross_entropy: target must be on the logits' device cuda:0; .* on cuda:1"
    with FakeTensorMode():
        target = torch.zeros(1, 8, 9, dtype=torch.int64, device="cuda:1")
        logits = torch.empty(1, 3, 4, 5, device="cuda:0")
        with pytest.raises(ValueError, match=expected):
            fastfuse.upsample_cross_entropy(logits, target)


class HostCopies(TorchDispatchMode):
    """Records what is copied from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = [t.device.type for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        written = result.device.type if isinstance(result, Tensor) else "none"
        if {"_to_copy": "cpu", "copy_": "cpu"}.get(func._opname) in devices and written == "cuda":
            self.found.append(func._opname)
        return result


@pytest.mark.parametrize("op", ["upsample_equalize_concat", "fusion_conv2d"])
def test_constants_are_not_copied_from_the_host(op: str) -> None:
    """Which a CUDA graph could not capture; floats are written by kernels."""
    with FakeTensorMode(), HostCopies() as copies, backend("triton"):
        features = [torch.empty(1, 3, 8, 8, device="cuda"), torch.empty(1, 4, 4, 4, device="cuda")]
        more = [torch.empty(5, 7, 3, 3, device="cuda")] if op == "fusion_conv2d" else []
        function = getattr(fastfuse, op)
        out = function(features, *more, mean=[0.5, np.float32(1)], std=[2, 0.25])
        assert out.device.type == "cuda"
        assert copies.found == []
        torch.zeros(3).to("cuda:0")
    assert copies.found == ["_to_copy"]


def test_constants_have_their_values() -> None:
    values = [0.5, 1 / 3, 2, np.float32(0.1), True]
    found = checks._filled(values, torch.device("cpu"))
    assert torch.equal(found, torch.tensor([float(v) for v in values], dtype=torch.float64))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


HUGE = (2, 3, 40_000, 40_000)  # 3.2e9 pixels
PIXELS = r"must have fewer than 2\^31 pixels, of all samples, on GPUs; got 3200000000"
MANY: dict[str, tuple[Callable[[], Any], str]] = {
    "a level": (
        lambda: fastfuse.upsample_equalize_concat([meta(2, 3, 4, 4), meta(*HUGE)], size=(8, 8)),
        rf"upsample_equalize_concat: features\[1\] {PIXELS}",
    ),
    "the size of a concatenation": (
        lambda: fastfuse.upsample_equalize_concat([meta(2, 3, 4, 4)], size=HUGE[2:]),
        rf"upsample_equalize_concat: size {PIXELS}",
    ),
    "the largest height and width": (
        lambda: fastfuse.upsample_equalize_concat([meta(2, 3, 40_000, 4), meta(2, 3, 4, 40_000)]),
        rf"upsample_equalize_concat: size {PIXELS}",
    ),
    "the size of a fusion": (
        lambda: fastfuse.fusion_conv2d([meta(2, 3, 4, 4)], meta(5, 3, 3, 3), size=HUGE[2:]),
        rf"fusion_conv2d: size {PIXELS}",
    ),
    "taps of a fusion": (
        lambda: fastfuse.fusion_conv2d([meta(2, 3, 4, 4)], meta(250_000_000, 3, 3, 3)),
        r"fusion_conv2d: weight must have fewer than 2\^31 taps, of all output channels, on GPUs; "
        r"got 2250000000",
    ),
    "channels of taps": (
        lambda: fastfuse.tap_sum(meta(1, 9 * 250_000_000, 2, 2), size=(4, 4), kernel_size=3),
        r"tap_sum: taps must have fewer than 2\^31 channels on GPUs; got 2250000000",
    ),
    "the size of a tap sum": (
        lambda: fastfuse.tap_sum(meta(2, 9, 2, 2), size=HUGE[2:], kernel_size=3),
        rf"tap_sum: size {PIXELS}",
    ),
    "a finer image": (
        lambda: fastfuse.upsample_add(meta(2, 3, 4, 4), meta(*HUGE)),
        rf"upsample_add: skip {PIXELS}",
    ),
    "classes": (
        lambda: fastfuse.upsample_argmax(meta(2, 3, 4, 4), HUGE[2:]),
        rf"upsample_argmax: size {PIXELS}",
    ),
    "a target": (
        lambda: fastfuse.upsample_cross_entropy(
            meta(2, 3, 4, 4), meta(2, *HUGE[2:], dtype=torch.int64)
        ),
        rf"upsample_cross_entropy: target {PIXELS}",
    ),
    "an image": (
        lambda: fastfuse.depthwise_conv2d(meta(*HUGE), meta(3, 1, 3, 3)),
        rf"depthwise_conv2d: x {PIXELS}",
    ),
    "a depthwise weight": (
        lambda: fastfuse.depthwise_conv2d(meta(1, 250_000_000, 1, 1), meta(250_000_000, 1, 3, 3)),
        r"depthwise_conv2d: weight must have fewer than 2\^31 values on GPUs; got 2250000000",
    ),
}


@pytest.mark.parametrize("case", MANY)
def test_more_than_integers_count(case: str) -> None:
    call, message = MANY[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("op", ["ced_block", "lr_ced_block"])
def test_blocks_of_too_many_pixels(op: str) -> None:
    sample = sample_of(op)
    with pytest.raises(ValueError, match=f"^{op}: x {PIXELS}"):
        sample.call(meta(*HUGE), *[tensor.to("meta") for tensor in sample.inputs[1:]])
