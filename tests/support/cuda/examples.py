"""Calls of the example kernels beside this file, with what they compute."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from ptx.parse import PTXError
from torch import Tensor

from cuda.emulation import Call, EmulationError
from cuda.proof import ARCHS, SEEDS, ways
from cuda.sources import Edit, MissingCompilerError, Program, nvcc
from fastfuse.ops.launch_cuda import DTYPES


def skip_without_nvcc() -> None:
    try:
        nvcc()
    except MissingCompilerError as reason:
        pytest.skip(str(reason))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def integers(*shape: int, bound: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small ones, of which sums and products are exact."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-bound, bound + 1, shape, generator=generator).to(dtype)


@dataclass
class Example:
    name: str
    call: Call
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    expected: Sequence[Tensor]

    def check(
        self, edit: Edit = dict, seeds: Sequence[int] = SEEDS, archs: Sequence[str] = ARCHS
    ) -> None:
        program = Program(self.name, edit)
        for way in ways(program, self.call, self.inputs, self.outputs, seeds, archs):
            for output, expected in zip(self.outputs, self.expected, strict=True):
                assert torch.equal(output, expected), way

    def finds(self, edit: Edit, seeds: Sequence[int], archs: Sequence[str]) -> str:
        """What tells that the program is wrong: a fault, or where its values are."""
        with pytest.raises((EmulationError, PTXError, AssertionError)) as found:
            self.check(edit, seeds, archs)
        return str(found.value)


def staged_depthwise(dtype: torch.dtype = torch.float32) -> Example:
    """Tiles of 4 x 8 pixels do not divide the image; three parts of 16 channels."""
    images, height, width, channels = 2, 6, 11, 48
    x = integers(images, height, width, channels, dtype=dtype)
    weight, out = integers(7, 7, channels, bound=2), torch.empty_like(x)
    expected = torch.nn.functional.conv2d(
        x.float().permute(0, 3, 1, 2), weight.permute(2, 0, 1)[:, None], padding=3, groups=channels
    )
    return Example(
        "staged_depthwise",
        lambda library: library.fastfuse_staged_depthwise(
            DTYPES[dtype], pointer(x), pointer(weight), pointer(out),
            images, height, width, channels, None,
        ),
        [x, weight], [out], [expected.permute(0, 2, 3, 1).to(dtype)],
    )  # fmt: skip


def matrix_product(dtype: torch.dtype) -> Example:
    M, N, K = 32, 48, 64
    a, b, out = integers(M, K, dtype=dtype), integers(K, N, dtype=dtype), torch.empty(M, N)
    return Example(
        "matrix_product",
        lambda library: library.fastfuse_matrix_product(
            DTYPES[dtype], pointer(a), pointer(b), pointer(out), M, N, K, None
        ),
        [a, b], [out], [a.float() @ b.float()],
    )  # fmt: skip


def warp_sums() -> Example:
    """Rows that do not fill their blocks, whose other threads have ones."""
    rows, length = 3, 70
    x = integers(rows, length)
    x[1] = x[1].abs() + 1  # has no zero
    sums, prefixes = torch.empty(rows), torch.empty(rows, length)
    counts, zeros = torch.empty((2, rows), dtype=torch.int32).unbind()
    padded = torch.nn.functional.pad(x, (0, 96 - length), value=1).view(rows, 3, 32)
    of_warps = padded.cumsum(2)
    all_below = (padded < of_warps[:, :, -1:] + 1e9).all(2, keepdim=True)
    of_warps += torch.where(all_below, 0, (padded >= 0).sum(2, keepdim=True))
    return Example(
        "warp_sums",
        lambda library: library.fastfuse_warp_sums(
            pointer(x), rows, length, pointer(sums), pointer(counts), pointer(zeros),
            pointer(prefixes), None,
        ),
        [x], [sums, counts, zeros, prefixes],
        [
            x.sum(1), (x < 0).sum(1).int(), (x == 0).any(1).int(),
            of_warps.view(rows, 96)[:, :length],
        ],
    )  # fmt: skip
