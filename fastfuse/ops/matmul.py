"""Matrix products with a weight, by the library that does them fastest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = [
    "MatmulRoute",
    "MatmulWeight",
    "RowBuffer",
    "matmul_into",
    "wide_dtype",
    "wide_product",
]

MIN_CONVERTED_ROWS = 256  # fewer make slow products

# oneDNN's product as torch.compile uses it, and its weights; None where this PyTorch has none.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class MatmulRoute(NamedTuple):
    """How products with a weight are computed: in which dtype, and by which library."""

    dtype: torch.dtype
    library: str  # torch.mm or oneDNN
    packed: bool = False  # whether the weight is laid out anew for it, once

    @classmethod
    def of(cls, device_type: str, dtype: torch.dtype, rows: int) -> MatmulRoute:
        """By the policy; ``rows``: of all products with one weight."""
        policy = policy_of(device_type)
        dtype = policy.product_dtype(dtype)
        if _LINEAR is None or _PACK is None or dtype not in policy.onednn:
            return cls(dtype, "torch.mm")
        return cls(dtype, "oneDNN", rows >= policy.packing_rows)

    def __str__(self) -> str:
        packed = ", packed" if self.packed else ""
        return f"products in {str(self.dtype).removeprefix('torch.')} by {self.library}{packed}"


class MatmulWeight:
    """A weight (C_out, C_in) for products of rows with it, in the dtype that the policy multiplies.

    By oneDNN, with the weight packed once if there are rows enough, or by torch.mm, as the policy
    says. docs/ced_block.md has the measurements.

    Args:
        weight: (C_out, C_in), any strides.
        rows: of all products together.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        route = MatmulRoute.of(weight.device.type, weight.dtype, rows)
        if weight.dtype != route.dtype:
            weight = weight.to(route.dtype)
        self.dtype, self.outputs = weight.dtype, weight.shape[0]
        self.takes_out = route.library == "torch.mm" or not weight.numel()
        if self.takes_out:
            self.weight = weight.t()
            return
        # Transposed ones oneDNN takes as they are, slices take it 1000 times as long.
        if weight.stride() != (1, weight.shape[0]):
            weight = weight.contiguous()
        assert _PACK is not None
        self.weight = _PACK(weight, rows) if route.packed else weight

    def matmul(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """a weight^T, (rows, C_out); what is returned counts, for oneDNN brings memory of its own.

        Args:
            a: (rows, C_in) in this weight's dtype, rows without gaps.
            out: memory for the result, where the library takes some (``takes_out``).
        """
        if self.takes_out:
            return torch.mm(a, self.weight, out=out)
        if a.shape[0] == 0:
            return a.new_empty(0, self.outputs)
        assert _LINEAR is not None
        return _LINEAR(a, self.weight, None, "none", [], "")


def wide_dtype(like: Tensor) -> torch.dtype:
    """The dtype of :func:`wide_product`: the accumulation dtype where the library gives it."""
    wide = policy_of(like.device.type).wide_results
    return accumulation_dtype(like.dtype) if wide else like.dtype


def wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b for sums over many pixels: of narrow dtypes not rounded to them where the library can
    help it, neither at the end nor between parts of the sum."""
    dtype = wide_dtype(a)
    if dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)


class RowBuffer:
    """Rows in another dtype, a chunk at a time, in memory that is reused; or the rows themselves.

    Args:
        rows: of a chunk, at most.
    """

    def __init__(self, rows: int, like: Tensor, dtype: torch.dtype) -> None:
        self.memory: Tensor | None = None
        if like.dtype != dtype:
            self.memory = empty((rows, like.shape[1]), like, dtype=dtype)

    def room(self, rows: Tensor) -> Tensor:
        """Memory for what becomes ``rows`` by :meth:`write`: themselves, if they have the dtype."""
        return rows if self.memory is None else self.memory[: rows.shape[0]]

    def read(self, rows: Tensor) -> Tensor:
        return rows if self.memory is None else self.room(rows).copy_(rows)

    def write(self, values: Tensor, rows: Tensor) -> None:
        """rows = values, rounded once."""
        if values is not rows:
            rows.copy_(values)


def matmul_into(
    out: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None = None
) -> None:
    """out = (a - center) weight^T + bias by torch.mm, for rows of any dtype; they are converted and
    centered a chunk at a time.

    Args:
        out: (rows, C_out) in the dtype of weight and bias, (C_out, C_in) and (C_out,).
        a: (rows, C_in), rows without gaps.
        center: (1,).
    """
    rows, transposed = a.shape[0], weight.t()
    chunk_bytes = policy_of(a.device.type).convert_bytes
    as_is = a.dtype == out.dtype and center is None
    count = rows if as_is else chunk_bytes // (a.shape[1] * out.itemsize)
    count = max(count, MIN_CONVERTED_ROWS)
    memory = None if as_is else empty((min(count, rows), a.shape[1]), out)
    for first in range(0, rows, count):
        chunk, target = a[first : first + count], out[first : first + count]
        if memory is not None:
            chunk = memory[: chunk.shape[0]].copy_(chunk)
        if center is not None:
            chunk -= center
        if bias is None:
            torch.mm(chunk, transposed, out=target)
        else:
            torch.addmm(bias, chunk, transposed, out=target)
