"""The end of a residual block of convolutions, ``ReLU(x + W2 ReLU(W1 n + b1) + b2)``, without
derivatives: pixels a chunk at a time, so that the hidden tensor stays in caches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.define import COMPILED, Op
from fastfuse.ops.layout import as_matrix, to_memory_format
from fastfuse.ops.pointwise.mlp import Chunks
from fastfuse.ops.pointwise.parameters import to_accumulation

__all__ = ["relu_mlp"]

# out = ReLU(product + bias + skip); out may be product or skip
bias_relu_into = Op(
    "bias_relu_into(Tensor(a!) out, Tensor product, Tensor bias, Tensor? skip) -> ()",
    kernels={"cpu": COMPILED},
)


def relu_mlp(
    x: Tensor,
    inputs: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """x, inputs (N, C, H, W), weights (hidden, C, 1, 1) and (C, hidden, 1, 1), all of one dtype
    that the processor multiplies -> (N, C, H, W), channels_last. The inputs may be overwritten:
    fresh memory would take as long as a pass."""
    if torch.compiler.is_compiling():  # chunks are of a size that may not be known
        hidden = F.conv2d(inputs, fc1_weight, fc1_bias).relu()
        return (x + F.conv2d(hidden, fc2_weight, fc2_bias)).relu()
    x, out = (to_memory_format(t, True) for t in (x, inputs))
    of_out, of_x = as_matrix(out), as_matrix(x)
    fc1, fc2 = (weight.flatten(1).t() for weight in (fc1_weight, fc2_weight))
    biases = [to_accumulation(bias) for bias in (fc1_bias, fc2_bias)]
    chunks = Chunks(of_out, fc1_weight.shape[0])
    memory, products = chunks.memory(*fc1_weight.shape[:2])
    for chunk in chunks:
        length = chunk.stop - chunk.start
        hidden, product = memory[:length], products[:length]
        torch.mm(of_out[chunk], fc1, out=hidden)
        bias_relu_into["cpu"](hidden, hidden, biases[0], None)
        torch.mm(hidden, fc2, out=product)
        bias_relu_into["cpu"](of_out[chunk], product, biases[1], of_x[chunk])
    return out
