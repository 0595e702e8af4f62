"""Linear layers with what follows them, on CUDA devices: a product's result is finished in
registers, and the hidden tensor, four times as wide as the image, is written once.

Programs own tiles of the result, and those that read the same rows of the input follow each other,
for the L2 cache. Sums are float32, in an order of the shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.launch_triton import Launch, cdiv, planned
from fastfuse.ops.pointwise.linear_triton import (
    linear_gelu_backward_kernel,
    linear_gelu_kernel,
    linear_residual_kernel,
)
from fastfuse.ops.pointwise.triton import add_launch

__all__ = ["linear_gelu_backward_into", "linear_gelu_into", "linear_residual_into"]

NUM_WARPS, STAGES = 8, 3
# A tile's sides. Each narrower block of columns reads the input once more, like COLUMN_COST more.
BLOCK_R, MIN_BLOCK_R = 128, 64
COLUMN_BLOCKS, COLUMN_COST = (128, 64, 32), 64
COLUMN_BLOCKS_OF_TWO = (64, 32)  # of two products, whose sums are registers
BLOCK_K = 64
MIN_PROGRAMS = 132  # fill today's devices once: below, tiles have fewer rows


def _blocks(rows: int, columns: int, products: int) -> tuple[int, int]:
    allowed = COLUMN_BLOCKS if products == 1 else COLUMN_BLOCKS_OF_TWO
    block_c = min(allowed, key=lambda block: cdiv(columns, block) * (block + COLUMN_COST))
    block_r = BLOCK_R
    while block_r > MIN_BLOCK_R and cdiv(rows, block_r) * cdiv(columns, block_c) < MIN_PROGRAMS:
        block_r //= 2
    return block_r, block_c


@planned
def _launch(
    kernel: Any, device: torch.device, rows: int, inner: tuple[int, ...], columns: int,
    others: tuple[int | None, ...],
) -> tuple[int, Launch]:  # fmt: skip
    """Blocks of rows, and the launch. ``inner``: what products sum over, several products' last."""
    block_r, block_c = _blocks(rows, columns, len(inner))
    block_k = BLOCK_K if all(n % BLOCK_K == 0 for n in inner) else BLOCK_K // 2
    even = ("EVEN",) if len(inner) == 1 else ("GRAD_EVEN", "EVEN")
    constants = {
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "BLOCK_K": block_k,
        **{name: n % block_k == 0 for name, n in zip(even, inner, strict=True)},
        "num_warps": NUM_WARPS if block_r * block_c >= 8192 else NUM_WARPS // 2,
        "num_stages": STAGES,
    }
    blocks = cdiv(rows, block_r)
    integers = (rows, *inner, columns, *others)
    return blocks, Launch(kernel, blocks * cdiv(columns, block_c), device, integers, constants)


def linear_gelu_into(
    out: Tensor, kept: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """``out = gelu(x weight^T + bias)``, ``kept`` = the product before its bias."""
    if out.numel() == 0:
        return
    strides = (
        x.stride(0), *weight.stride(), out.stride(0), None if kept is None else kept.stride(0),
    )  # fmt: skip
    _, launch = _launch(
        linear_gelu_kernel, out.device, out.shape[0], (x.shape[1],), out.shape[1], strides
    )
    launch(out, kept, x, weight, bias)


def linear_residual_into(
    out: Tensor, skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    keep: Tensor | None, pixels: int, first: int,
) -> None:  # fmt: skip
    """``out = skip + keep[image] * scale * (x weight^T + bias)``, image as in residual_into."""
    if out.numel() == 0:
        return
    others = (x.stride(0), *weight.stride(), out.stride(0), skip.stride(0), pixels, first)
    _, launch = _launch(
        linear_residual_kernel, out.device, out.shape[0], (x.shape[1],), out.shape[1], others
    )
    launch(out, skip, x, weight, bias, scale, keep)


def linear_gelu_backward_into(
    grad_hidden: Tensor, activated: Tensor, grad_bias: Tensor, grad: Tensor, grad_weight: Tensor,
    x: Tensor, weight: Tensor | None, bias: Tensor,
) -> None:  # fmt: skip
    """With h = x weight^T, or x itself if there is no weight, and h' = h + bias:
    ``grad_hidden = grad grad_weight^T * gelu'(h')``, ``activated = gelu(h')``,
    ``grad_bias +=`` the sum of grad_hidden's rows.
    """
    if grad_hidden.numel() == 0:
        return
    rows, columns = grad_hidden.shape
    others = (
        grad.stride(0), *grad_weight.stride(), x.stride(0),
        *((None, None) if weight is None else weight.stride()), grad_hidden.stride(0),
        activated.stride(0),
    )  # fmt: skip
    blocks, launch = _launch(
        linear_gelu_backward_kernel, grad.device, rows, (grad.shape[1], x.shape[1]), columns, others
    )
    partials = grad_bias.new_empty((1, blocks, columns))
    launch(grad_hidden, activated, partials, grad, grad_weight, x, weight, bias)
    add_launch(grad.device, 1, blocks, columns)((grad_bias,), partials)
