"""CEDNet's block for the lowest resolution: two convolution steps, one of them dilated, an MLP."""

from __future__ import annotations

from torch import Tensor

from fastfuse.ops.checks import check_dilation
from fastfuse.ops.define_block import MLP_PARAMETERS, BlockOp, convolution_and_norm_parameters
from fastfuse.ops.lr_ced_block import kernel
from fastfuse.ops.lr_ced_block.reference import reference
from fastfuse.ops.lr_ced_block.samples import samples

__all__ = ["BLOCK", "OPERATION", "lr_ced_block"]

BLOCK = BlockOp(
    "lr_ced_block",
    [*convolution_and_norm_parameters(), *convolution_and_norm_parameters("2"), *MLP_PARAMETERS],
    ["int dilation", "float eps"],
    kernel=kernel,
    reference=reference,
    samples=samples,
)
OPERATION = BLOCK.operation


def lr_ced_block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dw2_weight: Tensor,
    dw2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    dilation: int = 3,
    eps: float = 1e-6,
    recompute: bool = True,
) -> Tensor:
    """CEDNet's long-range block: ``x + keep * layer_scale * fc2(GELU(fc1(z)))`` with

    ``y = x + GELU(LN(DW(x)))`` and ``z = y + GELU(LN(DW2(y)))``, DW2 being dilated.

    DW and DW2 are depthwise k x k convolutions (7 x 7 in the paper), LN normalizes the channels of
    each pixel, GELU is the exact one. For backward only x is kept, and the rest computed once more,
    but for small maps of many channels, as in ``ced_block``.

    Args:
        x: (N, C, H, W), float64, float32, bfloat16 or float16, any strides; channels_last is best.
        dw_weight, dw_bias, dw2_weight, dw2_bias: (C, 1, k, k), k odd, and (C,).
        norm_weight, norm_bias, norm2_weight, norm2_bias: (C,).
        fc1_weight, fc1_bias: (hidden, C) and (hidden,); hidden is 4 C in the paper.
        fc2_weight, fc2_bias: (C, hidden) and (C,).
        layer_scale: (C,), gamma; None: 1. Vectors are in x's dtype, or float32 beside a narrower x.
        keep: (N,), a constant: the factor of each sample's branch under stochastic depth, already
            divided by the probability to be kept; 0 drops the branch. None: 1.
        dilation: of DW2, in pixels, at least 1.
        eps: added to the variances.
        recompute: False keeps what is between the steps and the hidden tensor too, nine tensors of
            x's size in all, which saves the convolutions and the first product of backward.

    Returns:
        (N, C, H, W) in x's dtype and memory format. Under autocast x and the weights of
        convolutions and products are cast to its dtype; biases, norms and scale are not.

    Raises:
        TypeError: an argument is not a tensor, dilation not an int, or eps not a number.
        ValueError: shapes, dtypes or devices that do not fit; dilation below 1; eps not above 0;
            keep that requires grad.
        BackendError: a backend was asked for by name and cannot run.

    First derivatives for all tensors but keep (second ones: the reference backend). The same bits
    from run to run. Source: CEDNet, section 3.3.

    >>> import torch, fastfuse
    >>> c = 16
    >>> x, ones, zeros = torch.randn(2, c, 8, 8), torch.ones(c), torch.zeros(c)
    >>> step = torch.randn(c, 1, 7, 7), zeros, ones, zeros
    >>> products = torch.randn(4 * c, c), torch.zeros(4 * c), torch.randn(c, 4 * c), zeros
    >>> fastfuse.lr_ced_block(x, *step, *step, *products).shape
    torch.Size([2, 16, 8, 8])
    """
    check_dilation("lr_ced_block", dilation)
    parameters = [
        dw_weight, dw_bias, norm_weight, norm_bias, dw2_weight, dw2_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale,
    ]  # fmt: skip
    return BLOCK(x, parameters, keep, (dilation, eps), recompute)
