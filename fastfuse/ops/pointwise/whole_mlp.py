"""The MLP of a block and its gradients as one kernel each, on CPUs; see csrc/cpu/mlp_simd.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import steps_of
from fastfuse.ops.memory import empty
from fastfuse.ops.pointwise.parameters import Mlp, MlpGradients

__all__ = ["backward", "forward"]


def _wide_weights(mlp: Mlp, dtype: torch.dtype) -> list[Tensor]:
    """Both in the accumulation dtype, without gaps."""
    wide = accumulation_dtype(dtype)
    weights = [mlp.fc1_weight, mlp.fc2_weight]
    for name, weight in zip(("fc1_weight", "fc2_weight"), weights, strict=True):
        if weight.dtype != dtype:
            raise RuntimeError(f"block: {name} must be {dtype}, as the image; got {weight.dtype}")
    return [weight.to(wide).contiguous() for weight in weights]


def forward(out: Tensor, x: Tensor, inputs: Tensor, mlp: Mlp, kept: Tensor | None) -> None:
    """out = the MLP of ``inputs``, added to x; ``kept`` gets the hidden tensor before its bias."""
    fc1_weight, fc2_weight = _wide_weights(mlp, x.dtype)
    steps_of(x.device.type).mlp_into(
        out, kept, x, inputs, *(mlp.norm or (None, None, 0.0)), fc1_weight, mlp.fc1_bias,
        fc2_weight, mlp.fc2_bias, mlp.scale, mlp.keep, mlp.pixels,
    )  # fmt: skip


def backward(
    grad_inputs: Tensor,
    grad: Tensor,
    inputs: Tensor,
    mlp: Mlp,
    kept: Tensor | None,
    of_parameters: bool,
) -> MlpGradients | None:
    """As that of the MLP whose products are the library's."""
    vector = mlp.fc1_bias
    fc1_weight, fc2_weight = weights = _wide_weights(mlp, grad.dtype)
    of_norm = [torch.empty_like(v) for v in mlp.norm[:2]] if mlp.norm else [None, None]
    of_fc1_bias, of_fc2_bias = torch.empty_like(vector), torch.empty_like(mlp.fc2_bias)
    of_fc1 = of_fc2 = None
    if of_parameters:
        of_fc1, of_fc2 = (empty(w.shape, vector) for w in weights)
    steps_of(grad.device.type).mlp_backward_into(
        grad_inputs, *of_norm, of_fc1, of_fc1_bias, of_fc2, of_fc2_bias, grad, inputs, kept,
        *(mlp.norm or (None, None, 0.0)), fc1_weight, vector, fc2_weight, mlp.scale, mlp.keep,
        mlp.pixels,
    )  # fmt: skip
    if of_fc1 is None or of_fc2 is None:
        return None
    return MlpGradients.of_sums(mlp, of_norm, of_fc1, of_fc1_bias, of_fc2, of_fc2_bias, fc2_weight)
