"""Fused ops, one package each. ``OPERATIONS`` lists them for ``info`` and ``verify``."""

from fastfuse.ops.ced_block import OPERATION as _CED_BLOCK
from fastfuse.ops.define import Operation
from fastfuse.ops.depthwise_conv2d import OPERATION as _DEPTHWISE_CONV2D
from fastfuse.ops.fusion_conv2d import OPERATION as _FUSION_CONV2D
from fastfuse.ops.lr_ced_block import OPERATION as _LR_CED_BLOCK
from fastfuse.ops.tap_sum import OPERATION as _TAP_SUM
from fastfuse.ops.upsample_add import OPERATION as _UPSAMPLE_ADD
from fastfuse.ops.upsample_argmax import OPERATION as _UPSAMPLE_ARGMAX
from fastfuse.ops.upsample_cross_entropy import OPERATION as _UPSAMPLE_CROSS_ENTROPY
from fastfuse.ops.upsample_equalize_concat import OPERATION as _UPSAMPLE_EQUALIZE_CONCAT

__all__ = ["OPERATIONS"]

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        _UPSAMPLE_EQUALIZE_CONCAT,
        _TAP_SUM,
        _FUSION_CONV2D,
        _DEPTHWISE_CONV2D,
        _CED_BLOCK,
        _LR_CED_BLOCK,
        _UPSAMPLE_ADD,
        _UPSAMPLE_ARGMAX,
        _UPSAMPLE_CROSS_ENTROPY,
    )
}
