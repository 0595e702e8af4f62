"""The sampling rule against PyTorch's own interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfuse.ops.bilinear import axis_table, interpolate_exactly

SIZES = [(2, 4), (4, 2), (333, 1000), (100, 333), (129, 1025), (7, 7), (1, 5), (5, 1), (45, 128)]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="PyTorch's kernels fuse the multiply-add only where the processor can",
)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_weights_equal_pytorchs(
    in_size: int, out_size: int, dtype: torch.dtype, align_corners: bool
) -> None:
    """Interpolating one-hot rows reads PyTorch's weights out: float32 ones to the bit.

    (A few of PyTorch's float64 coordinates are rounded once more.)
    """
    one_hot = torch.eye(in_size, dtype=dtype).reshape(1, in_size, 1, in_size)
    theirs = F.interpolate(
        one_hot, size=(1, out_size), mode="bilinear", align_corners=align_corners
    )[0, :, 0].T
    lower, upper, weight = axis_table(in_size, out_size, align_corners=align_corners, dtype=dtype)
    ours = torch.zeros(out_size, in_size, dtype=dtype)
    rows = torch.arange(out_size)
    ours[rows, lower] += 1 - weight.to(dtype)
    ours[rows, upper] += weight.to(dtype)
    if dtype == torch.float32:
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    target=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    align_corners=st.booleans(),
)
def test_exact_interpolation_is_pytorchs_in_float64(
    size: tuple[int, int], target: tuple[int, int], align_corners: bool
) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    theirs = F.interpolate(x, size=target, mode="bilinear", align_corners=align_corners)
    ours = interpolate_exactly(x, target, align_corners=align_corners)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
