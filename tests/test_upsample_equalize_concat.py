"""upsample_equalize_concat, in the order: values, inputs, derivatives, PyTorch's machinery,
determinism, memory, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastfuse
from fastfuse import backend, upsample_equalize_concat
from fastfuse.backends import DTYPES, BackendError
from fastfuse.ops.upsample_equalize_concat.samples import exact, samples
from fastfuse.tolerances import relative_error, tolerance
from fastfuse.verify import check_sample

OP = "upsample_equalize_concat"
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def images(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(s).to(dtype).contiguous(memory_format=memory_format) for s in shapes]


def pyramid(**options: Any) -> list[Tensor]:
    return images((2, 20, 12, 16), (2, 17, 6, 8), (2, 5, 3, 4), **options)


# ---- values -------------------------------------------------------------------------------------


@both_layouts
@every_dtype
def test_equals_the_definition(isa: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Output and gradients of the CPU kernels, on every instruction set."""
    with backend("cpu"):
        for small in (True, False):
            for sample in samples(
                device="cpu", dtype=dtype, channels_last=channels_last, small=small
            ):
                check_sample(sample)


def test_reference_is_what_a_user_would_write() -> None:
    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4), dtype=torch.float64)
    up = F.interpolate(p3, size=(8, 8), mode="bilinear", align_corners=False)
    expected = torch.cat([(p2 - 0.5) / 2.0, (up - 0.25) / 4.0], dim=1)
    for name in ("reference", "cpu"):
        with backend(name):
            result = upsample_equalize_concat([p2, p3], mean=[0.5, 0.25], std=[2.0, 4.0])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


@both_layouts
def test_a_level_of_the_target_size_passes_unchanged(channels_last: bool) -> None:
    (x,) = images((2, 7, 5, 9), channels_last=channels_last)
    result = upsample_equalize_concat([x])
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("std", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value(isa: str, dtype: torch.dtype, std: float) -> None:
    """All 65536 bit patterns are widened, divided and rounded as PyTorch does."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(1, 1, 256, 256)
    with backend("cpu"):
        result = upsample_equalize_concat([x], std=[std])
    expected = (x.float() * (1 / torch.tensor(std, dtype=torch.float64)).float()).to(dtype)
    assert torch.equal(result.isnan(), expected.isnan())
    same = (result.view(torch.int16) == expected.view(torch.int16)) | expected.isnan()
    if isa == "avx512_bf16" and dtype == torch.bfloat16:  # takes subnormal values for zero
        same |= (expected.abs() < torch.finfo(dtype).tiny) & (result == 0)
    assert same.all()


@every_dtype
def test_large_values_do_not_overflow(isa: str, dtype: torch.dtype) -> None:
    largest = 0.9 * torch.finfo(dtype).max  # differences overflow, interpolated values do not
    x = torch.tensor([largest, -largest] * 8, dtype=dtype).reshape(1, 1, 4, 4)
    with backend("cpu"):
        output = upsample_equalize_concat([x], size=(9, 11))
    assert output.isfinite().all()
    assert output.abs().max() <= x.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(1, 40)),
        min_size=1,
        max_size=5,
    ),
    size=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(0, 3),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_levels(
    levels: list[tuple[int, int, int]],
    size: tuple[int, int] | None,
    batch: int,
    align_corners: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    """Random channels (none too), sizes and ratios: values, gradients and shapes."""
    features = images(*((batch, *s) for s in levels), dtype=dtype, channels_last=channels_last)
    leaves = [f.requires_grad_() for f in features]
    doubles = [f.detach().double().requires_grad_() for f in features]
    mean = torch.randn(len(levels)).tolist()
    std = (torch.rand(len(levels)) + 0.5).tolist()
    with backend("cpu"):
        output = upsample_equalize_concat(
            leaves, size=size, mean=mean, std=std, align_corners=align_corners
        )
    expected = exact(tuple(doubles), size, mean, std, align_corners, dtype)
    assert relative_error(output.detach(), expected.detach()) <= tolerance(dtype)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    exact_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact_gradient) <= tolerance(dtype, reduction=1600)


@both_layouts
@pytest.mark.parametrize("width", [16, 128, 144])
def test_streaming_stores_write_the_same_bits(channels_last: bool, width: int) -> None:
    """Outputs of 16 MiB or more bypass the caches; smaller batches of the same images do not."""
    features = images((40, 64, 32, width), (40, 32, 16, width // 2), channels_last=channels_last)
    whole = upsample_equalize_concat(features)
    assert whole.numel() * 4 >= 16 << 20 or width == 16
    for i in range(0, 40, 13):
        part = upsample_equalize_concat([f[i : i + 1] for f in features])
        assert torch.equal(whole[i : i + 1], part)


# ---- inputs -------------------------------------------------------------------------------------


@both_layouts
@every_dtype
def test_any_strides(dtype: torch.dtype, channels_last: bool) -> None:
    """Sliced, flipped, transposed, expanded and mixed inputs equal their dense copies."""
    a, b = images((4, 40, 24, 32), (2, 24, 20, 12), dtype=dtype, channels_last=channels_last)
    variants = {
        "sliced": [a[::2, 3:23, 4:16, ::2], b[:, ::2, 2:8, 1:9]],
        "transposed": [a[:2].transpose(2, 3), b.transpose(2, 3)],
        "expanded": [a[:2, :1].expand(-1, 7, -1, -1), b[:, :, :1, :1].expand(-1, -1, 5, 6)],
        "expanded batch": [a[:1].expand(2, -1, -1, -1), b],
        "mixed layouts": [a[:2].contiguous(), b.contiguous(memory_format=torch.channels_last)],
    }
    for name, features in variants.items():
        with backend("cpu"):
            result = upsample_equalize_concat(features, std=[0.5, 2.0])
            dense = upsample_equalize_concat([f.contiguous() for f in features], std=[0.5, 2.0])
        assert relative_error(result, dense) <= tolerance(dtype), name


@both_layouts
def test_gradients_of_any_strides(channels_last: bool) -> None:
    """grad_output may be expanded, sliced or in the other layout."""
    features = [f.requires_grad_() for f in pyramid(channels_last=channels_last)]
    output = upsample_equalize_concat(features)
    dense = torch.randn(2, 42, 12, 16)
    wide = torch.randn(2, 50, 12, 32)
    for cotangent in (
        torch.ones(()).expand_as(output),
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        wide[:, 4:46, :, ::2],
        wide.contiguous(memory_format=torch.channels_last)[:, 4:46, :, 16:],
    ):
        gradients = torch.autograd.grad(output, features, cotangent, retain_graph=True)
        expected = torch.autograd.grad(
            output,
            features,
            cotangent.clone(memory_format=torch.contiguous_format),
            retain_graph=True,
        )
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


def test_memory_format_is_the_first_telling_inputs() -> None:
    first, second = images((2, 4, 8, 8), (2, 4, 4, 4))
    last = first.contiguous(memory_format=torch.channels_last)
    one_pixel = torch.randn(2, 4, 1, 1)
    for features, channels_last in (
        ([first, second], False),
        ([last, second], True),
        ([one_pixel, last], True),
        ([one_pixel, first], False),
        ([last[:, :, 1:5, 2:6], second], True),
    ):
        for name in ("reference", "cpu"):
            with backend(name):
                output = upsample_equalize_concat(features, size=(8, 8))
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            assert output.is_contiguous(memory_format=memory_format), name


@both_layouts
def test_every_value_is_written(channels_last: bool) -> None:
    """With new memory filled with NaN, none is left in output or gradients."""
    torch.use_deterministic_algorithms(True)
    try:
        for shapes, size in (
            (((2, 5, 7, 9), (2, 70, 3, 4)), None),
            (((1, 3, 50, 40), (1, 130, 20, 31)), (7, 5)),  # source pixels that nobody reads
        ):
            features = [f.requires_grad_() for f in images(*shapes, channels_last=channels_last)]
            assert torch.empty(3).isnan().all()
            output = upsample_equalize_concat(features, size=size)
            assert not output.isnan().any()
            for gradient in torch.autograd.grad(output.sum(), features):
                assert not gradient.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "shapes",
    [((0, 3, 4, 4), (0, 2, 2, 2)), ((2, 0, 4, 4),), ((2, 0, 4, 4), (2, 3, 2, 2))],
    ids=["no images", "no channels", "one level without channels"],
)
def test_empty_inputs(any_backend: str, shapes: Sequence[tuple[int, ...]]) -> None:
    features = [f.requires_grad_() for f in images(*shapes)]
    output = upsample_equalize_concat(features, size=(8, 8))
    assert output.shape == (shapes[0][0], sum(s[1] for s in shapes), 8, 8)
    for feature, gradient in zip(
        features, torch.autograd.grad(output.sum(), features), strict=True
    ):
        assert gradient.shape == feature.shape


def test_constants_as_tensors_and_floats() -> None:
    features = pyramid(dtype=torch.float64)
    mean, std = [0.1, -0.2, 0.3], [0.5, 1.5, 2.0]
    expected = upsample_equalize_concat(features, mean=mean, std=std)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        constants = {
            "mean": torch.tensor(mean, dtype=dtype),
            "std": torch.tensor([v for s in std for v in (s, 9.0)], dtype=dtype)[::2],
        }
        result = upsample_equalize_concat(features, **constants)
        close = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(result, expected, rtol=close, atol=close)


# ---- derivatives --------------------------------------------------------------------------------


@both_layouts
def test_gradcheck_and_gradgradcheck(any_backend: str, channels_last: bool) -> None:
    for sample in samples(
        device="cpu", dtype=torch.float64, channels_last=channels_last, small=True
    ):
        inputs = tuple(x.requires_grad_() for x in sample.inputs)
        assert torch.autograd.gradcheck(sample.call, inputs)
        assert torch.autograd.gradgradcheck(sample.call, inputs, fast_mode=True)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_frozen_levels(frozen: tuple[int, ...]) -> None:
    """Gradients and second derivatives with some levels frozen equal those with none."""

    def derivatives(leaves: Sequence[int]) -> list[list[Tensor]]:
        torch.manual_seed(1)
        features = pyramid(dtype=torch.float64)
        for i in leaves:
            features[i].requires_grad_()
        output = upsample_equalize_concat(features, std=[0.5, 2.0, 3.0])
        if not leaves:
            assert not output.requires_grad
            return []
        inputs = [features[i] for i in leaves]
        first = torch.autograd.grad((output**3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [list(first), list(second)]

    leaves = [i for i in range(3) if i not in frozen]
    some, all_levels = derivatives(leaves), derivatives([0, 1, 2])
    if leaves:
        for mine, theirs in zip(some[0], [all_levels[0][i] for i in leaves], strict=True):
            assert torch.equal(mine, theirs)
    with backend("reference"):
        expected = derivatives(leaves)
    for order, expected_order in zip(some, expected, strict=True):
        for mine, theirs in zip(order, expected_order, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_backward_runs_on_forwards_backend() -> None:
    (x,) = images((1, 4, 4, 4))
    x.requires_grad_()
    with backend("cpu"):
        output = upsample_equalize_concat([x], size=(8, 8))
    with backend("reference"), FlopCounterMode(display=False) as counter:
        output.sum().backward()  # counted if it is the op's, not if it were PyTorch's
    assert "UpsampleEqualizeConcat" in output.grad_fn.name()
    assert counter.get_total_flops() > 0
    assert x.grad is not None


# ---- PyTorch's machinery ------------------------------------------------------------------------


def _op_inputs() -> list[tuple[Tensor, tuple[Any, ...]]]:
    forward = torch.ops.fastfuse.upsample_equalize_concat.default
    backward = torch.ops.fastfuse.upsample_equalize_concat_backward.default
    features = [f.requires_grad_() for f in pyramid()]
    std = torch.tensor([0.5, 2.0, 3.0])
    grad = torch.randn(2, 42, 12, 16, requires_grad=True)
    shapes = ([0, 20, 37], [20, 17, 5], [12, 6, 3], [16, 8, 4])
    last = [f.detach().contiguous(memory_format=torch.channels_last) for f in features]
    return [
        (forward, (features, 12, 16, None, std, False, False)),
        (forward, (last, 9, 20, std, std, True, True)),
        (backward, (grad, *shapes, std, False, False)),
        (backward, (grad, *(s[1:] for s in shapes), None, True, True)),
    ]


@pytest.mark.parametrize("case", range(4))
def test_opcheck(case: int) -> None:
    op, args = _op_inputs()[case]
    torch.library.opcheck(op, args)


def _step(features: list[Tensor], mean: Tensor, std: Tensor) -> Tensor:
    return upsample_equalize_concat(features, mean=mean, std=std).relu() * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(any_backend: str, dynamic: bool) -> None:
    """One graph, forward and backward, static and dynamic shapes."""
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic)
    mean, std = torch.randn(3), torch.rand(3) + 0.5
    for height in (12, 20) if dynamic else (12,):
        features = images((2, 20, height, 16), (2, 17, height // 2, 8), (2, 5, 3, 4))
        results = []
        for function in (_step, compiled):
            leaves = [f.clone().requires_grad_() for f in features]
            output = function(leaves, mean, std)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)


def test_compile_with_floats_and_a_backend_inside() -> None:
    @torch.compile(fullgraph=True)
    def step(features: list[Tensor]) -> Tensor:
        with backend("cpu"):
            return upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])

    features = pyramid()
    expected = upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    torch.testing.assert_close(step(features), expected)


def test_compiled_code_follows_the_backend() -> None:
    compiled = torch.compile(lambda f: upsample_equalize_concat(f), fullgraph=True)
    features = pyramid()
    with backend("cpu"):
        fused = compiled(features)
    with backend("reference"):
        plain = compiled(features)
    torch.testing.assert_close(fused, plain)
    with backend("triton"), pytest.raises(Exception, match="backend 'triton' cannot run"):
        compiled(features)


def test_export() -> None:
    class Neck(torch.nn.Module):
        def forward(self, p2: Tensor, p3: Tensor) -> Tensor:
            return upsample_equalize_concat([p2, p3], std=[0.5, 2.0])

    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4))
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        Neck(), (p2, p3), dynamic_shapes={"p2": {0: batch}, "p3": {0: batch}}
    )
    assert any("upsample_equalize_concat" in str(node.target) for node in program.graph.nodes)
    p2, p3 = images((5, 4, 8, 8), (5, 6, 4, 4))
    torch.testing.assert_close(program.module()(p2, p3), Neck()(p2, p3))


def test_autocast_casts_features_only(any_backend: str) -> None:
    """bfloat16 in and out; mean and std keep their digits."""
    features = [f.requires_grad_() for f in pyramid()]
    mean = torch.tensor([1.00390625, 0.0, 0.0])  # 1 + 2^-8: 1 in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = upsample_equalize_concat(features, mean=mean)
        mixed = upsample_equalize_concat([features[0], features[1].bfloat16()])
        wide = upsample_equalize_concat([features[0].double()])
    assert output.dtype == torch.bfloat16
    assert mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    halves = [f.detach().bfloat16() for f in features]
    with torch.no_grad():
        assert torch.equal(output, upsample_equalize_concat(halves, mean=mean))
    output.float().sum().backward()
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in features)


def test_flop_formula() -> None:
    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4))
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2, p3])
    # x: 4 rows of 8 values, y: 8 rows of 8 values, a multiply-add per weight, 2 weights
    assert counter.get_total_flops() == 2 * 6 * 4 * (4 * 8 + 8 * 8)
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2.requires_grad_(), p3], std=[1.0, 2.0]).sum().backward()
    forward = 2 * (4 * 2 * 64 + 6 * (2 * 16 + 4 * 96))
    assert counter.get_total_flops() == forward + 2 * 4 * 2 * 64


def test_trace_and_meta() -> None:
    features = [f.requires_grad_() for f in pyramid()]
    with pytest.warns():  # torch.jit is deprecated, and shapes become constants
        traced = torch.jit.trace(lambda *f: upsample_equalize_concat(f), tuple(features))
    torch.testing.assert_close(traced(*features), upsample_equalize_concat(features))
    on_meta = upsample_equalize_concat([f.detach().to("meta") for f in features], size=(7, 9))
    assert on_meta.shape == (2, 42, 7, 9)


def test_torch_func_transforms() -> None:
    """They run on the reference; a fused backend asked for by name says why it cannot."""
    (x,) = images((2, 3, 4, 4))

    def loss(x: Tensor) -> Tensor:
        return upsample_equalize_concat([x], size=(8, 8)).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    stacked = torch.randn(3, 2, 3, 4, 4)
    mapped = torch.vmap(lambda x: upsample_equalize_concat([x], size=(8, 8)))(stacked)
    torch.testing.assert_close(mapped[1], upsample_equalize_concat([stacked[1]], size=(8, 8)))
    with backend("cpu"), pytest.raises(BackendError, match=r"inside a torch.func transform"):
        torch.func.grad(loss)(x)


# ---- determinism --------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, dtype: torch.dtype, channels_last: bool
) -> None:
    shapes = ((2, 70, 60, 52), (2, 33, 31, 26), (2, 130, 7, 9), (2, 16, 1, 1))
    features = images(*shapes, dtype=dtype, channels_last=channels_last)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        leaves = [f.detach().requires_grad_() for f in features]
        output = upsample_equalize_concat(leaves, mean=[1.0, 2.0, 3.0, 4.0], std=[0.3] * 4)
        torch.manual_seed(1)
        results.append([output, *torch.autograd.grad(output, leaves, torch.randn_like(output))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- memory -------------------------------------------------------------------------------------

_PEAK = """
import json, sys, torch, fastfuse
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key): return int(line.split()[1]) * 1024
layout = torch.channels_last if sys.argv[1] == "nhwc" else torch.contiguous_format
features = [torch.randn(1, 256, 128 >> i, 128 >> i).contiguous(memory_format=layout)
            .requires_grad_() for i in range(4)]
grad = torch.randn(1, 1024, 128, 128).contiguous(memory_format=layout)
first = fastfuse.upsample_equalize_concat(features, std=[1.0, 2.0, 3.0, 4.0])
torch.autograd.grad(first, features, grad)  # loads code, starts threads
del first
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
output = fastfuse.upsample_equalize_concat(features, std=[1.0, 2.0, 3.0, 4.0])
gradients = torch.autograd.grad(output, features, grad)
kept = sum(t.numel() * t.element_size() for t in (output, *gradients))
print(json.dumps({"peak": status("VmHWM") - before, "kept": kept}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_peak_memory_is_output_and_gradients(layout: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, layout], capture_output=True, text=True, check=True
    )
    measured = json.loads(run.stdout)
    slack = 1 << 20  # threads' scratch rows, tables
    assert measured["kept"] / 2 <= measured["peak"] <= measured["kept"] + slack, measured


@pytest.mark.slow
def test_more_than_2_to_the_31_values() -> None:
    (low,) = images((1, 2100, 16, 16), dtype=torch.bfloat16)
    output = upsample_equalize_concat([low], size=(1024, 1024))
    assert output.numel() > 2**31
    for channel in (0, 1047, 2099):
        expected = upsample_equalize_concat([low[:, channel : channel + 1]], size=(1024, 1024))
        assert torch.equal(output[:, channel], expected[:, 0])


# ---- bad input ----------------------------------------------------------------------------------


def _one() -> list[Tensor]:
    return images((2, 3, 4, 4), (2, 5, 2, 2))


BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no features": (
        lambda: upsample_equalize_concat([]),
        ValueError,
        r"features must have at least one level; got none",
    ),
    "one tensor": (
        lambda: upsample_equalize_concat(_one()[0]),
        TypeError,
        r"features must be a sequence of tensors, one per level; got Tensor",
    ),
    "a non-tensor": (
        lambda: upsample_equalize_concat([_one()[0], 3.0]),
        TypeError,
        r"features\[1\] must be a tensor; got float",
    ),
    "rank 3": (
        lambda: upsample_equalize_concat([_one()[0][0]]),
        ValueError,
        r"features\[0\] must have 4 dimensions \(N, C, H, W\); got shape \(3, 4, 4\)",
    ),
    "differing N": (
        lambda: upsample_equalize_concat([_one()[0], _one()[1][:1]]),
        ValueError,
        r"share one batch size N; features\[0\] has 2, features\[1\] has 1",
    ),
    "differing device": (
        lambda: upsample_equalize_concat([_one()[0], _one()[1].to("meta")]),
        ValueError,
        r"features\[0\] is on cpu, features\[1\] is on meta",
    ),
    "differing dtype": (
        lambda: upsample_equalize_concat([_one()[0], _one()[1].double()]),
        ValueError,
        r"features\[0\] is float32, features\[1\] is float64",
    ),
    "integers": (
        lambda: upsample_equalize_concat([_one()[0].int()]),
        ValueError,
        r"features\[0\] must be float64, float32, bfloat16 or float16; got int32",
    ),
    "complex": (
        lambda: upsample_equalize_concat([_one()[0].to(torch.complex64)]),
        ValueError,
        r"got complex64",
    ),
    "float8": (
        lambda: upsample_equalize_concat([_one()[0].to(torch.float8_e4m3fn)]),
        ValueError,
        r"must be float64, float32, bfloat16 or float16; got float8_e4m3fn",
    ),
    "sparse": (
        lambda: upsample_equalize_concat([_one()[0].to_sparse()]),
        ValueError,
        r"features\[0\] must be a dense tensor; got layout torch.sparse_coo",
    ),
    "no height": (
        lambda: upsample_equalize_concat([_one()[0][:, :, :0]], size=(4, 4)),
        ValueError,
        r"features\[0\] must be at least 1 pixel high and wide; got shape \(2, 3, 0, 4\)",
    ),
    "size of one": (
        lambda: upsample_equalize_concat(_one(), size=(4,)),
        ValueError,
        r"size must be two positive ints \(height, width\); got \(4,\)",
    ),
    "size an int": (
        lambda: upsample_equalize_concat(_one(), size=4),
        ValueError,
        r"size must be two positive ints \(height, width\); got 4",
    ),
    "size of floats": (
        lambda: upsample_equalize_concat(_one(), size=(4.0, 4)),
        ValueError,
        r"size must be two positive ints",
    ),
    "size zero": (
        lambda: upsample_equalize_concat(_one(), size=(4, 0)),
        ValueError,
        r"size must be two positive ints",
    ),
    "mean too long": (
        lambda: upsample_equalize_concat(_one(), mean=[0.0] * 3),
        ValueError,
        r"mean must have one value per level, 2; got 3",
    ),
    "mean of the wrong shape": (
        lambda: upsample_equalize_concat(_one(), mean=torch.zeros(2, 1)),
        ValueError,
        r"mean must have one value per level, shape \(2,\); got shape \(2, 1\)",
    ),
    "mean a float": (
        lambda: upsample_equalize_concat(_one(), mean=0.5),
        TypeError,
        r"mean must be a sequence of 2 floats, a tensor of shape \(2,\) or None; got float",
    ),
    "mean of words": (
        lambda: upsample_equalize_concat(_one(), mean=["a", "b"]),
        TypeError,
        r"mean\[0\] must be a float; got str",
    ),
    "mean of integers": (
        lambda: upsample_equalize_concat(_one(), mean=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"mean must be a floating-point tensor; got int64",
    ),
    "mean infinite": (
        lambda: upsample_equalize_concat(_one(), mean=[0.0, float("inf")]),
        ValueError,
        r"mean\[1\] must be finite; got inf",
    ),
    "mean elsewhere": (
        lambda: upsample_equalize_concat(_one(), mean=torch.zeros(2, device="meta")),
        ValueError,
        r"mean must be on the features' device cpu; got one on meta",
    ),
    "std zero": (
        lambda: upsample_equalize_concat(_one(), std=[1.0, 0.0]),
        ValueError,
        r"std\[1\] must be positive and finite; got 0.0",
    ),
    "std negative": (
        lambda: upsample_equalize_concat(_one(), std=[-1.0, 1.0]),
        ValueError,
        r"std\[0\] must be positive and finite; got -1.0",
    ),
    "std NaN": (
        lambda: upsample_equalize_concat(_one(), std=[1.0, float("nan")]),
        ValueError,
        r"std\[1\] must be positive and finite; got nan",
    ),
    "std that learns": (
        lambda: upsample_equalize_concat(_one(), std=torch.ones(2, requires_grad=True)),
        ValueError,
        r"std must be constant; got a tensor that requires grad",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(any_backend: str, case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith(f"{OP}: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda f, m: ([], 8, 8, None, None, False, False), "requires a non-empty list"),
        (lambda f, m: (f, 2**31, 8, None, None, False, False), r"at most 2\^31 - 1"),
        (lambda f, m: (f, 8, 0, None, None, False, False), "at least 1"),
        (lambda f, m: ([f[0], f[1][:1]], 8, 8, None, None, False, False), "share N"),
        (lambda f, m: ([f[0], f[1].double()], 8, 8, None, None, False, False), "share a dtype"),
        (lambda f, m: ([f[0].int()], 8, 8, None, None, False, False), "got Int"),
        (lambda f, m: ([f[0][0]], 8, 8, None, None, False, False), "4 dimensions"),
        (lambda f, m: (f, 8, 8, m[:1], None, False, False), "1-D CPU tensor of 2 values"),
        (lambda f, m: (f, 8, 8, None, m.int(), False, False), "float32 or float64"),
    ],
)
def test_the_op_itself_guards_memory(args: Callable[..., Any], message: str) -> None:
    """Called past the public function, it refuses instead of reading beyond its inputs."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.upsample_equalize_concat(*args(_one(), torch.ones(2)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (([0, 3], [3], [4, 2], [4, 2]), "one entry per level"),
        (([0, 3], [3, 6], [4, 2], [4, 2]), "must have the levels' channels"),
        (([-1], [3], [4], [4]), "must have the levels' channels"),
        (([0], [3], [0], [4]), "at least 1"),
    ],
)
def test_the_backward_op_itself_guards_memory(shapes: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.upsample_equalize_concat_backward(
            torch.randn(2, 8, 4, 4), *shapes, None, False, False
        )


def test_public_face() -> None:
    assert fastfuse.upsample_equalize_concat is upsample_equalize_concat
