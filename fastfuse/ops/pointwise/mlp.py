"""The MLP of a block, ``x + keep * scale * (W2 GELU(W1 n + b1) + b2)``, and its gradients.

n is the input, or the layer norm of the input. Where the policy says so, it is one kernel of ours
(csrc/cpu/mlp_simd.cpp). Else pixels are processed a chunk at a time, so that the hidden tensor,
four times as wide as the image, stays in the last-level cache between the products and what is done
to it, and the products are the library's. Images of a dtype that the processor does not multiply
are converted to float32 a chunk at a time, and results rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import steps_of
from fastfuse.ops.matmul import (
    MatmulRoute,
    MatmulWeight,
    RowBuffer,
    wide_dtype,
    wide_product,
)
from fastfuse.ops.memory import empty
from fastfuse.ops.pointwise import whole_mlp
from fastfuse.ops.pointwise.parameters import Mlp, MlpGradients, Norm
from fastfuse.ops.policy import policy_of

__all__ = ["Chunks", "backward", "forward", "mlp_route"]

ROW_MULTIPLE = 128


def mlp_route(backend: str, image: Tensor) -> str:
    """What runs the MLP of a block whose hidden tensor is four times as wide as an image."""
    if backend == "reference":
        return backend
    batch, channels, height, width = image.shape
    rows = image.new_empty(batch * height * width, channels)
    policy = policy_of(image.device.type)
    chunks = Chunks(rows, 4 * channels)
    products = str(MatmulRoute.of(image.device.type, image.dtype, chunks.rows))
    if chunks.fuses:
        products = "products with what follows them"
    steps = f"{products}, {chunks.length} of {chunks.rows} pixels at a time"
    if image.dtype not in policy.whole_mlp:
        return f"{backend}; {steps}"
    dtype = str(accumulation_dtype(image.dtype)).removeprefix("torch.")
    whole = f"{backend}; products in {dtype} in one kernel with what lies between them"
    if policy.backward_is_whole(rows, 4 * channels):
        return whole
    return f"{whole}; their gradients: {steps}"


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
    if x.dtype in policy_of(x.device.type).whole_mlp:
        whole_mlp.forward(out, x, inputs, mlp, kept)
        return
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
    policy = policy_of(grad.device.type)
    if policy.backward_is_whole(grad, mlp.fc1_weight.shape[0]):
        return whole_mlp.backward(grad_inputs, grad, inputs, mlp, kept, of_parameters)
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
    room = None
    if mlp.scale is not None and fc2_weight.dtype == accumulation.dtype:
        room = fc2_weight  # fresh memory is slow
    return MlpGradients.of_sums(
        mlp, norm_sums, fc1.result(), fc1_bias, fc2.result(), fc2_bias, unscaled_fc2, room
    )
