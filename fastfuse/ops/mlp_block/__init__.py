"""The second half of a transformer's block: layer norm, MLP, residual."""

from __future__ import annotations

from torch import Tensor

from fastfuse.ops.define_block import MLP_PARAMETERS, BlockOp, BlockParameter
from fastfuse.ops.mlp_block import kernel
from fastfuse.ops.mlp_block.reference import reference
from fastfuse.ops.mlp_block.samples import samples

__all__ = ["BLOCK", "mlp_block"]

BLOCK = BlockOp(
    "mlp_block",
    [
        BlockParameter("norm_weight", "channels"),
        BlockParameter("norm_bias", "channels"),
        *MLP_PARAMETERS,
    ],
    ["float eps"],
    kernel=kernel,
    reference=reference,
    samples=samples,
)


def mlp_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    eps: float = 1e-6,
    recompute: bool = True,
) -> Tensor:
    """``x + keep * layer_scale * fc2(GELU(fc1(LN(x))))``: ``fastfuse.ced_block`` without DW.

    Shapes, dtypes, autocast, derivatives, errors and what is kept unasked are ``ced_block``'s;
    ``recompute=False`` keeps the hidden tensor besides x.
    """
    parameters = [
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale,
    ]  # fmt: skip
    return BLOCK(x, parameters, keep, (eps,), recompute)
