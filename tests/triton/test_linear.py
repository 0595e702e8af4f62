"""Linear layers with what follows them: Triton kernels against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, both_blocks, with_gradients
from cuda_like import cuda_like
from inputs import integers
from torch import Tensor
from triton_interpreter import INTERPRETING, TESTS_ON, interpreted

from fastfuse.ops import define
from fastfuse.ops.ced_block import kernel as ced_kernel
from fastfuse.ops.lr_ced_block import kernel as lr_kernel
from fastfuse.ops.pointwise import mlp
from fastfuse.tolerances import relative_error, tolerance

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        TESTS_ON.startswith("sm_") and int(TESTS_ON[3:]) >= 90,
        reason="the PTX machine does not know wgmma; sm_80 multiplies by mma.sync",
    ),
]

if INTERPRETING:
    from fastfuse.ops.pointwise import linear

KERNELS = {"ced_block": ced_kernel, "lr_ced_block": lr_kernel}
# Rows, and channels in and out: one row; parts of a tile; several tiles; blocks of 64 and of 32.
SIZES = [(1, 8, 32), (70, 40, 72), (130, 96, 200), (33, 352, 96)]
DTYPES = [torch.bfloat16, torch.float16]
cases = pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, DTYPES[i % 2]) for i, size in enumerate(SIZES)] + [(SIZES[1], torch.float16)],
    ids=str,
)


def _matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A slice of a larger one's columns, whose rows are aligned."""
    return torch.randn(rows, columns + 16).to(dtype)[:, 8:-8]


def _room(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix full of NaN within a larger one, which has more columns and rows."""
    whole = torch.full((rows + 2, columns + 16), torch.nan, dtype=dtype)
    return whole, whole[1:-1, 8:-8]


def _check(room: tuple[Tensor, Tensor], expected: Tensor, inner: int) -> None:
    whole, matrix = room
    error = relative_error(matrix, expected)
    assert error <= tolerance(matrix.dtype, reduction=inner, roundings=2), error
    matrix.fill_(torch.nan)
    assert whole.isnan().all(), "written outside"


@interpreted
@cases
def test_linear_gelu(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, columns = size
    x, weight = _matrix(rows, inner, dtype), _matrix(columns, inner, dtype) / inner**0.5
    bias, out, kept = torch.randn(columns), _room(rows, columns, dtype), _room(rows, columns, dtype)
    hidden = x.double() @ weight.double().t()
    linear.linear_gelu_into(out[1], kept[1], x, weight, bias)
    _check(kept, hidden, inner)
    _check(out, F.gelu(hidden + bias), inner)
    linear.linear_gelu_into(out[1], None, x, weight.t().contiguous().t(), bias)
    _check(out, F.gelu(hidden + bias), inner)


@interpreted
@cases
@pytest.mark.parametrize("factors", [False, True], ids=["plain", "scale and keep"])
def test_linear_residual(size: tuple[int, int, int], dtype: torch.dtype, factors: bool) -> None:
    rows, inner, columns = size
    pixels, first = 7, 5
    x, weight = _matrix(rows, inner, dtype), _matrix(columns, inner, dtype) / inner**0.5
    skip, bias, out = _matrix(rows, columns, dtype), torch.randn(columns), _room(*size[::2], dtype)
    scale = torch.randn(columns) if factors else None
    keep = torch.rand((first + rows - 1) // pixels + 1) if factors else None
    linear.linear_residual_into(out[1], skip, x, weight, bias, scale, keep, pixels, first)
    branch = x.double() @ weight.double().t() + bias
    if scale is not None and keep is not None:
        image = (torch.arange(rows) + first) // pixels
        branch = keep[image, None].double() * scale * branch
    _check(out, skip.double() + branch, inner)


@interpreted
@cases
@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
def test_linear_gelu_backward(size: tuple[int, int, int], dtype: torch.dtype, kept: bool) -> None:
    rows, inner, columns = size
    x, weight = _matrix(rows, inner, dtype), _matrix(columns, inner, dtype) / inner**0.5
    grad, grad_weight = _matrix(rows, inner, dtype), _matrix(inner, columns, dtype) / inner**0.5
    bias, sums = torch.randn(columns), torch.randn(columns)
    room, activated = _room(rows, columns, dtype), _room(rows, columns, dtype)
    hidden = (x.double() @ weight.double().t()).to(dtype if kept else torch.float64)
    before = sums.clone()
    given = (hidden, None) if kept else (x, weight)
    linear.linear_gelu_backward_into(
        room[1], activated[1], sums, grad, grad_weight.t(), *given, bias
    )
    leaf = (hidden.double() + bias).requires_grad_()
    result = F.gelu(leaf)
    (expected,) = torch.autograd.grad(result, leaf, grad.double() @ grad_weight.double())
    total = before.double() + expected.sum(0)
    assert relative_error(sums, total) <= tolerance(dtype, reduction=rows * inner)
    _check(activated, result.detach(), inner)
    _check(room, expected, inner)


@interpreted
def test_products_are_exact() -> None:
    """Of integers, in any order of sums; GELU of what is large is what it is given."""
    x, weight = integers(40, 72).to(torch.bfloat16), integers(64, 72).to(torch.bfloat16)
    out, kept = (torch.empty(40, 64, dtype=torch.bfloat16) for _ in range(2))
    bias = torch.full((64,), 4096.0)
    linear.linear_gelu_into(out, kept, x, weight, bias)
    product = x.double() @ weight.double().t()
    assert torch.equal(kept, product.bfloat16())
    assert torch.equal(out, (product + 4096).bfloat16())
    linear.linear_residual_into(
        out, torch.zeros_like(out), x, weight, torch.zeros(64), None, None, 1, 0
    )
    assert torch.equal(out, product.bfloat16())


@interpreted
@pytest.mark.parametrize(
    ("rows", "keeping"), [(1000, True), (17, False)], ids=["kept", "recomputed, in chunks"]
)
@both_blocks
def test_blocks_are_made_of_them(
    monkeypatch: pytest.MonkeyPatch, block: Block, rows: int, keeping: bool
) -> None:
    """Steps of a GPU's, on CPU tensors."""
    monkeypatch.setitem(define._STEPS, "cpu", define._STEPS["triton"])
    monkeypatch.setattr(mlp, "ROW_MULTIPLE", 1)
    dtype = torch.bfloat16
    x, *parameters = block.inputs(dtype=dtype, channels_last=True)
    grad, keep = torch.randn_like(x), torch.tensor([0.25, 1.5])
    kernel, options = KERNELS[block.name], block.option()
    chunk = rows * 32 * dtype.itemsize
    with cuda_like(hidden_bytes=chunk, hidden_rows=1):
        assert mlp.mlp_route("triton", x).startswith("triton; products with what follows them")
        out, kept = kernel.forward(x, parameters, keep, options, keeping)
        given = (grad, x, parameters, keep, options, kept, True, True)
        grad_x, gradients = kernel.backward(*given)
    expected = with_gradients(
        block.reference, [t.double() for t in (x, *parameters)], grad.double(), keep=keep.double()
    )
    for result, exact in zip([out, grad_x, *gradients], expected, strict=True):
        assert relative_error(result, exact) <= tolerance(dtype, reduction=60, roundings=4)
