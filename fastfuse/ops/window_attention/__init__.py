"""Attention in windows of a map, from its queries, keys and values: the inside of modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastfuse.backends import accumulation_dtype, cpu_refusal, requested_backend
from fastfuse.ops.autocast import without_autocast
from fastfuse.ops.window_attention.autograd import forward
from fastfuse.ops.window_attention.reference import convolved_in_windows, reference

__all__ = ["convolved_in_windows", "runs_kernel", "window_attention"]


def runs_kernel(x: Tensor) -> bool:
    """Whether the C++ runs, or else the definition: which it is of products with their biases."""
    return requested_backend() in ("auto", "cpu") and cpu_refusal(x) is None


def window_attention(
    qkv: Tensor,
    windows: Sequence[int],
    *,
    heads: int,
    shift: int = 0,
    centered: bool = False,
    qkv_bias: Tensor | None = None,
    bias: Tensor | None = None,
    local_weight: Tensor | None = None,
    local_bias: Tensor | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v`` of the tokens of each window, head by head.

    No window is cut out: each is read where it lies. On CPUs a few rows of logits at a time stay in
    caches, and backward makes them again.

    Args:
        qkv: (N, H, W, 3 C): queries, keys and values, head after head.
        windows: height and width, of one shape for all heads, or one after the other of several
            with as many heads each; 0: the image's.
        heads: of all.
        shift: by how many pixels windows are moved to the right and down; the map wraps around, and
            tokens see those of their own side alone. Not with ``centered``.
        centered: whether the map is padded to whole windows on all sides, by zeros; else at the
            right and below, by ``qkv_bias``.
        qkv_bias: (3 C,), added to queries, keys and values.
        bias: (heads, tokens, tokens), added to logits of windows of one shape.
        local_weight: (9, C), a 3x3 convolution's of the values inside of each window, added.
        local_bias: (C,).

    Returns:
        (N, H, W, C).
    """
    if not runs_kernel(qkv):
        with without_autocast(qkv.device.type):
            return reference(
                qkv, qkv_bias, bias, local_weight, local_bias, heads, windows, shift, centered
            )
    dtype = accumulation_dtype(qkv.dtype)
    parameters = (
        None if t is None else t.to(dtype).contiguous()
        for t in (qkv_bias, bias, local_weight, local_bias)
    )
    arguments = heads, list(windows), shift, centered
    return forward["cpu"](qkv.contiguous(), *parameters, *arguments)
