"""csrc/cuda/tap_sum, bit by bit: of small integers every sum is exact in any order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from cuda.emulation import EmulationError
from cuda.examples import skip_without_nvcc
from cuda.mutations import replaced, without_barrier
from cuda.proof import ARCHS, SEEDS, ways
from cuda.sources import Edit, Program
from inputs import slowly
from torch import Tensor

from fastfuse.ops.bilinear import interpolate_exactly
from fastfuse.ops.launch_cuda import DTYPES, MAX_LEVELS, ImageStrides, pointers
from fastfuse.ops.tap_sum.cuda import BackwardSizes, Level, Sizes
from fastfuse.ops.tap_sum.reference import sum_of_shifted

PROGRAM = Program("tap_sum")
FEW_SEEDS = SEEDS[:4]
KERNEL_SIZE, PADDING = 3, 1
TAPS = KERNEL_SIZE**2


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # of the output: N, C, H, W
    ratios: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    wide: tuple[int, ...] = ()  # levels whose taps are float32
    terms: str = ""  # of scales, offsets, bias, accumulate
    gap: int = 0  # channels between pixels of the output

    def __str__(self) -> str:
        words = [*self.shape, *(f"r{ratio}" for ratio in self.ratios), self.dtype, self.terms]
        return "-".join(map(str, words)).replace("torch.", "").replace(" ", "-")

    def level_shape(self, ratio: int) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.shape
        return (batch, TAPS * channels, height // ratio, width // ratio)


def _image(shape: Sequence[int], dtype: torch.dtype, gap: int = 0) -> Tensor:
    """Of small integers, channels_last."""
    batch, channels, height, width = shape
    values = torch.randint(-3, 4, (batch, height, width, channels + gap)).to(dtype)
    return values[..., :channels].permute(0, 3, 1, 2)


def _tap_sum(taps: Tensor, offsets: Tensor | None, size: tuple[int, int]) -> Tensor:
    return sum_of_shifted(
        taps, offsets, KERNEL_SIZE, PADDING, lambda x: interpolate_exactly(x, size)
    )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _prove(case: Case, program: Program, seeds: Iterable[int], archs: Sequence[str]) -> None:
    channels, size = case.shape[1], (case.shape[2], case.shape[3])
    taps = [
        _image(case.level_shape(ratio), torch.float32 if i in case.wide else case.dtype)
        for i, ratio in enumerate(case.ratios)
    ]
    scales = torch.tensor([2.0, -0.5, 1.0, 0.25, 2.0])[: 1 + len(taps)]
    scales_given = scales if "scales" in case.terms else None
    offsets = torch.randint(-3, 4, (TAPS * channels,)).float() if "offsets" in case.terms else None
    bias = torch.randint(-3, 4, (channels,)).float() if "bias" in case.terms else None
    out, accumulate = _image(case.shape, case.dtype, case.gap), "accumulate" in case.terms
    start = out.clone()
    expected = start.double() if accumulate else torch.zeros(case.shape, dtype=torch.float64)
    if scales_given is None:
        scales = torch.ones_like(scales)
    expected = expected * scales[0].item()
    for level, scale in zip(taps, scales[1:].tolist(), strict=True):
        expected = expected + scale * _tap_sum(level.double(), None, size)
    if offsets is not None:
        zeros = torch.zeros((case.shape[0], TAPS * channels, *size), dtype=torch.float64)
        expected = expected + _tap_sum(zeros, offsets.double(), size)
    if bias is not None:
        expected = expected + bias.double()[:, None, None]
    levels = [
        Level.of(level.stride(), ratio, level.dtype)
        for level, ratio in zip(taps, case.ratios, strict=True)
    ]
    sizes = Sizes(
        ImageStrides.of(out.stride()), DTYPES[case.dtype], *case.shape, accumulate, len(taps), 0,
        (Level * MAX_LEVELS)(*levels),
    )  # fmt: skip

    def call(library: ctypes.CDLL) -> int:
        if accumulate:
            out.copy_(start)
        constants = map(_pointer, (scales_given, offsets, bias))
        function = library.fastfuse_tap_sum
        return int(function(ctypes.byref(sizes), _pointer(out), pointers(taps), *constants, None))

    inputs = [*taps, *(tensor for tensor in (scales_given, offsets, bias) if tensor is not None)]
    inputs, outputs = ([*inputs, out], []) if accumulate else (inputs, [out])
    # Of one arch at a time: a call sets what it accumulates onto.
    for some_seeds, some_archs in [(seeds, ()), *(((), (arch,)) for arch in archs)]:
        for way in ways(program, call, inputs, outputs, some_seeds, some_archs):
            assert torch.equal(out, expected.to(case.dtype)), way


def _prove_backward(
    case: Case, program: Program, seeds: Iterable[int], archs: Sequence[str]
) -> None:
    (ratio,) = case.ratios
    grad_output = _image(case.shape, case.dtype, case.gap)
    grad_taps = _image(case.level_shape(ratio), case.dtype)
    scale = torch.tensor([-0.5]) if "scales" in case.terms else None
    taps = torch.zeros(case.level_shape(ratio), dtype=torch.float64, requires_grad=True)
    _tap_sum(taps, None, (case.shape[2], case.shape[3])).backward(grad_output.double())
    assert taps.grad is not None
    expected = taps.grad * (1 if scale is None else scale.item())
    sizes = BackwardSizes(
        ImageStrides.of(grad_output.stride()), DTYPES[case.dtype], *case.shape, 0,
        Level.of(grad_taps.stride(), ratio, grad_taps.dtype),
    )  # fmt: skip

    def call(library: ctypes.CDLL) -> int:
        tensors = map(_pointer, (grad_taps, grad_output, scale))
        return int(library.fastfuse_tap_sum_backward(ctypes.byref(sizes), *tensors, None))

    inputs = [tensor for tensor in (grad_output, scale) if tensor is not None]
    for way in ways(program, call, inputs, [grad_taps], seeds, archs):
        assert torch.equal(grad_taps, expected.to(case.dtype)), way


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    skip_without_nvcc()


# Every ratio, alone and with others, every dtype, images smaller than a tile and tiles each way.
CASES = [
    Case((1, 8, 8, 8), (8,)),
    Case((3, 4, 16, 8), (4,), torch.float32, terms="bias"),
    Case((1, 40, 40, 16), (2,), torch.float16, gap=8),
    Case((2, 8, 8, 24), (1,), terms="scales"),
    Case((1, 36, 40, 24), (2, 4, 8), torch.float32, terms="scales offsets bias accumulate"),
    Case((1, 8, 72, 8), (8, 2, 4), torch.float16, wide=(0, 2), terms="accumulate", gap=4),
    Case((2, 24, 24, 16), (4, 8, 2, 1), wide=(0, 1, 2, 3), terms="scales offsets"),
    Case((1, 8, 16, 16), (), terms="offsets bias accumulate scales"),
]
BACKWARD_CASES = [
    Case((1, 8, 2, 2), (2,)),
    Case((2, 40, 18, 70), (2,), torch.float32, terms="scales", gap=4),
    Case((3, 4, 4, 4), (4,), torch.float32),
    Case((1, 36, 20, 44), (4,), terms="scales", gap=4),
    Case((1, 8, 8, 8), (8,), torch.float16),
    Case((2, 8, 40, 72), (8,), terms="scales"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case) -> None:
    _prove(case, PROGRAM, FEW_SEEDS, ARCHS)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_backward(case: Case) -> None:
    _prove_backward(case, PROGRAM, FEW_SEEDS, ARCHS)


def _edited(edit: Edit) -> Program:
    return Program("tap_sum", edit)


PLANTED = Case((1, 36, 40, 24), (2, 4), torch.float32, terms="offsets")
PLANTED_BACKWARD = Case((1, 8, 18, 38), (2,))


@pytest.mark.parametrize(
    ("prove", "case", "edit"),
    [
        (_prove_backward, PLANTED_BACKWARD, without_barrier(0)),
        slowly(_prove, PLANTED, without_barrier(1)),  # before lines are written anew
        slowly(_prove, PLANTED, without_barrier(2)),  # before they are read
        slowly(_prove, PLANTED, replaced(r"\(i == 0 && skip_first\)", "false")),
        slowly(_prove, PLANTED, replaced(r"if \(place.has_channels\)", "")),
        slowly(_prove, PLANTED, replaced(r"kTileRows / ratio \+ 2", "kTileRows / ratio + 1")),
        slowly(_prove_backward, PLANTED_BACKWARD, replaced("Ratio / 2 && is_last", "0 && false")),
        slowly(_prove_backward, BACKWARD_CASES[3], replaced("target < Tile::kTargets", "true")),
    ],
    ids=["barrier of sums", "barrier of a level", "barrier of lines", "border", "channels",
         "a line too few", "border of the gradient", "threads"],
)  # fmt: skip
def test_planted_bugs_are_found(prove: Callable[..., None], case: Case, edit: Edit) -> None:
    with pytest.raises((EmulationError, AssertionError)):
        prove(case, _edited(edit), SEEDS[1:4], archs=())
