"""csrc/cuda/depthwise_conv2d, bit by bit: of small integers every sum is exact in any order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cuda.emulation import EmulationError
from cuda.examples import skip_without_nvcc
from cuda.mutations import replaced, without_barrier
from cuda.proof import ARCHS, SEEDS, emulated, ways
from cuda.sources import Edit, Program
from inputs import fast_and_slow, slowly
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # as enum Dtype numbers them
PROGRAM = Program("depthwise_conv2d")
# Tiles as of a device with a single warp: as high as images, and several for a block.
HIGH_TILES = replaced(r"4 \* 132", "1")
FEW_SEEDS = SEEDS[:4]


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    skip_without_nvcc()


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("image", "row", "pixel")]

    @classmethod
    def of(cls, image: Tensor | None) -> Strides:
        return cls() if image is None else cls(*(image.stride(axis) for axis in (0, 2, 3)))


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "bias_dtype", "batch", "channels")),
        *((name, ctypes.c_int32) for name in ("height", "width", "kernel_size", "dilation")),
        ("flip", ctypes.c_int32),
        *((name, Strides) for name in ("x", "out", "addend")),
    ]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # N, C, H, W
    kernel_size: int
    dilation: int = 1
    dtype: torch.dtype = torch.bfloat16
    bias: torch.dtype | None = None
    addend: bool = False
    flip: bool = False
    gap: int = 0  # channels between pixels

    def __str__(self) -> str:
        words = [*self.shape, f"k{self.kernel_size}", f"d{self.dilation}", self.dtype]
        return "-".join(map(str, words)).replace("torch.", "")

    def image(self, largest: int) -> Tensor:
        """Of small integers, channels_last."""
        batch, channels, height, width = self.shape
        values = torch.full((batch, height, width, channels + self.gap), 77).to(self.dtype)
        image = values[..., :channels].permute(0, 3, 1, 2)
        return image.copy_(torch.randint(-largest, largest + 1, self.shape))

    def sizes(self, x: Tensor, out: Tensor, addend: Tensor | None = None) -> Sizes:
        return Sizes(
            DTYPES.index(self.dtype), DTYPES.index(self.bias or torch.float32), *self.shape,
            self.kernel_size, self.dilation, self.flip, *map(Strides.of, (x, out, addend)),
        )  # fmt: skip

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.dilation * (self.kernel_size // 2)
        return F.conv2d(x, weight, bias, 1, padding, self.dilation, self.shape[1])


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _prove_forward(
    case: Case, program: Program, seeds: Iterable[int], archs: Sequence[str]
) -> None:
    channels, k = case.shape[1], case.kernel_size
    x = case.image(2)
    weight = torch.randint(-1, 2, (channels, 1, k, k)).to(case.dtype)
    bias = None if case.bias is None else torch.randint(-3, 4, (channels,)).to(case.bias)
    addend = case.image(3) if case.addend else None
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if out.stride(1) != 1 or out.stride(3) != channels:  # of one channel or pixel they are loose
        out = torch.empty_permuted(case.shape, (0, 2, 3, 1), dtype=case.dtype)
    sizes = case.sizes(x, out, addend)
    kernel = (weight.flip(2, 3) if case.flip else weight).double()
    expected = case.convolve(x.double(), kernel, None if bias is None else bias.double())
    if addend is not None:
        expected = expected + addend.double()

    def call(library: ctypes.CDLL) -> int:
        tensors = map(_pointer, (out, x, weight, bias, addend))
        return int(library.fastfuse_depthwise_conv2d(ctypes.byref(sizes), *tensors, None))

    inputs = [tensor for tensor in (x, weight, bias, addend) if tensor is not None]
    for way in ways(program, call, inputs, [out], seeds, archs):
        assert torch.equal(out, expected.to(case.dtype)), way


def _prove_backward(
    case: Case, program: Program, seeds: Iterable[int], archs: Sequence[str]
) -> None:
    channels, k = case.shape[1], case.kernel_size
    x, grad_output = case.image(2), case.image(1)
    sizes = case.sizes(x, grad_output)
    chunks = emulated(program).library.fastfuse_depthwise_conv2d_chunks(ctypes.byref(sizes))
    partials = torch.empty(chunks, k * k + 1, channels)
    grad_weight = torch.empty(channels, 1, k, k, dtype=case.dtype)
    grad_bias = torch.empty(channels, dtype=case.dtype)
    weight = torch.zeros(channels, 1, k, k, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(channels, dtype=torch.float64, requires_grad=True)
    case.convolve(x.double(), weight, bias).backward(grad_output.double())
    assert weight.grad is not None
    assert bias.grad is not None

    def call(library: ctypes.CDLL) -> int:
        tensors = map(_pointer, (partials, grad_weight, grad_bias, grad_output, x))
        function = library.fastfuse_depthwise_conv2d_backward_weight
        return int(function(ctypes.byref(sizes), *tensors, None))

    outputs = [partials, grad_weight, grad_bias]
    for way in ways(program, call, [x, grad_output], outputs, seeds, archs):
        assert torch.equal(grad_weight, weight.grad.to(case.dtype)), way
        assert torch.equal(grad_bias, bias.grad.to(case.dtype)), way


# Every kernel size, dtype and width of strips, images smaller than a tile, several tiles each way.
CASES = [
    Case((2, 8, 9, 11), 7, bias=torch.float32, addend=True, flip=True),
    Case((1, 24, 17, 40), 7, dilation=3, bias=torch.bfloat16),
    Case((1, 96, 7, 7), 7, gap=8, addend=True),
    Case((1, 8, 5, 141), 7, bias=torch.float32),
    Case((3, 8, 2, 3), 7, dilation=2, flip=True),
    Case((1, 40, 14, 14), 7, dtype=torch.float32, bias=torch.float32, addend=True),
    Case((2, 12, 6, 70), 7, dtype=torch.float32, flip=True, gap=4),
    Case((1, 8, 20, 33), 7, dilation=2, dtype=torch.float16, bias=torch.float16, addend=True),
    Case((2, 24, 13, 15), 5, bias=torch.bfloat16, addend=True),
    Case((1, 4, 11, 28), 5, dilation=2, dtype=torch.float32, bias=torch.float32, flip=True),
    Case((1, 16, 8, 7), 5, dilation=3, dtype=torch.float16, addend=True, gap=8),
    Case((1, 200, 4, 16), 3, bias=torch.float32),
    Case((3, 8, 15, 13), 3, dilation=3, dtype=torch.float16, bias=torch.float32, flip=True),
    Case((1, 20, 9, 72), 3, dilation=2, dtype=torch.float32, addend=True),
    Case((2, 8, 1, 1), 3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_input_gradient(case: Case) -> None:
    _prove_forward(case, PROGRAM, FEW_SEEDS, ARCHS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_weight_and_bias(case: Case) -> None:
    _prove_backward(case, PROGRAM, FEW_SEEDS, ARCHS)


# Fast ones are of every kernel size and of every dtype; `make test` emulates them alone.
@fast_and_slow("case", [(CASES[i],) for i in (1, 10, 13)], [(case,) for case in CASES], ids=str)
@pytest.mark.parametrize("prove", [_prove_forward, _prove_backward])
def test_high_tiles(case: Case, prove: Callable[..., None]) -> None:
    prove(case, Program("depthwise_conv2d", HIGH_TILES), FEW_SEEDS, ARCHS[1:])


WAIT = r"wait_for_copies<kSlots - 2>\(\);"


def _edited(edit: Edit) -> Program:
    """Of high tiles, and of bfloat16 alone, which compiles in a third of the time."""
    others = r"case kFloat32:[^}]*with_element\(__half\(\)\);"
    one_dtype = replaced(others, "default: return with_element(__nv_bfloat16());")
    return Program("depthwise_conv2d", lambda texts: edit(HIGH_TILES(one_dtype(texts))))


PLANTED = Case((2, 8, 13, 33), 3, addend=True)


@pytest.mark.parametrize(
    ("prove", "edit"),
    [
        (_prove_forward, without_barrier(1)),  # between a row's arrival and its use
        slowly(_prove_forward, replaced(WAIT, ";")),
        slowly(_prove_forward, replaced(r"first \+ i < 0", "false")),
        slowly(_prove_forward, replaced(r"copy\(y \+ kSlots - 1\)", "copy(y + kSlots)")),
        slowly(_prove_backward, without_barrier(4)),  # between the strips' sums and their addition
        (_prove_backward, replaced(r"if \(step < rows\) \{", "if (true) {")),
    ],
    ids=["barrier", "wait", "left border", "slot", "barrier of sums", "last row"],
)
def test_planted_bugs_are_found(prove: Callable[..., None], edit: Edit) -> None:
    program = _edited(edit)
    assert emulated(program)
    with pytest.raises((EmulationError, AssertionError)):
        prove(PLANTED, program, SEEDS[1:4], archs=())


def test_without_planted_bugs_nothing_is_found() -> None:
    for prove in (_prove_forward, _prove_backward):
        prove(PLANTED, _edited(lambda texts: texts), SEEDS[1:4], archs=())
