"""tap_sum on CUDA devices: Triton kernels and their launchers.

Both kernels sum along one axis before they look at the other. The forward kernel owns a run of
output rows: what the taps of a kernel row give along x at one source row is summed once, and every
output row of the run that reads this source row takes it from registers; at ratios of 2, 4 and 8
which rows these are, and with which weights, is known when it is compiled. All levels add up in one
launch, so that the output is rounded once. The backward kernel is the gather of the adjoint, in a
fixed order and without atomics: a program owns source pixels and the taps of one kernel row; it
sums the readers in every column of the gradient once and gives the sum to each of these taps.

Rows are the same for all threads of a program; columns and channels are spread over them, whichever
of the two is contiguous. Programs that read the same source follow each other, for the L2 cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfuse.ops.launch_triton import Launch, cdiv, memory_format, planned, power_of_two
from fastfuse.ops.split_triton import add_partial_sums, partial_sums, splits_of
from fastfuse.ops.tap_sum.kernels_triton import backward_kernel, forward_kernel

__all__ = ["backward", "backward_into", "forward", "forward_into"]

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
# Three programs per multiprocessor. Without a limit the assembler may spill to reach one it likes.
MAX_REGISTERS = 168
VECTOR_BYTES = 16  # the widest access of one thread
SPECIALIZED_MULTIPLE = 16  # Triton knows of an integer that it is a multiple of 16, or nothing
# Output rows of one program where every level at least doubles its height: eight of them read three
# to six source rows, not sixteen. A long run is for what leaves registers for its rows: vectors of
# channels, of levels whose ratio the compiler knows or that have three rows at most.
LONG_RUN, RUN = 8, 4
LONG_RUN_RATIO = 8
RATIOS = (2, 4, 8)  # of 3x3 kernels: known to the compiler where they divide the run
MIN_PROGRAMS = 256  # fill today's devices: below, runs are shorter
# Rows of the gradient in flight in the backward: all readers of a source row up to a ratio of 4.
MAX_READERS = 8
# Bytes of sums per thread, 16 float32 registers, where it does not hold one vector of channels.
MAX_SUM_BYTES = 64
# channels_last: a pixel's share of a tile is 32 bytes (a sector) to 256 (two full cache lines).
MIN_CHANNELS_BYTES, MAX_CHANNELS_BYTES = 32, 256
# contiguous: a full line of float32 along x; the channels below share their coordinates.
MAX_BLOCK_COLUMNS = 32


def _blocks(
    columns: int, channels: int, itemsize: int, channels_last: bool, sums: int
) -> tuple[int, int]:
    """``(BLOCK_X, BLOCK_C)`` for threads that hold ``sums`` sums of each of their values."""
    per_thread = max(MAX_SUM_BYTES // max(itemsize, 4) // power_of_two(sums), 1)
    if channels_last:
        if channels % SPECIALIZED_MULTIPLE == 0:  # else every value needs its address
            per_thread = VECTOR_BYTES // itemsize
        # The largest power of two that divides the channels, so that few blocks run over the end.
        block_c = max(channels & -channels, MIN_CHANNELS_BYTES // itemsize)
        block_c = min(block_c, MAX_CHANNELS_BYTES // itemsize, power_of_two(channels))
        return min(THREADS * per_thread // block_c, power_of_two(columns)), block_c
    block_x = min(MAX_BLOCK_COLUMNS, power_of_two(columns))
    return block_x, min(THREADS * per_thread // block_x, power_of_two(channels))


def _warps(blocks: tuple[int, int], itemsize: int) -> int:
    """Of a tile that may be smaller than usual."""
    threads = blocks[0] * blocks[1] * itemsize // VECTOR_BYTES
    return min(max(power_of_two(threads) // 32, 1), NUM_WARPS)


def _source_rows(in_height: int, height: int, run: int) -> int:
    """How many source rows ``run`` neighbouring target rows read at most."""
    if run == 1:
        return 1 if in_height == height else 2
    slack = 0.001 + in_height * 1e-6  # more than rounding moves a coordinate
    return math.floor((run - 1) * in_height / height + slack) + 3


def _known_ratios(
    sizes: Sequence[tuple[int, int]], height: int, run: int, kernel_size: int, padding: int,
    align_corners: bool,
) -> tuple[int, ...]:  # fmt: skip
    """By level, ``height / in_height`` where it is known to the compiler, or 0."""
    known = [r for r in RATIOS if run % r == 0]
    if (kernel_size, padding, align_corners) != (3, 1, False):
        known = []
    return tuple(next((r for r in known if r * h == height), 0) for h, _ in sizes)


def _runs(
    sizes: Sequence[tuple[int, int]], ratios: Sequence[int], height: int, has_room: bool
) -> list[int]:
    """Lengths of runs, the most wanted first; a long one where there is room for it."""
    if any(2 * h > height for h, _ in sizes):
        return [1]
    few_rows = (r or LONG_RUN_RATIO * h <= height for (h, _), r in zip(sizes, ratios, strict=True))
    return [LONG_RUN, RUN] if has_room and all(few_rows) else [RUN]


def _reader_rows(in_height: int, height: int, align_corners: bool) -> int:
    """How many target rows may read a source row, but ``MAX_READERS`` at most."""
    readers = cdiv(2 * height, in_height)
    if align_corners or height % (2 * in_height):  # the range is not exact
        readers += 1
    return min(readers, MAX_READERS)


def _programs(
    images: int, rows: int, run: int, columns: int, channels: int, blocks: tuple[int, int]
) -> int:
    return images * cdiv(rows, run) * cdiv(columns, blocks[0]) * cdiv(channels, blocks[1])


def forward(
    taps: Tensor, offsets: Tensor | None, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
    *, into: Callable[..., None] | None = None,
) -> Tensor:  # fmt: skip
    """The sum of taps (N, k * k * C, h, w): (N, C, H + 2 * padding - (k - 1), likewise W); written
    by ``into``, another :func:`forward_into` perhaps."""
    margin = 2 * padding - (kernel_size - 1)
    out = torch.empty(
        (taps.shape[0], taps.shape[1] // kernel_size**2, height + margin, width + margin),
        dtype=taps.dtype,
        device=taps.device,
        memory_format=memory_format(channels_last),
    )
    geometry = (height, width, kernel_size, padding, align_corners, channels_last)
    (into or forward_into)(out, [taps], None, offsets, None, False, *geometry)
    return out


@planned
def _forward_launch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...],
    sizes: tuple[tuple[int, int], ...], offsets: bool, accumulate: bool, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> Launch:  # fmt: skip
    """``sizes``: height and width of every level. ``offsets``: whether there are, whose sums take
    the registers of a long run."""
    batch, channels, out_height, out_width = shape
    kernel = (kernel_size, padding, align_corners)
    ratios = _known_ratios(sizes, height, LONG_RUN, *kernel)
    vectors = channels_last and channels % SPECIALIZED_MULTIPLE == 0
    for run in _runs(sizes, ratios, height, vectors and not offsets):
        blocks = _blocks(out_width, channels, dtype.itemsize, channels_last, run)
        programs = _programs(batch, out_height, run, out_width, channels, blocks)
        if programs >= MIN_PROGRAMS:
            break
    constants = {
        "RATIOS": _known_ratios(sizes, height, run, *kernel),
        "ROWS": tuple(_source_rows(in_height, height, run) for in_height, _ in sizes),
        "COLUMNS": tuple(1 if in_width == width else 2 for _, in_width in sizes),
        "ACCUMULATE": accumulate,
        "ALIGN_CORNERS": align_corners,
        "RUN": run,
        "BLOCK_X": blocks[0],
        "BLOCK_C": blocks[1],
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
    }
    integers = (
        sizes, channels, out_height, out_width, height, width, kernel_size, padding, *stride,
    )  # fmt: skip
    return Launch(forward_kernel, programs, device, integers, constants)


def forward_into(
    out: Tensor, taps: Sequence[Tensor], scales: Tensor | None, offsets: Tensor | None,
    bias: Tensor | None, accumulate: bool, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> None:  # fmt: skip
    """``out = scales[0] * out + bias + sum_i scales[1 + i] * tap_sum(taps[i]) + offsets inside``.

    Without ``accumulate`` what is in ``out`` is not read. ``scales`` is read on the device, and
    all levels add up in one launch: ``out`` is rounded once.
    """
    if out.numel() == 0:
        return
    launch = _forward_launch(
        out.device, out.dtype, out.shape, out.stride(),
        tuple([(level.shape[2], level.shape[3]) for level in taps]),
        offsets is not None, accumulate, height, width, kernel_size, padding, align_corners,
        channels_last,
    )  # fmt: skip
    levels = tuple([(level, *level.stride()) for level in taps])
    launch(out, levels, *[None if v is None else v.contiguous() for v in (scales, offsets, bias)])


@planned
def _backward_launch(
    device: torch.device, dtype: torch.dtype, out_shape: tuple[int, ...],
    out_stride: tuple[int, ...], in_height: int, in_width: int, stride: tuple[int, ...],
    height: int, width: int, kernel_size: int, padding: int, align_corners: bool,
    channels_last: bool,
) -> tuple[int, Launch]:  # fmt: skip
    """Into how many parts the target rows are split, and the launch."""
    batch, channels, out_height, out_width = out_shape
    sums = kernel_size + 1  # of every tap and of the column
    blocks = _blocks(in_width, channels, dtype.itemsize, channels_last, sums)
    programs = _programs(batch * kernel_size, in_height, 1, in_width, channels, blocks)
    rows = min(cdiv(2 * height, in_height), height)
    splits = splits_of(programs, rows)
    readers = _reader_rows(in_height, height, align_corners)
    if splits > 1:
        readers = min(readers, power_of_two(cdiv(rows, splits)))
    values = batch * kernel_size**2 * channels * in_height * in_width
    if splits > 1:  # the maps of partial sums are dense, in channels_last
        pixel = kernel_size**2 * channels
        stride = (in_height * in_width * pixel, 1, in_width * pixel, pixel)
    constants = {
        "KERNEL_SIZE": kernel_size,
        "ALIGN_CORNERS": align_corners,
        "READERS": readers,
        "BLOCK_X": blocks[0],
        "BLOCK_C": blocks[1],
        "num_warps": NUM_WARPS if splits == 1 else _warps(blocks, dtype.itemsize),
        "maxnreg": MAX_REGISTERS,
    }
    integers = (
        channels, out_height, out_width, in_height, in_width, height, width, padding,
        *out_stride, *stride, splits, values,
    )  # fmt: skip
    return splits, Launch(backward_kernel, splits * programs, device, integers, constants)


def backward(
    grad_output: Tensor, in_height: int, in_width: int, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
    *, into: Callable[..., None] | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the taps, (N, k * k * C, in_height, in_width), written by ``into``."""
    batch, channels = grad_output.shape[:2]
    grad_taps = torch.empty(
        (batch, kernel_size**2 * channels, in_height, in_width),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format(channels_last),
    )
    geometry = (height, width, kernel_size, padding, align_corners, channels_last)
    (into or backward_into)(grad_taps, grad_output, None, *geometry)
    return grad_taps


def backward_into(
    grad_taps: Tensor, grad_output: Tensor, scale: Tensor | None, height: int, width: int,
    kernel_size: int, padding: int, align_corners: bool, channels_last: bool,
) -> None:  # fmt: skip
    """``grad_taps = scale * backward(grad_output)``; ``scale`` is read on the device."""
    if grad_taps.numel() == 0:
        return
    splits, launch = _backward_launch(
        grad_taps.device, grad_taps.dtype, grad_output.shape, grad_output.stride(),
        *grad_taps.shape[2:], grad_taps.stride(), height, width, kernel_size, padding,
        align_corners, channels_last,
    )  # fmt: skip
    if splits == 1:
        launch(grad_output, grad_taps, scale)
        return
    partials = partial_sums(splits, grad_taps)
    launch(grad_output, partials, None)
    add_partial_sums(grad_taps, partials, scale)
