"""The block of CEDNet and ConvNeXt: depthwise convolution, layer norm, MLP, residual."""

from __future__ import annotations

from torch import Tensor

from fastfuse.ops.ced_block import kernel
from fastfuse.ops.ced_block.reference import reference
from fastfuse.ops.ced_block.samples import samples
from fastfuse.ops.define_block import MLP_PARAMETERS, BlockOp, convolution_and_norm_parameters

__all__ = ["BLOCK", "OPERATION", "ced_block"]

BLOCK = BlockOp(
    "ced_block",
    [*convolution_and_norm_parameters(), *MLP_PARAMETERS],
    ["float eps"],
    kernel=kernel,
    reference=reference,
    samples=samples,
)
OPERATION = BLOCK.operation


def ced_block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
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
    """``x + keep * layer_scale * fc2(GELU(fc1(LN(DW(x)))))``, the block of CEDNet and ConvNeXt.

    DW is a depthwise k x k convolution (7 x 7 in both papers), LN normalizes the channels of each
    pixel, GELU is the exact one. For backward only x is kept, and the rest computed once more;
    eager PyTorch keeps about twelve tensors of x's size. Of small maps of many channels it is all
    kept, where that takes no more memory than the parameters and their gradients.

    Args:
        x: (N, C, H, W), float64, float32, bfloat16 or float16, any strides; channels_last is best.
        dw_weight, dw_bias: (C, 1, k, k), k odd, and (C,).
        norm_weight, norm_bias: (C,).
        fc1_weight, fc1_bias: (hidden, C) and (hidden,); hidden is 4 C in both papers.
        fc2_weight, fc2_bias: (C, hidden) and (C,).
        layer_scale: (C,), gamma; None: 1. Vectors are in x's dtype, or float32 beside a narrower x.
        keep: (N,), a constant: the factor of each sample's branch under stochastic depth, already
            divided by the probability to be kept; 0 drops the branch. None: 1.
        eps: added to the variance.
        recompute: False keeps the convolution's result and the hidden tensor too, six tensors of
            x's size in all, which saves the first product of backward.

    Returns:
        (N, C, H, W) in x's dtype and memory format. Under autocast x and the weights of
        convolution and products are cast to its dtype; biases, norm and scale are not.

    Raises:
        TypeError: an argument is not a tensor, or eps not a number.
        ValueError: shapes, dtypes or devices that do not fit; eps not above 0; keep that requires
            grad.
        BackendError: a backend was asked for by name and cannot run.

    First derivatives for all tensors but keep (second ones: the reference backend). The same bits
    from run to run. Source: CEDNet, section 3.3; ConvNeXt, figure 4.

    >>> import torch, fastfuse
    >>> c = 16
    >>> x, ones, zeros = torch.randn(2, c, 8, 8), torch.ones(c), torch.zeros(c)
    >>> convolution = torch.randn(c, 1, 7, 7), zeros
    >>> products = torch.randn(4 * c, c), torch.zeros(4 * c), torch.randn(c, 4 * c), zeros
    >>> fastfuse.ced_block(x, *convolution, ones, zeros, *products, layer_scale=ones).shape
    torch.Size([2, 16, 8, 8])
    """
    parameters = [
        dw_weight, dw_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        layer_scale,
    ]  # fmt: skip
    return BLOCK(x, parameters, keep, (eps,), recompute)
