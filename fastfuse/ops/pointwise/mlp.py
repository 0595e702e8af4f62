"""The MLP of a block, ``x + keep * scale * (W2 GELU(W1 n + b1) + b2)``, and its gradients.

n is the input, or the layer norm of the input. Pixels are processed a chunk at a time, so that the
hidden tensor, four times as wide as the image, stays in the last-level cache between the products
and what is done to it. The products are the library's. Images of a dtype that the processor does
not multiply are converted to float32 a chunk at a time, and results rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastfuse.ops.define import steps_of
from fastfuse.ops.matmul import (
    MatmulRoute,
    MatmulWeight,
    RowBuffer,
    wide_dtype,
    wide_product,
)
from fastfuse.ops.memory import empty
from fastfuse.ops.policy import policy_of

__all__ = [
    "Chunks",
    "Mlp",
    "MlpGradients",
    "Norm",
    "backward",
    "convolution_bias",
    "forward",
    "mlp_route",
    "to_accumulation",
]

ROW_MULTIPLE = 128


@overload
def to_accumulation(vector: Tensor) -> Tensor: ...


@overload
def to_accumulation(vector: None) -> None: ...


def to_accumulation(vector: Tensor | None) -> Tensor | None:
    """A vector as the pointwise steps take it: contiguous, in the accumulation dtype."""
    if vector is None:
        return None
    if vector.dtype not in (torch.float32, torch.float64):
        vector = vector.float()
    return vector.contiguous()


def convolution_bias(bias: Tensor, x: Tensor) -> Tensor:
    """The bias as the depthwise convolution of x takes it: the CPU kernels in x's dtype."""
    return bias.to(x.dtype) if x.device.type == "cpu" else bias


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, eps: float) -> Norm:
        return cls(to_accumulation(weight), to_accumulation(bias), eps)


class Mlp(NamedTuple):
    """Matrices in the dtype of images, vectors in the accumulation dtype.

    Attributes:
        pixels: rows of an image.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Tensor | None
    keep: Tensor | None
    norm: Norm | None
    pixels: int

    @classmethod
    def of(
        cls, x: Tensor, parameters: Sequence[Any], keep: Tensor | None, norm: Norm | None = None
    ) -> Mlp:
        """Of a block's last five parameters: both layers' and the scale."""
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale = parameters
        return cls(
            fc1_weight,
            to_accumulation(fc1_bias),
            fc2_weight,
            to_accumulation(fc2_bias),
            to_accumulation(scale),
            to_accumulation(keep),
            norm,
            x.shape[2] * x.shape[3],
        )


class MlpGradients(NamedTuple):
    """Of vectors in the accumulation dtype; of matrices too where they sum several chunks. In the
    order of a block's parameters."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Tensor | None


def mlp_route(backend: str, image: Tensor) -> str:
    """What runs the MLP of a block whose hidden tensor is four times as wide as an image."""
    if backend == "reference":
        return backend
    batch, channels, height, width = image.shape
    rows = image.new_empty(batch * height * width, channels)
    chunks = Chunks(rows, 4 * channels)
    products = str(MatmulRoute.of(image.device.type, image.dtype, chunks.rows))
    if chunks.fuses:
        products = "products with what follows them"
    return f"{backend}; {products}, {chunks.length} of {chunks.rows} pixels at a time"


class Chunks:
    """Rows of pixels in chunks, all of one length but the last, which is no longer, and memory for
    what becomes of a chunk, in the dtype of the products."""

    def __init__(self, matrix: Tensor, hidden: int) -> None:
        policy = policy_of(matrix.device.type)
        self.matrix, self.rows = matrix, matrix.shape[0]
        self.dtype = policy.product_dtype(matrix.dtype)
        self.fuses = matrix.dtype in policy.fused_linear  # products with what follows them
        limit = max(policy.hidden_bytes // (hidden * self.dtype.itemsize), policy.hidden_rows)
        count = -(-self.rows // limit)
        length = -(-self.rows // (count * ROW_MULTIPLE)) * ROW_MULTIPLE if count else 1
        self.length = min(length, self.rows)

    def __iter__(self) -> Iterator[slice]:
        for first in range(0, self.rows, max(self.length, 1)):
            yield slice(first, min(first + self.length, self.rows))

    def memory(self, *widths: int) -> list[Tensor]:
        return [empty((self.length, width), self.matrix, dtype=self.dtype) for width in widths]

    def buffers(self, matrices: Sequence[Tensor | None]) -> list[RowBuffer]:
        """For each of some matrices of one dtype; none needs one that is not there."""
        dtype = self.matrix.dtype
        for matrix in matrices:
            if matrix is not None and matrix.dtype != dtype:
                raise ValueError(f"block: tensors must have one dtype, {dtype}; got {matrix.dtype}")
        return [
            RowBuffer(self.length, self.matrix if matrix is None else matrix, self.dtype)
            for matrix in matrices
        ]


def _normalized(inputs: Tensor, norm: Norm | None, buffer: Tensor) -> Tensor:
    if norm is None:
        return inputs
    out = buffer[: inputs.shape[0]]
    ops = steps_of(out.device.type)
    ops.layer_norm_into(out, inputs, norm.weight, norm.bias, norm.eps, None, False)
    return out


def forward(out: Tensor, x: Tensor, inputs: Tensor, mlp: Mlp, kept: Tensor | None = None) -> None:
    """out = the MLP of ``inputs``, added to x, all (rows, C).

    ``kept`` (rows, hidden) receives the hidden tensor before its bias, for :func:`backward`.
    """
    ops = steps_of(x.device.type)
    hidden, channels = mlp.fc1_weight.shape
    chunks = Chunks(x, hidden)
    if chunks.fuses:
        _fused_forward(chunks, out, x, inputs, mlp, kept)
        return
    normalized, product, activated = chunks.memory(channels if mlp.norm else 0, channels, hidden)
    of_out, of_x, of_inputs, of_kept = chunks.buffers([out, x, inputs, kept])
    fc1, fc2 = (MatmulWeight(weight, chunks.rows) for weight in (mlp.fc1_weight, mlp.fc2_weight))
    for chunk in chunks:
        count = chunk.stop - chunk.start
        n = _normalized(of_inputs.read(inputs[chunk]), mlp.norm, normalized)
        if kept is None:
            h = a = fc1.matmul(n, activated[:count])
        else:
            to_keep = kept[chunk]
            h = fc1.matmul(n, of_kept.room(to_keep))
            of_kept.write(h, to_keep)
            a = activated[:count] if h is to_keep else h
        ops.bias_gelu_into(a, h, mlp.fc1_bias)
        p = fc2.matmul(a, product[:count])
        target = out[chunk]
        result = of_out.room(target)
        ops.residual_into(
            result, of_x.read(x[chunk]), p, mlp.fc2_bias, mlp.scale, mlp.keep, mlp.pixels,
            chunk.start,
        )  # fmt: skip
        of_out.write(result, target)


def _fused_forward(
    chunks: Chunks, out: Tensor, x: Tensor, inputs: Tensor, mlp: Mlp, kept: Tensor | None
) -> None:
    """:func:`forward` by products with what follows them."""
    ops = steps_of(x.device.type)
    hidden, channels = mlp.fc1_weight.shape
    normalized, activated = chunks.memory(channels if mlp.norm else 0, hidden)
    for chunk in chunks:
        n = _normalized(inputs[chunk], mlp.norm, normalized)
        a = activated[: n.shape[0]]
        to_keep = None if kept is None else kept[chunk]
        ops.linear_gelu_into(a, to_keep, n, mlp.fc1_weight, mlp.fc1_bias)
        ops.linear_residual_into(
            out[chunk], x[chunk], a, mlp.fc2_weight, mlp.fc2_bias, mlp.scale, mlp.keep, mlp.pixels,
            chunk.start,
        )  # fmt: skip


class _Sum:
    """The sum over chunks of products a^T b, in the accumulation dtype if there are several, or if
    the library gives it."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self.product = empty((rows, columns), like, dtype=wide_dtype(like))
        self.total: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.total is None:
            self.total = wide_product(a.t(), b, self.product)
        elif a.dtype in (torch.float32, torch.float64):
            torch.addmm(self.total, a.t(), b, out=self.total)
        else:
            if self.total is self.product:
                self.total = self.product.to(torch.float32, copy=True)
            self.total.add_(wide_product(a.t(), b, self.product))

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
    ops = steps_of(grad.device.type)
    hidden, channels = mlp.fc1_weight.shape
    accumulation = mlp.fc1_bias
    chunks = Chunks(grad, hidden)
    normalized, kept_grad, grad_normalized, activated, grad_hidden = chunks.memory(
        channels if mlp.norm else 0,
        channels if mlp.keep is not None else 0,
        channels if mlp.norm else 0,
        hidden,
        hidden,
    )
    of_grad_inputs, of_grad, of_inputs, of_kept = chunks.buffers([grad_inputs, grad, inputs, kept])
    fc2_weight = unscaled_fc2 = mlp.fc2_weight
    if mlp.scale is not None:  # conversions apart: PyTorch is slow where dtypes mix
        unscaled_fc2 = fc2_weight.to(accumulation.dtype)
        fc2_weight = (unscaled_fc2 * mlp.scale[:, None]).to(chunks.dtype)
    norm_sums = [accumulation.new_zeros(channels) for _ in range(2)]  # of an op: no views of one
    fc1_bias, fc2_bias = accumulation.new_zeros(hidden), accumulation.new_zeros(channels)
    fc1 = _Sum(hidden, channels, normalized) if of_parameters else None
    fc2 = _Sum(channels, hidden, normalized) if of_parameters else None
    rows = chunks.rows
    to_hidden = to_grad_hidden = None
    if not chunks.fuses:
        to_hidden = MatmulWeight(mlp.fc1_weight, rows) if kept is None else None
        to_grad_hidden = MatmulWeight(fc2_weight.t(), rows)
    to_grad = MatmulWeight(mlp.fc1_weight.t(), rows)
    for chunk in chunks:
        count = chunk.stop - chunk.start
        of_out = of_grad.read(grad[chunk])
        g = of_out if mlp.keep is None else kept_grad[:count]
        ops.residual_backward_into(g, fc2_bias, of_out, mlp.keep, mlp.pixels, chunk.start)
        x = of_inputs.read(inputs[chunk])
        n = _normalized(x, mlp.norm, normalized)
        a, gh = activated[:count], grad_hidden[:count]
        if to_grad_hidden is None:
            h, weight = (n, mlp.fc1_weight) if kept is None else (kept[chunk], None)
            ops.linear_gelu_backward_into(
                gh, a, fc1_bias, g, fc2_weight.t(), h, weight, mlp.fc1_bias
            )
        else:
            if to_hidden is not None:
                h = a = to_hidden.matmul(n, a)
            else:
                assert kept is not None
                h = of_kept.read(kept[chunk])
            gh = to_grad_hidden.matmul(g, gh)
            ops.bias_gelu_backward_into(gh, a, fc1_bias, h, mlp.fc1_bias)
        if fc1 is not None and fc2 is not None:
            fc2.add(g, a)
            fc1.add(gh, n)
        target = grad_inputs[chunk]
        result = of_grad_inputs.room(target)
        if mlp.norm is None:
            result = to_grad.matmul(gh, result)
        else:
            gn = to_grad.matmul(gh, grad_normalized[:count])
            ops.layer_norm_backward_into(
                result, *norm_sums, gn, x, mlp.norm.weight, mlp.norm.bias, mlp.norm.eps, False
            )
        of_grad_inputs.write(result, target)
    if fc1 is None or fc2 is None:
        return None
    grad_fc2, grad_scale = fc2.result(), None
    if mlp.scale is not None:
        grad_fc2 = grad_fc2.to(accumulation.dtype)
        room = fc2_weight if fc2_weight.dtype == grad_fc2.dtype else None  # fresh memory is slow
        grad_scale = torch.mul(grad_fc2, unscaled_fc2, out=room).sum(1) + mlp.fc2_bias * fc2_bias
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
