"""Matrix products with a weight, by the library that does them fastest."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Weight"]

# oneDNN's product as torch.compile uses it, and its weights; None where this PyTorch has none.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_HAS_BF16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)


def _dtypes() -> frozenset[torch.dtype]:
    """Those that oneDNN multiplies on this processor; bfloat16 needs AVX-512."""
    if _LINEAR is None or _PACK is None:
        return frozenset()
    narrow = {torch.bfloat16} if _HAS_BF16 is not None and _HAS_BF16() else set()
    return frozenset({torch.float32, *narrow})


ONEDNN_DTYPES = _dtypes()


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
        if weight.device.type != "cpu" or weight.dtype not in ONEDNN_DTYPES or not weight.numel():
            return
        # Transposed ones it takes as they are, slices take it 1000 times as long.
        if weight.stride() != (1, weight.shape[0]):
            weight = weight.contiguous()
        assert _PACK is not None
        self.packed = _PACK(weight, rows) if rows >= PACKING_ROWS else weight

    def product(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """a weight^T, (rows, C_out); what is returned counts, for oneDNN brings memory of its own.

        Args:
            a: (rows, C_in), rows without gaps.
            out: memory for the result, where the library takes some.
        """
        if self.packed is not None and a.shape[0] > 0:
            assert _LINEAR is not None
            return _LINEAR(a, self.packed, None, "none", [], "")
        return torch.mm(a, self.transposed, out=out)
