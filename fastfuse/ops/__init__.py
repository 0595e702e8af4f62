"""Fused ops, one package each. ``OPERATIONS`` lists them for ``info`` and ``verify``."""

from fastfuse.backends import Operation
from fastfuse.ops.upsample_equalize_concat import OPERATION as _UPSAMPLE_EQUALIZE_CONCAT
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

__all__ = ["OPERATIONS", "upsample_equalize_concat"]

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for operation in (_UPSAMPLE_EQUALIZE_CONCAT,)
}
