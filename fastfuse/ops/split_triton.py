"""Sums over target rows, split over programs: for gradients of levels so small that a program for
each of their tiles would leave most of a device idle.

Every program sums a part of its tile's readers and writes it, in the accumulation dtype, to a map
of partial sums; a second kernel adds the maps up, in a fixed order, and rounds once. How many there
are follows from shapes, so results are the same bits from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.ops.launch_triton import Launch, cdiv, planned, power_of_two

__all__ = ["add_partial_sums", "are_few", "part_of", "partial_sums", "split_of", "splits_of"]

# Fewer programs leave multiprocessors of today's devices idle; of as many as are wanted each has
# several, whose loads hide each other's.
FEW_PROGRAMS, WANTED_PROGRAMS = 132, 512
MIN_ROWS = 16  # of fewer a program is soon through
MAX_SPLITS = 64  # so many partial sums are in flight where they are added
BLOCK = 32  # values of a program that adds them
NUM_WARPS = 4


def are_few(programs: int) -> bool:
    """Whether they leave multiprocessors idle."""
    return programs < FEW_PROGRAMS


def splits_of(programs: int, rows: int) -> int:
    """Into how many parts to split ``rows`` target rows, where so many programs take all of one."""
    if not are_few(programs) or rows < MIN_ROWS:
        return 1
    splits = min(cdiv(WANTED_PROGRAMS, programs), rows, MAX_SPLITS)
    return cdiv(rows, cdiv(rows, splits))  # none is empty


@triton.jit
def split_of(splits):
    """``(program among those of one part, part)``."""
    program = tl.program_id(0)
    return program // splits, program % splits


@triton.jit
def part_of(split, splits, count, step):
    """``(first, end)`` of a part of range(0, count, step)."""
    length = tl.cdiv(tl.cdiv(count, step), splits) * step
    return split * length, tl.minimum((split + 1) * length, count)


def partial_sums(splits: int, like: Tensor) -> Tensor:
    """Memory for maps of the shape and strides' order of one, in the accumulation dtype."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty((splits, like.numel()), dtype=dtype, device=like.device)


@triton.jit(do_not_specialize=["count", "splits", "height", "width", "channels"])
def add_partial_sums_kernel(
    out, partials,
    scale,  # a value of it, or None
    index, count, splits, height, width, channels, stride_n, stride_h, stride_w, stride_c,
    IS_INVERSE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = partials.dtype.element_ty
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of a small map: 32 bits
    split = tl.arange(0, BLOCK_S)
    mask = (split < splits)[:, None] & (place < count)[None, :]
    offset = split.to(tl.int64)[:, None] * count + place[None, :]
    total = tl.sum(tl.load(partials + offset, mask=mask, other=0.0), axis=0)
    if scale is not None:
        factor = tl.load(scale + index).to(DTYPE)
        total *= 1 / factor if IS_INVERSE else factor
    pixel, channel = place // channels, place % channels
    row, x = pixel // width, pixel % width
    image, y = row // height, row % height
    offset = image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h
    offset += x.to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=place < count)


@planned
def _launch(
    device: torch.device, shape: tuple[int, ...], stride: tuple[int, ...], splits: int,
    index: int, is_inverse: bool,
) -> Launch:  # fmt: skip
    batch, height, width, channels = shape
    count = batch * height * width * channels
    constants = {
        "IS_INVERSE": is_inverse,
        "BLOCK_S": power_of_two(splits),
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }
    integers = (index, count, splits, height, width, channels, *stride)
    return Launch(add_partial_sums_kernel, cdiv(count, BLOCK), device, integers, constants)


def add_partial_sums(
    out: Tensor, partials: Tensor, scale: Tensor | None, *, index: int = 0,
    is_inverse: bool = False, order: Sequence[int] = (0, 2, 3, 1),
) -> None:  # fmt: skip
    """``out = scale[index] * sum(partials)``, or over it.

    Args:
        out: of four axes, any strides.
        partials: by :func:`partial_sums`, each map dense in the ``order`` of out's axes.
        scale: one-dimensional, or None.
    """
    out = out.permute(*order)
    launch = _launch(out.device, out.shape, out.stride(), partials.shape[0], index, is_inverse)
    launch(out, partials, scale)
