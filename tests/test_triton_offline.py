"""Every Triton kernel compiled ahead of time, without a GPU: no spills, 128-bit accesses.

``pytest -s`` prints registers, spills and the widths of loads and stores. What the compiler made of
a kernel is kept under .cache/ by a hash of the sources.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton_offline import Launch, compiled, inspected, print_table, recorded

from fastfuse.ops.tap_sum import triton as tap_sum_kernels
from fastfuse.ops.upsample_equalize_concat import triton as concat_kernels

SIZE = (128, 128)
# A level of the target's size, and the ratios that give the backward 4, 8 and 16 taps.
RATIOS = (1, 2, 4, 8)
# Stores of upsample_equalize_concat's backward are 128 bits wide up to this ratio: beyond, a tile
# of source pixels is smaller than the threads are wide, and stores are a fraction 1 / ratio**2 of
# the loads.
WIDE_STORES = 2

every_arch = pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
both_layouts = pytest.mark.parametrize(
    "channels_last", [True, False], ids=["channels_last", "contiguous"]
)
other_dtypes = pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float64, False), (torch.float16, True)],
    ids=["float64-contiguous", "float16-channels_last"],
)
both_corners = pytest.mark.parametrize("align_corners", [False, True], ids=["half", "corners"])
sizes_of_one = pytest.mark.parametrize(
    ("source", "target"),
    [((1, 1), (1, 1)), ((1, 1), (32, 32)), ((32, 32), (1, 1)), ((16, 1), (32, 7))],
    ids=["identity", "from one", "to one", "one column"],
)


def _image(channels: int, size: tuple[int, int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((2, channels, *size), dtype=dtype, memory_format=memory_format)


def _assert_no_spills(results: dict[str, dict[str, Any]]) -> None:
    for name, row in results.items():
        assert row["stack"] == 0, f"{name} spills: {row}"
        assert row["local"] == 0, f"{name} spills: {row}"


def _assert_wide_loads(name: str, row: dict[str, Any], scalars: int) -> None:
    """All loads are 128 bits wide but those of some constants."""
    assert row["LDG"].get("128", 0) > 0, f"{name}: {row}"
    assert set(row["LDG"]) <= {"128", "32"}, f"{name}: {row}"
    assert row["LDG"].get("32", 0) <= scalars, f"{name}: {row}"


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

    return recorded(concat_kernels, call)[1:]


def _concat_results(
    dtype: torch.dtype, channels_last: bool, arch: int, channels: int
) -> dict[str, dict[str, Any]]:
    def launches() -> Iterator[tuple[str, Launch]]:
        for ratio in RATIOS:
            source = (SIZE[0] // ratio, SIZE[1] // ratio)
            for launch in _concat_launches(dtype, channels_last, channels, source):
                yield f"{launch[0].__name__.strip('_')} {ratio}", launch

    return inspected(concat_kernels, f"{dtype} {channels_last} {channels}", arch, launches)


@both_layouts
@both_dtypes
@every_arch
def test_no_spills_and_wide_accesses(arch: int, dtype: torch.dtype, channels_last: bool) -> None:
    results = _concat_results(dtype, channels_last, arch, 512)
    print_table(f"upsample_equalize_concat sm_{arch} {dtype} {channels_last=}", results)
    _assert_no_spills(results)
    for name, row in results.items() if channels_last else ():
        kernel, ratio = name.split()
        _assert_wide_loads(name, row, scalars=2 if "forward" in name else 1)  # mean and std
        if kernel == "forward_kernel" or int(ratio) <= WIDE_STORES:
            assert set(row["STG"]) == {"128"}, f"{name}: {row}"


@other_dtypes
def test_other_dtypes_do_not_spill(dtype: torch.dtype, channels_last: bool) -> None:
    """Channels that no power of two divides well, whose accesses cannot be wide."""
    results = _concat_results(dtype, channels_last, 90, 150)
    print_table(f"upsample_equalize_concat sm_90 {dtype} {channels_last=} 150 channels", results)
    _assert_no_spills(results)


@both_corners
@sizes_of_one
def test_sizes_of_one_compile(
    source: tuple[int, int], target: tuple[int, int], align_corners: bool
) -> None:
    """A launch turns sizes of one into constants, which have no methods of a tensor."""
    for kernel, arguments in _concat_launches(
        torch.float32, False, 1, source, target, align_corners
    ):
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
    """What all levels' sum and the gradient of the first launch, with all that is optional."""
    wide = torch.promote_types(dtype, torch.float32)
    padding = kernel_size // 2
    geometry = (*target, kernel_size, padding, align_corners, channels_last)

    def call() -> None:
        out = _image(channels, target, dtype, channels_last)
        tap_channels = kernel_size**2 * channels
        taps = [_image(tap_channels, source, dtype, channels_last) for source in sources]
        scales, offsets, bias = (
            torch.ones(n, dtype=wide) for n in (1 + len(taps), tap_channels, channels)
        )
        tap_sum_kernels.forward_into(out, taps, scales, offsets, bias, True, *geometry)
        for level in taps[:1]:
            tap_sum_kernels.backward_into(level, out, scales[:1], *geometry)

    return recorded(tap_sum_kernels, call)


def _tap_sum_results(
    dtype: torch.dtype, channels_last: bool, arch: int, channels: int
) -> dict[str, dict[str, Any]]:
    """By "kernel ratios kernel size"."""

    def launches() -> Iterator[tuple[str, Launch]]:
        for ratios, kernel_size in (((2,), 3), ((4,), 3), ((8,), 3), ((2, 4, 8), 3), ((2,), 1)):
            sources = [(SIZE[0] // ratio, SIZE[1] // ratio) for ratio in ratios]
            for kernel, arguments in _tap_sum_launches(
                dtype, channels_last, channels, sources, kernel_size
            ):
                name = kernel.__name__.strip("_")
                yield f"{name} {','.join(map(str, ratios))} {kernel_size}", (kernel, arguments)

    return inspected(tap_sum_kernels, f"{dtype} {channels_last} {channels}", arch, launches)


@both_layouts
@both_dtypes
@every_arch
def test_tap_sum_has_no_spills_and_wide_accesses(
    arch: int, dtype: torch.dtype, channels_last: bool
) -> None:
    results = _tap_sum_results(dtype, channels_last, arch, 512)
    print_table(f"tap_sum sm_{arch} {dtype} {channels_last=}", results)
    _assert_no_spills(results)
    for name, row in results.items() if channels_last else ():
        kernel, ratios, _ = name.split()
        levels = len(ratios.split(","))
        _assert_wide_loads(name, row, scalars=1 + levels if kernel == "forward_kernel" else 1)
        assert set(row["STG"]) == {"128"}, f"{name}: {row}"


@other_dtypes
def test_tap_sum_in_other_dtypes_does_not_spill(dtype: torch.dtype, channels_last: bool) -> None:
    results = _tap_sum_results(dtype, channels_last, 90, 150)
    print_table(f"tap_sum sm_90 {dtype} {channels_last=} 150 channels", results)
    _assert_no_spills(results)


@both_corners
@sizes_of_one
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_sizes_of_one_compile_in_tap_sum(
    source: tuple[int, int], target: tuple[int, int], align_corners: bool, kernel_size: int
) -> None:
    for kernel, arguments in _tap_sum_launches(
        torch.float32, False, 1, [source], kernel_size, target, align_corners
    ):
        assert compiled(kernel, arguments, 90).asm["cubin"]


def test_tap_sum_of_no_levels_compiles() -> None:
    ((kernel, arguments),) = _tap_sum_launches(torch.bfloat16, True, 64, [], 3)
    assert compiled(kernel, arguments, 90).asm["cubin"]
