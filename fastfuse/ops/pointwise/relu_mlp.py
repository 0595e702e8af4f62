"""The end of a residual block of convolutions, ``ReLU(x + W2 ReLU(W1 n + b1) + b2)``, without
derivatives: pixels a chunk at a time, so that the hidden tensor stays in caches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.layout import as_matrix, to_memory_format
from fastfuse.ops.memory import empty
from fastfuse.ops.pointwise.mlp import Chunks

__all__ = ["relu_mlp"]


def relu_mlp(
    x: Tensor,
    inputs: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """x, inputs (N, C, H, W), weights (hidden, C, 1, 1) and (C, hidden, 1, 1), all of one dtype
    that the processor multiplies -> (N, C, H, W), channels_last."""
    if torch.compiler.is_compiling():  # chunks are of a size that may not be known
        hidden = F.conv2d(inputs, fc1_weight, fc1_bias).relu()
        return (x + F.conv2d(hidden, fc2_weight, fc2_bias)).relu()
    x, inputs = (to_memory_format(t, True) for t in (x, inputs))
    out = empty(x.shape, x, torch.channels_last)
    rows, of_x, of_out = (as_matrix(t) for t in (inputs, x, out))
    fc1, fc2 = (weight.flatten(1).t() for weight in (fc1_weight, fc2_weight))
    chunks = Chunks(rows, fc1_weight.shape[0])
    (memory,) = chunks.memory(fc1_weight.shape[0])
    for chunk in chunks:
        hidden = memory[: chunk.stop - chunk.start]
        torch.addmm(fc1_bias, rows[chunk], fc1, out=hidden).relu_()
        torch.addmm(fc2_bias, hidden, fc2, out=of_out[chunk]).add_(of_x[chunk]).relu_()
    return out
