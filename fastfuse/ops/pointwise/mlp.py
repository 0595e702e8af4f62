"""The MLP of a block, ``x + keep * scale * (W2 GELU(W1 n + b1) + b2)``, and its gradients.

n is the input, or the layer norm of the input. Pixels are processed a chunk at a time, so that the
hidden tensor, four times as wide as the image, stays in the last-level cache between the products
and what is done to it. The products are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fastfuse.ops.memory import empty
from fastfuse.ops.product import Weight

__all__ = ["Mlp", "MlpGradients", "Norm", "backward", "forward", "wide"]

# Bytes of a chunk's hidden tensor: long enough for the products, short enough for caches. GPUs
# want chunks that fill them; there the limit is for memory.
HIDDEN_BYTES = {"cpu": 3 << 20, "cuda": 256 << 20}
MIN_ROWS, ROW_MULTIPLE = 512, 128


@overload
def wide(vector: Tensor) -> Tensor: ...


@overload
def wide(vector: None) -> None: ...


def wide(vector: Tensor | None) -> Tensor | None:
    """A vector as the pointwise steps take it: contiguous, in the accumulation dtype."""
    if vector is None:
        return None
    return vector.to(torch.promote_types(vector.dtype, torch.float32)).contiguous()


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Mlp:
    """Matrices in the dtype of images, vectors wide; ``pixels``: rows of an image."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Tensor | None
    keep: Tensor | None
    norm: Norm | None
    pixels: int


@dataclass(frozen=True)
class MlpGradients:
    """Of vectors wide; of matrices wide too where they are sums of several chunks' products."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Tensor | None


def _chunks(rows: int, hidden: int, like: Tensor) -> Iterator[slice]:
    """All of one length but the last, which is no longer."""
    device = "cuda" if like.device.type == "cuda" else "cpu"
    limit = max(HIDDEN_BYTES[device] // (hidden * like.element_size()), MIN_ROWS)
    count = -(-rows // limit)
    length = -(-rows // (count * ROW_MULTIPLE)) * ROW_MULTIPLE if count else 1
    for first in range(0, rows, length):
        yield slice(first, min(first + length, rows))


def _buffers(chunks: list[slice], like: Tensor, *widths: int) -> list[Tensor]:
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return [empty((rows, width), like) for width in widths]


def _product_into(out: Tensor, a: Tensor, weight: Weight) -> Tensor:
    result = weight.product(a, out)
    return out if result is out else out.copy_(result)


def _normalized(inputs: Tensor, norm: Norm | None, buffer: Tensor) -> Tensor:
    if norm is None:
        return inputs
    out = buffer[: inputs.shape[0]]
    torch.ops.fastfuse.layer_norm_into(out, inputs, norm.weight, norm.bias, norm.eps, None, False)
    return out


def forward(out: Tensor, x: Tensor, inputs: Tensor, mlp: Mlp, kept: Tensor | None = None) -> None:
    """out = the MLP of ``inputs``, added to x, all (rows, C).

    ``kept`` (rows, hidden) receives the hidden tensor before its bias, for :func:`backward`.
    """
    ops = torch.ops.fastfuse
    hidden, channels = mlp.fc1_weight.shape
    chunks = list(_chunks(x.shape[0], hidden, x))
    normalized, product, activated = _buffers(
        chunks, x, channels if mlp.norm else 0, channels, hidden
    )
    fc1, fc2 = (Weight(weight, x.shape[0]) for weight in (mlp.fc1_weight, mlp.fc2_weight))
    for chunk in chunks:
        count = chunk.stop - chunk.start
        n = _normalized(inputs[chunk], mlp.norm, normalized)
        a = activated[:count]
        if kept is None:
            h = a = fc1.product(n, a)
        else:
            h = _product_into(kept[chunk], n, fc1)
        ops.bias_gelu_into(a, h, mlp.fc1_bias)
        p = fc2.product(a, product[:count])
        ops.residual_into(
            out[chunk], x[chunk], p, mlp.fc2_bias, mlp.scale, mlp.keep, mlp.pixels, chunk.start
        )


class _Sum:
    """The sum over chunks of products a^T b, in the accumulation dtype if there are several."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self.product = empty((rows, columns), like)
        self.total: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.total is None:
            self.total = torch.mm(a.t(), b, out=self.product)
        elif self.product.dtype in (torch.float32, torch.float64):
            torch.addmm(self.total, a.t(), b, out=self.total)
        else:
            if self.total is self.product:
                self.total = self.product.float()
            self.total.add_(torch.mm(a.t(), b, out=self.product))

    def result(self) -> Tensor:
        return self.product.zero_() if self.total is None else self.total


def backward(
    grad_inputs: Tensor,
    grad: Tensor,
    inputs: Tensor,
    mlp: Mlp,
    kept: Tensor | None = None,
    *,
    of_parameters: bool = True,
) -> MlpGradients | None:
    """The gradient of ``inputs``, written, and those of the parameters; that of x is ``grad``.

    With G = sum keep * grad GELU(h)^T over pixels, which knows nothing of the scale, the gradient
    of fc2_weight is scale * G, and that of the scale the rows' sums of fc2_weight * G: no product
    is computed twice.
    """
    ops = torch.ops.fastfuse
    hidden, channels = mlp.fc1_weight.shape
    accumulation = mlp.fc1_bias
    chunks = list(_chunks(grad.shape[0], hidden, grad))
    normalized, kept_grad, grad_normalized, activated, grad_hidden = _buffers(
        chunks,
        grad,
        channels if mlp.norm else 0,
        channels if mlp.keep is not None else 0,
        channels if mlp.norm else 0,
        hidden,
        hidden,
    )
    fc2_weight = wide_fc2 = mlp.fc2_weight
    if mlp.scale is not None:  # conversions apart: PyTorch is slow where dtypes mix
        wide_fc2 = fc2_weight.to(accumulation.dtype)
        fc2_weight = (wide_fc2 * mlp.scale[:, None]).to(fc2_weight.dtype)
    norm_sums = [accumulation.new_zeros(channels) for _ in range(2)]  # of an op: no views of one
    fc1_bias, fc2_bias = accumulation.new_zeros(hidden), accumulation.new_zeros(channels)
    fc1 = _Sum(hidden, channels, grad) if of_parameters else None
    fc2 = _Sum(channels, hidden, grad) if of_parameters else None
    rows = grad.shape[0]
    to_hidden = Weight(mlp.fc1_weight, rows) if kept is None else None
    to_grad_hidden, to_grad = Weight(fc2_weight.t(), rows), Weight(mlp.fc1_weight.t(), rows)
    for chunk in chunks:
        count = chunk.stop - chunk.start
        g = grad[chunk] if mlp.keep is None else kept_grad[:count]
        ops.residual_backward_into(g, fc2_bias, grad[chunk], mlp.keep, mlp.pixels, chunk.start)
        n = _normalized(inputs[chunk], mlp.norm, normalized)
        a, gh = activated[:count], grad_hidden[:count]
        if to_hidden is not None:
            h = a = to_hidden.product(n, a)
        else:
            assert kept is not None
            h = kept[chunk]
        gh = to_grad_hidden.product(g, gh)
        ops.bias_gelu_backward_into(gh, a, fc1_bias, h, mlp.fc1_bias)
        if fc1 is not None and fc2 is not None:
            fc2.add(g, a)
            fc1.add(gh, n)
        if mlp.norm is None:
            _product_into(grad_inputs[chunk], gh, to_grad)
            continue
        gn = to_grad.product(gh, grad_normalized[:count])
        ops.layer_norm_backward_into(
            grad_inputs[chunk], *norm_sums, gn, inputs[chunk], mlp.norm.weight, mlp.norm.bias,
            mlp.norm.eps, False,
        )  # fmt: skip
    if fc1 is None or fc2 is None:
        return None
    grad_fc2, grad_scale = fc2.result(), None
    if mlp.scale is not None:
        grad_fc2 = grad_fc2.to(accumulation.dtype)
        grad_scale = (grad_fc2 * wide_fc2).sum(1) + mlp.fc2_bias * fc2_bias
        grad_fc2 *= mlp.scale[:, None]
        fc2_bias = mlp.scale * fc2_bias
    return MlpGradients(
        norm_weight=norm_sums[0] if mlp.norm else None,
        norm_bias=norm_sums[1] if mlp.norm else None,
        fc1_weight=fc1.result(),
        fc1_bias=fc1_bias,
        fc2_weight=grad_fc2,
        fc2_bias=fc2_bias,
        scale=grad_scale,
    )
