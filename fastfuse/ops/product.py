"""Matrix products with a weight, by the library that does them fastest."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Weight"]

# oneDNN's product as torch.compile uses it, and its weights; None where this PyTorch has none.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


# Rows from which packing, about 0.1 ms and 1 ns a weight, pays for itself.
PACKING_ROWS = 4096


class Weight:
    """A weight (C_out, C_in) for products of rows with it, by the library that is fastest.

    A static rule: in float32 and bfloat16 on CPUs oneDNN, with the weight packed once if there are
    rows enough (float32: 190 to 220 GFLOP/s on two Zen 4 cores, unpacked 180 to 210, where torch.mm
    has 150 to 190; bfloat16: 425 to 440, 410 to 425, 390 to 420; docs/ced_block.md); else torch.mm.

    Args:
        weight: (C_out, C_in), any strides.
        rows: of all products together.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.transposed = weight.t()
        self.packed: Tensor | None = None
        known = weight.dtype in (torch.float32, torch.bfloat16) and weight.numel() > 0
        if _LINEAR is None or _PACK is None or weight.device.type != "cpu" or not known:
            return
        # Transposed ones it takes as they are, slices take it 1000 times as long.
        if weight.stride() != (1, weight.shape[0]):
            weight = weight.contiguous()
        self.packed = _PACK(weight, rows) if rows >= PACKING_ROWS else weight

    def product(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """a weight^T, (rows, C_out), in ``out`` or, if the library has it so, in memory of its own.

        Args:
            a: (rows, C_in), rows without gaps.
            out: memory for the result, which may be left unused.
        """
        if self.packed is not None and _LINEAR is not None and a.shape[0] > 0:
            return _LINEAR(a, self.packed, None, "none", [], "")
        return torch.mm(a, self.transposed, out=out)
