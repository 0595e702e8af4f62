"""What the PTX machine counts (tests/support/ptx/counts.py), where one can count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.counts import Counts, Traffic
from ptx.machine import Machine
from ptx.memory import AccessError
from ptx.parse import parse
from ptx.sample import SampledMemory, count, spread
from ptx_text import KERNEL, SHARED, THREAD


def counted(body: str, threads: int = 32, blocks: int = 1) -> Counts:
    """Of a kernel whose one parameter, an array of bytes, begins at %rd0."""
    text = SHARED + KERNEL.format(
        parameters="\t.param .u64 .ptr .global .align 1 p0",
        threads=threads,
        body=f"{THREAD}\nld.param.b64 %rd0, [p0];\n{body}",
    )
    values = [torch.empty(1 << 20, device="meta")]
    some = np.arange(blocks)
    counts, _, _ = count(parse(text), values, (blocks, 1, 1), some, shared_size=1 << 14)
    return counts


ADDRESS = "mul.lo.u32 %r1, %r0, {stride}; mad.wide.u32 %rd1, %r0, {stride}, %rd0;"


@pytest.mark.parametrize(
    ("stride", "access", "sectors", "useful"),
    [
        (4, "ld.global.b32 %r2, [%rd1];", 4, 128),
        (16, "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1];", 16, 512),
        (32, "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1];", 32, 512),  # half of each
        (4, "ld.global.b32 %r2, [%rd1+16];", 5, 128),  # across a sector's end
        (0, "ld.global.b32 %r2, [%rd1];", 1, 4),  # the same of all threads
        (2, "ld.global.b16 %rs2, [%rd1];", 2, 64),
    ],
)
def test_sectors(stride: int, access: str, sectors: int, useful: int) -> None:
    counts = counted(f"{ADDRESS.format(stride=stride)}\n{access}", threads=64, blocks=3)
    assert counts.loads == Traffic(6, 6 * sectors, 6 * useful, 6 * -(-useful // 32))
    assert counts.stores == counts.shared == Traffic()
    # Each block has its own, and its warps may share one.
    distinct = {(4, 4): 8, (16, 16): 32, (32, 32): 64, (4, 5): 9, (0, 1): 1, (2, 2): 4}
    assert counts.sectors_of_blocks == 3 * distinct[stride, sectors]


def test_threads_of_no_part_count_nothing() -> None:
    body = f"{ADDRESS.format(stride=4)}\nsetp.lt.u32 %p0, %r0, 40;\n@%p0 st.global.b32 [%rd1], %r0;"
    counts = counted(body, threads=64)
    assert counts.stores == Traffic(2, 5, 160, 5)


# Shared memory begins at %r6, and a thread's element at %r1 bytes.
ELEMENT = f"{ADDRESS}\nmov.b32 %r6, memory;\nadd.s32 %r1, %r1, %r6;"


@pytest.mark.parametrize(
    ("stride", "access", "wavefronts", "least"),
    [
        (4, "st.shared.b32 [%r1], %r0;", 1, 1),
        (8, "st.shared.b32 [%r1], %r0;", 2, 1),
        (128, "st.shared.b32 [%r1], %r0;", 32, 1),
        (132, "st.shared.b32 [%r1], %r0;", 1, 1),  # padded
        (2, "st.shared.b16 [%r1], %rs0;", 1, 1),  # two of one word
        (16, "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};", 4, 4),
        (32, "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};", 8, 4),
        (8, "st.shared.v2.b32 [%r1], {%r0, %r0};", 2, 2),
    ],
)
def test_wavefronts(stride: int, access: str, wavefronts: int, least: int) -> None:
    counts = counted(f"{ELEMENT.format(stride=stride)}\n{access}", threads=64)
    assert (counts.shared.instructions, counts.shared.sectors) == (2, 2 * wavefronts)
    assert counts.shared.least == 2 * least


def test_words_that_threads_share_are_read_once() -> None:
    body = "mov.b32 %r6, memory;\nst.shared.b32 [%r6], 7;\nbar.sync 0;\nld.shared.b32 %r2, [%r6];"
    assert counted(body).shared == Traffic(2, 2, 8, 2)


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (128, 32), (144, 4)])
@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices(stride: int, wavefronts: int, transposed: str) -> None:
    """A matrix is a wavefront where its rows, 16 bytes of 8 threads, lie in different banks."""
    opcode = f"stmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16"
    body = f"{ELEMENT.format(stride=stride)}\n{opcode} [%r1], {{%r0, %r2, %r3, %r4}};"
    counts = counted(body)
    assert (counts.shared.sectors, counts.shared.least) == (wavefronts, 4)


def test_instructions_of_warps() -> None:
    """Threads of a warp that branch apart execute one after another; whole warps need not."""
    body = (
        "setp.lt.u32 %p0, %r0, 40;\n@%p0 bra $L1;\nadd.s32 %r2, %r0, 1;\n$L1:\nadd.s32 %r3, %r0, 1;"
    )
    counts = counted(body, threads=96)
    *_, branch, jumped, joined, _ = (counts.executed[line] for line in sorted(counts.executed))
    assert (branch, jumped, joined) == (3, 2, 3)
    assert counts.instructions == 3 * 6 + 2


def test_a_sample_is_all_over_the_grid() -> None:
    assert spread(5, 8).tolist() == [0, 1, 2, 3, 4]
    for programs in (33, 1024, 12288, 3 * 2**14):
        some = spread(programs, 32)
        assert (np.diff(some) > 0).all()
        assert some[0] < programs / 32
        assert programs > some[-1] >= programs * 31 // 32
        assert len(set((some % 16).tolist())) > 8  # in no step


def test_memory_of_samples() -> None:
    """Tensors with no memory have values, those that have keep theirs; bounds are checked."""
    memory, nobody = SampledMemory(), np.zeros(1, np.int64)
    begin = memory.place(torch.empty(1 << 30, device="meta"))
    labels = memory.place(torch.arange(4))
    far = np.array([begin + (1 << 31)])
    assert np.isfinite(memory.load(far, 4, nobody).view(np.float32)).all()
    assert memory.load(np.array([labels + 16]), 8, nobody).view(np.int64) == 2
    assert (memory.read, memory.written) == ({0, 1}, set())
    memory.store(far, 4, np.zeros((1, 4), np.uint8), nobody)
    assert memory.written == {0}
    for place, reason in (
        (labels + 32, "out of bounds"),
        (labels - 8, "out of bounds"),
        (labels + 4, "aligned"),
    ):
        with pytest.raises(AccessError, match=reason):
            memory.load(np.array([place]), 8, nobody)


def test_a_machine_needs_no_observer() -> None:
    kernel = parse(KERNEL.format(parameters="", threads=32, body=THREAD))
    Machine(kernel, [], (1, 1, 1), np.arange(1), SampledMemory(), 0).run()
