"""Structs of the C interface: Python's are the headers'."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

import fastfuse

pytest.importorskip("triton", reason="triton is not installed")

from fastfuse.ops import launch_cuda
from fastfuse.ops.depthwise_conv2d import cuda as depthwise_conv2d
from fastfuse.ops.tap_sum import cuda as tap_sum
from fastfuse.ops.upsample_cross_entropy import cuda as upsample_cross_entropy

FOLDER = Path(fastfuse.__file__).parents[1] / "csrc" / "cuda"
TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "ImageStrides": launch_cuda.ImageStrides,
    "LogitsStrides": upsample_cross_entropy.LogitsStrides,
    "TapSumLevel": tap_sum.Level,
}
STRUCTS = {
    ("runtime", "ImageStrides"): launch_cuda.ImageStrides,
    ("tap_sum", "TapSumLevel"): tap_sum.Level,
    ("tap_sum", "TapSumSizes"): tap_sum.Sizes,
    ("tap_sum", "TapSumBackwardSizes"): tap_sum.BackwardSizes,
    ("depthwise_conv2d", "DepthwiseSizes"): depthwise_conv2d.Sizes,
    ("upsample_cross_entropy", "LogitsStrides"): upsample_cross_entropy.LogitsStrides,
    ("upsample_cross_entropy", "CrossEntropySizes"): upsample_cross_entropy.Sizes,
}


def members(header: str, struct: str) -> list[tuple[str, object]]:
    """Names and types; of an array also its length."""
    text = re.sub(r"//.*", "", (FOLDER / f"{header}.h").read_text(encoding="utf-8"))
    (body,) = re.findall(rf"struct {struct} {{(.*?)}};", text, re.S)
    found: list[tuple[str, object]] = []
    for kind, names in re.findall(r"(\w+) ([^;]+);", body):
        for name in names.split(","):
            name, _, length = name.strip().partition("[")
            assert length in ("", "kMaxLevels]")
            found.append((name, TYPES[kind] * launch_cuda.MAX_LEVELS if length else TYPES[kind]))
    return found


@pytest.mark.parametrize(("place", "struct"), STRUCTS.items(), ids=lambda v: str(v))
def test_structs_are_the_headers(place: tuple[str, str], struct: type[ctypes.Structure]) -> None:
    assert [(name, kind) for name, kind in struct._fields_] == members(*place)


def test_every_struct_is_known() -> None:
    found = {
        (path.stem, name)
        for path in FOLDER.glob("*.h")
        for name in re.findall(r"struct (\w*(?:Sizes|Strides|Level)) {", path.read_text())
    }
    assert found == set(STRUCTS)


def test_numbers_are_the_headers() -> None:
    text = (FOLDER / "runtime.h").read_text(encoding="utf-8")
    for dtype, number in launch_cuda.DTYPES.items():
        name = {"float32": "Float32", "bfloat16": "BFloat16", "float16": "Float16"}
        assert f"k{name[str(dtype).removeprefix('torch.')]} = {number}" in text
    header = (FOLDER / "tap_sum.h").read_text(encoding="utf-8")
    assert f"kMaxLevels = {launch_cuda.MAX_LEVELS};" in header
