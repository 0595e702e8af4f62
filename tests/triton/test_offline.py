"""Every Triton kernel compiled ahead of time, without a GPU: no spills, 128-bit accesses.

``pytest -s`` prints registers, spills and the widths of loads and stores. What the compiler made of
a kernel is kept under .cache/ by a hash of the sources. Fast tests compile every kernel in every
dtype for sm_90, and for others what came nearest to spilling; slow tests the whole product.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import INTERPRETING

pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETING:
    pytest.skip("the compiler, or what it makes, is replaced", allow_module_level=True)

from inputs import both_corners, fast_and_slow
from sampling_kernel import sampling_kernel
from triton_offline import Launch, compiled, inspected, print_table, recorded

from fastfuse.ops.depthwise_conv2d import triton as depthwise_kernels
from fastfuse.ops.pointwise import triton as pointwise_kernels
from fastfuse.ops.tap_sum import triton as tap_sum_kernels
from fastfuse.ops.upsample_add import triton as add_kernels
from fastfuse.ops.upsample_argmax import triton as argmax_kernels
from fastfuse.ops.upsample_cross_entropy import triton as cross_entropy_kernels
from fastfuse.ops.upsample_equalize_concat import triton as concat_kernels

SIZE = (128, 128)
# A level of the target's size, and the ratios that give the backward 4, 8 and 16 taps.
RATIOS = (1, 2, 4, 8)
# Ratios of the levels and kernel size.
TAP_SUM_CASES = ("2 3", "4 3", "8 3", "2,4,8 3", "2 1")
# Stores of upsample_equalize_concat's backward are 128 bits wide up to this ratio: beyond, a tile
# of source pixels is smaller than the threads are wide, and stores are a fraction 1 / ratio**2 of
# the loads.
WIDE_STORES = 2

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def _id(value: object) -> str:
    if isinstance(value, bool):
        return "channels_last" if value else "contiguous"
    return str(value).removeprefix("torch.").replace(" ", "_")


# Channels that no power of two divides well have no wide accesses.
BUILDS = [
    *product((90, 80, 100), (F32, BF16), (True, False), (512,)),
    (90, F64, False, 150),
    (90, F16, True, 150),
]


def every_build_and_case(
    cases: Sequence[Any], nearest: Iterable[tuple[Any, ...]]
) -> pytest.MarkDecorator:
    """All of ``BUILDS`` with all cases. Fast are two for sm_90 of every case, in turn, and nearest:
    those that came nearest to spilling."""
    builds = [build for build in BUILDS if build[0] == 90]
    fast = [
        (*builds[(2 * i + j) % len(builds)], cases[i]) for i in range(len(cases)) for j in (0, 1)
    ]
    slow = [(*build, case) for build, case in product(BUILDS, cases)]
    return fast_and_slow("arch dtype channels_last channels case", [*fast, *nearest], slow, ids=_id)


SIZES_OF_ONE = {
    "identity": ((1, 1), (1, 1)),
    "from one": ((1, 1), (32, 32)),
    "to one": ((32, 32), (1, 1)),
    "one column": ((16, 1), (32, 7)),
}


def _image(channels: int, size: tuple[int, int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((2, channels, *size), dtype=dtype, memory_format=memory_format)


def _assert_no_spills(results: dict[str, dict[str, Any]]) -> None:
    for name, row in results.items():
        assert row["stack"] == 0, f"{name} spills: {row}"


def _assert_wide_loads(name: str, row: dict[str, Any], scalars: int) -> None:
    """All loads are 128 bits wide but those of some constants."""
    assert row["ld"].get("128", 0) > 0, f"{name}: {row}"
    assert set(row["ld"]) <= {"128", "32"}, f"{name}: {row}"
    assert row["ld"].get("32", 0) <= scalars, f"{name}: {row}"


@both_corners
@pytest.mark.parametrize("dtype", [F32, F64], ids=_id)
def test_the_sampling_rule_rounds_as_written(dtype: torch.dtype, align_corners: bool) -> None:
    """``scale * (target + 0.5) - 0.5`` is one fma, as nvcc contracts PyTorch's; no other is."""
    position = torch.empty(1, dtype=torch.int32)
    arguments = {
        "lower_out": position, "upper_out": position, "weight_out": position.to(dtype),
        "in_size": 1000, "out_size": 1000, "ALIGN_CORNERS": align_corners, "BLOCK": 128,
        "enable_fp_fusion": True,
    }  # fmt: skip
    ptx = compiled(sampling_kernel, arguments, 90).asm["ptx"]
    bits = torch.finfo(dtype).bits
    arithmetic = re.findall(rf"\b(add|sub|mul|fma|div)((?:\.\w+)*)\.f{bits}\b", ptx)
    shift = [] if align_corners else [("add", "")]
    assert arithmetic == [("div", ".rn"), *shift, ("fma", ".rn"), ("sub", "")]


def _concat_launches(
    dtype: torch.dtype,
    channels_last: bool,
    channels: int,
    source: tuple[int, int],
    target: tuple[int, int] = SIZE,
    align_corners: bool = False,
) -> list[Launch]:
    """What forward and backward launch for the second of two levels, of size ``source``."""
    std = torch.ones(2)

    def call() -> None:
        features = [_image(channels, size, dtype, channels_last) for size in (target, source)]
        out = concat_kernels.forward(features, *target, std, std, align_corners, channels_last)
        concat_kernels.backward(
            out, [channels], [channels], source[:1], source[1:], std, align_corners, channels_last
        )

    return recorded(call)[1:]


@every_build_and_case(RATIOS, nearest=[(80, F32, False, 512, 4), (100, F32, True, 512, 2)])
def test_no_spills_and_wide_accesses(
    arch: int, dtype: torch.dtype, channels_last: bool, channels: int, case: int
) -> None:
    def launches() -> Iterator[tuple[str, Launch]]:
        source = (SIZE[0] // case, SIZE[1] // case)
        for launch in _concat_launches(dtype, channels_last, channels, source):
            yield launch[0].__name__.strip("_"), launch

    name = f"{dtype} {channels_last} {channels} {case}"
    results = inspected(concat_kernels, name, arch, launches)
    print_table(f"upsample_equalize_concat sm_{arch} {name}", results)
    _assert_no_spills(results)
    for kernel, row in results.items() if channels_last and channels == 512 else ():
        _assert_wide_loads(kernel, row, scalars=2 if "forward" in kernel else 1)  # mean and std
        if kernel == "forward_kernel" or case <= WIDE_STORES:
            assert set(row["st"]) == {"128"}, f"{kernel}: {row}"


@pytest.mark.parametrize("name", SIZES_OF_ONE)
@both_corners
def test_sizes_of_one_compile(name: str, align_corners: bool) -> None:
    """A launch turns sizes of one into constants, which have no methods of a tensor."""
    source, target = SIZES_OF_ONE[name]
    for kernel, arguments in _concat_launches(F32, False, 1, source, target, align_corners):
        assert compiled(kernel, arguments, 90).asm["cubin"]


def _add_launches(
    dtype: torch.dtype,
    channels_last: bool,
    channels: int,
    sources: list[tuple[int, int]],
    target: tuple[int, int] = SIZE,
) -> list[Launch]:
    def call() -> None:
        skip = _image(channels, target, dtype, channels_last)
        for source in sources:
            x = _image(channels, source, dtype, channels_last)
            add_kernels.forward(x, skip, False, channels_last)

    return recorded(call)


@fast_and_slow(
    "arch dtype channels_last channels",
    [(90, F32, True, 512), (90, F64, False, 512), (90, F16, True, 150)],
    [(80, BF16, True, 512), (100, BF16, True, 512)],
    ids=_id,
)
def test_upsample_add_has_no_spills_and_wide_accesses(
    arch: int, dtype: torch.dtype, channels_last: bool, channels: int
) -> None:
    """Channels that no power of two divides well cannot have wide accesses."""

    def launches() -> Iterator[tuple[str, Launch]]:
        launched = _add_launches(dtype, channels_last, channels, [SIZE, (64, 64)])
        yield from zip(("forward 1", "forward 2"), launched, strict=True)

    results = inspected(add_kernels, f"{dtype} {channels_last} {channels}", arch, launches)
    print_table(f"upsample_add sm_{arch} {dtype} {channels_last=}", results)
    _assert_no_spills(results)
    for name, row in results.items() if channels_last and channels == 512 else ():
        _assert_wide_loads(name, row, scalars=0)
        assert set(row["st"]) == {"128"}, f"{name}: {row}"


def test_sizes_of_one_compile_in_upsample_add() -> None:
    for kernel, arguments in _add_launches(
        F32, False, 1, [(1, 1), (32, 32)], (1, 1)
    ) + _add_launches(F32, False, 1, [(1, 1), (16, 1)], (32, 7)):
        assert compiled(kernel, arguments, 90).asm["cubin"]


def _argmax_launches(
    dtype: torch.dtype,
    channels_last: bool,
    classes: int,
    source: tuple[int, int],
    target: tuple[int, int] = SIZE,
) -> list[Launch]:
    def call() -> None:
        logits = _image(classes, source, dtype, channels_last)
        argmax_kernels.forward(logits, *target, False)
        argmax_kernels.forward_confidence(logits, *target, False)

    return recorded(call)


def _cross_entropy_launches(
    dtype: torch.dtype,
    channels_last: bool,
    classes: int,
    source: tuple[int, int],
    target: tuple[int, int] = SIZE,
) -> list[Launch]:
    """Plain, and with all that is optional."""

    def call() -> None:
        logits = _image(classes, source, dtype, channels_last)
        labels = torch.zeros(2, *target, dtype=torch.int64)
        weights = torch.ones(classes, dtype=torch.promote_types(dtype, F32))
        for weight, smoothing in ((None, 0.0), (weights, 0.1)):
            loss, logsumexp = cross_entropy_kernels.forward(
                logits, labels, weight, 255, smoothing, False
            )
            cross_entropy_kernels.backward(
                loss, logits, labels, weight, logsumexp, 255, smoothing, False, channels_last
            )

    return recorded(call)


def _strip_results(
    module: ModuleType,
    launches_of: Callable[..., list[Launch]],
    names: Sequence[str],
    arch: int,
    *case: Any,
) -> dict[str, dict[str, Any]]:
    def launches() -> Iterator[tuple[str, Launch]]:
        for ratio in RATIOS:  # strips of as many rows
            launched = launches_of(*case, (SIZE[0] // ratio, SIZE[1] // ratio))
            yield from zip((f"{name} {ratio}" for name in names), launched, strict=True)

    results = inspected(module, " ".join(map(str, case)), arch, launches)
    print_table(f"{module.NAME} sm_{arch} {case}", results)
    return results


def _assert_threads_stay(results: dict[str, dict[str, Any]], channels_last: bool) -> None:
    """In a forward logits pass between threads only to be reduced over the classes, which lie
    along threads in channels_last; results may, once (triton 3.6)."""
    for name, row in results.items() if not channels_last else ():
        assert "backward" in name or row["passed"] <= 6, f"{name}: {row}"


every_strip = fast_and_slow(
    "arch dtype channels_last classes",
    [(90, F32, False, 150), (90, BF16, True, 19)],
    [*product((80, 90, 100), (F32, BF16), (True, False), (150,)), (80, F32, True, 512),
     *product((80, 90), (F64,), (True, False), (19,)), (90, F16, False, 21)],
    ids=_id,
)  # fmt: skip


@every_strip
def test_upsample_argmax_has_no_spills(
    arch: int, dtype: torch.dtype, channels_last: bool, classes: int
) -> None:
    names = ("class", "confidence")
    case = dtype, channels_last, classes
    results = _strip_results(argmax_kernels, _argmax_launches, names, arch, *case)
    _assert_no_spills(results)
    _assert_threads_stay(results, channels_last)


@every_strip
def test_upsample_cross_entropy_has_no_spills(
    arch: int, dtype: torch.dtype, channels_last: bool, classes: int
) -> None:
    names = ("forward", "backward", "weighted forward", "weighted backward")
    case = dtype, channels_last, classes
    results = _strip_results(cross_entropy_kernels, _cross_entropy_launches, names, arch, *case)
    _assert_no_spills(results)
    _assert_threads_stay(results, channels_last)


@pytest.mark.parametrize("name", SIZES_OF_ONE)
def test_sizes_of_one_compile_in_strips(name: str) -> None:
    source, target = SIZES_OF_ONE[name]
    for launches in (_argmax_launches, _cross_entropy_launches):
        for kernel, arguments in launches(F32, False, 1, source, target):
            assert compiled(kernel, arguments, 90).asm["cubin"]


def _tap_sum_launches(
    dtype: torch.dtype,
    channels_last: bool,
    channels: int,
    sources: list[tuple[int, int]],
    kernel_size: int,
    target: tuple[int, int] = SIZE,
    align_corners: bool = False,
) -> list[Launch]:
    """What all levels' sum and the gradient of the first launch, with all that is optional; and the
    sum without offsets, whose runs may be longer."""
    wide = torch.promote_types(dtype, F32)
    padding = kernel_size // 2
    geometry = (*target, kernel_size, padding, align_corners, channels_last)

    def call() -> None:
        out = _image(channels, target, dtype, channels_last)
        tap_channels = kernel_size**2 * channels
        taps = [_image(tap_channels, source, dtype, channels_last) for source in sources]
        scales, offsets, bias = (
            torch.ones(n, dtype=wide) for n in (1 + len(taps), tap_channels, channels)
        )
        for optional in (offsets, None):
            tap_sum_kernels.forward_into(out, taps, scales, optional, bias, True, *geometry)
        for level in taps[:1]:
            tap_sum_kernels.backward_into(level, out, scales[:1], *geometry)

    return recorded(call)


@every_build_and_case(TAP_SUM_CASES, nearest=[(80, BF16, True, 512, "2,4,8 3")])
def test_tap_sum_has_no_spills_and_wide_accesses(
    arch: int, dtype: torch.dtype, channels_last: bool, channels: int, case: str
) -> None:
    ratios, kernel_size = case.split()
    sources = [(SIZE[0] // int(ratio), SIZE[1] // int(ratio)) for ratio in ratios.split(",")]

    def launches() -> Iterator[tuple[str, Launch]]:
        launched = _tap_sum_launches(dtype, channels_last, channels, sources, int(kernel_size))
        yield from zip(("forward", "forward without offsets", "backward"), launched, strict=True)

    name = f"{dtype} {channels_last} {channels} {case}"
    results = inspected(tap_sum_kernels, name, arch, launches)
    print_table(f"tap_sum sm_{arch} {name}", results)
    _assert_no_spills(results)
    for kernel, row in results.items() if channels_last and channels == 512 else ():
        scalars = 1 + len(sources) if kernel != "backward" else 1
        _assert_wide_loads(kernel, row, scalars)
        assert set(row["st"]) == {"128"}, f"{kernel}: {row}"


@fast_and_slow(
    "name align_corners kernel_size",
    [(name, i % 2 == 1, 1 if i == 0 else 3) for i, name in enumerate(SIZES_OF_ONE)],
    product(SIZES_OF_ONE, (False, True), (1, 3)),
)
def test_sizes_of_one_compile_in_tap_sum(name: str, align_corners: bool, kernel_size: int) -> None:
    source, target = SIZES_OF_ONE[name]
    for kernel, arguments in _tap_sum_launches(
        F32, False, 1, [source], kernel_size, target, align_corners
    ):
        assert compiled(kernel, arguments, 90).asm["cubin"]


def test_tap_sum_of_a_float32_level_has_no_spills() -> None:
    """Beside bfloat16 ones: what fusion_conv2d makes of small levels."""

    def call() -> None:
        out = _image(512, SIZE, BF16, True)
        taps = [_image(9 * 512, (64, 64), BF16, True), _image(9 * 512, (16, 16), F32, True)]
        tap_sum_kernels.forward_into(out, taps, None, None, None, True, *SIZE, 3, 1, False, True)

    def launches() -> Iterator[tuple[str, Launch]]:
        for launch in recorded(call):
            yield launch[0].__name__.strip("_"), launch

    results = inspected(tap_sum_kernels, "of a float32 level", 90, launches)
    _assert_no_spills(results)
    _assert_wide_loads("forward_kernel", results["forward_kernel"], 0)


def test_tap_sum_of_no_levels_compiles() -> None:
    for kernel, arguments in _tap_sum_launches(BF16, True, 64, [], 3):
        assert compiled(kernel, arguments, 90).asm["cubin"]


def _depthwise_launches(
    dtype: torch.dtype,
    channels_last: bool,
    channels: int = 256,
    size: tuple[int, int] = SIZE,
    kernel_size: int = 7,
) -> list[Launch]:
    """What the forward, the input's gradient with an addend and the weights' gradient launch."""

    def call() -> None:
        x = _image(channels, size, dtype, channels_last)
        weight = torch.empty(channels, 1, kernel_size, kernel_size, dtype=dtype)
        bias = torch.empty(channels, dtype=dtype)
        depthwise_kernels.forward(x, weight, bias, None, 1, False, channels_last)
        depthwise_kernels.forward(x, weight, None, x, 1, True, channels_last)
        depthwise_kernels.backward_weight(x, x, kernel_size, 1)

    return recorded(call)


@fast_and_slow(
    "arch dtype channels_last kernel_size",
    [(90, F32, True, 7), (90, F32, False, 3), (100, BF16, True, 7)],
    product((80, 90, 100), (F32, BF16), (True, False), (7,)),
    ids=_id,
)
def test_depthwise_conv2d_has_no_spills_and_wide_accesses(
    arch: int, dtype: torch.dtype, channels_last: bool, kernel_size: int
) -> None:
    """Four channels of a thread: 128 bits in float32, 64 in bfloat16 (weights are float32).

    In contiguous neighbouring threads have neighbouring columns: what a tap shifts cannot be wide.
    """

    def launches() -> Iterator[tuple[str, Launch]]:
        launched = _depthwise_launches(dtype, channels_last, kernel_size=kernel_size)
        names = ("forward", "grad_input", "grad_weight", "reduce")
        yield from zip(names, launched, strict=True)

    results = inspected(depthwise_kernels, f"{dtype} {channels_last} {kernel_size}", arch, launches)
    print_table(f"depthwise_conv2d sm_{arch} {dtype} {channels_last=}", results)
    _assert_no_spills(results)
    width = "128" if dtype == F32 else "64"
    for name in ("forward", "grad_input", "grad_weight") if channels_last else ():
        assert set(results[name]["ld"]) <= {"128", width}, f"{name}: {results[name]}"
    for name in ("forward", "grad_input") if channels_last else ():
        assert set(results[name]["st"]) == {width}, f"{name}: {results[name]}"


@pytest.mark.parametrize(("size", "kernel_size"), [((1, 1), 1), ((1, 1), 3), ((3, 1), 3)])
def test_sizes_of_one_compile_in_depthwise_conv2d(size: tuple[int, int], kernel_size: int) -> None:
    for kernel, arguments in _depthwise_launches(F32, False, 1, size, kernel_size):
        assert compiled(kernel, arguments, 90).asm["cubin"]


def _pointwise_launches(dtype: torch.dtype, rows: int, channels: int) -> list[Launch]:
    """What all steps launch, with all that is optional."""
    wide = torch.promote_types(dtype, F32)

    def call() -> None:
        x = torch.empty(rows, channels, dtype=dtype)
        v, keep = torch.empty(channels, dtype=wide), torch.empty(rows, dtype=wide)
        pointwise_kernels.layer_norm_into(x, x, v, v, 1e-6, x, True)
        pointwise_kernels.layer_norm_backward_into(x, v, v, x, x, v, v, 1e-6, True)
        pointwise_kernels.bias_gelu_into(x, x, v)
        pointwise_kernels.bias_gelu_backward_into(x, x, v, x, v)
        pointwise_kernels.residual_into(x, x, x, v, v, keep, 1, 0)
        pointwise_kernels.residual_backward_into(x, v, x, keep, 1, 0)

    return recorded(call)


@fast_and_slow(
    "arch dtype channels",
    [(90, F32, 768), (80, BF16, 192)],
    [(100, BF16, 192)],
    ids=_id,
)
def test_pointwise_has_no_spills_and_wide_accesses(
    arch: int, dtype: torch.dtype, channels: int
) -> None:
    """All of matrices is 128 bits wide; factors of images are loaded, sums stored by the value."""

    def launches() -> Iterator[tuple[str, Launch]]:
        for kernel, arguments in _pointwise_launches(dtype, 4096, channels):
            yield kernel.__name__.strip("_"), (kernel, arguments)

    results = inspected(pointwise_kernels, f"{dtype} {channels}", arch, launches)
    print_table(f"pointwise sm_{arch} {dtype} {channels} channels", results)
    _assert_no_spills(results)
    for name, row in results.items():
        _assert_wide_loads(name, row, scalars=2 if name.startswith("residual") else 0)
        if not name.startswith("add_sums"):
            narrow = sum(row["st"].values()) - row["st"].get("128", 0)
            assert row["st"].get("128", 0) > 0, f"{name}: {row}"
            assert narrow <= (2 if "backward" in name else 0), f"{name}: {row}"


def test_sizes_of_one_compile_in_pointwise() -> None:
    for kernel, arguments in _pointwise_launches(F32, 1, 1):
        assert compiled(kernel, arguments, 90).asm["cubin"]
