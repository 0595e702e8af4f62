"""Schemas, shapes and FLOPs of upsample_argmax, which has no derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.define import COMPILED, Op
from fastfuse.ops.upsample_equalize_concat.autograd import flops

__all__ = ["labels", "labels_and_confidence"]


def _pixels(logits: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=dtype)


def _labels_fake(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return _pixels(logits, height, width, torch.int64)


def _both_fake(
    logits: Tensor, height: int, width: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    confidence = _pixels(logits, height, width, accumulation_dtype(logits.dtype))
    return _pixels(logits, height, width, torch.int64), confidence


def _flops(shape: torch.Size, height: int, width: int, *args: Any, **kwargs: Any) -> int:
    """Those of the upsampling; comparisons are none."""
    batch, classes, *size = shape
    return batch * flops(classes, size, (height, width), False)


_ARGUMENTS = "Tensor logits, SymInt height, SymInt width, bool align_corners"
labels = Op(
    f"upsample_argmax({_ARGUMENTS}) -> Tensor",
    kernels={"cpu": COMPILED, "triton": "fastfuse.ops.upsample_argmax.triton:forward"},
    fake=_labels_fake,
    flops=_flops,
)
# The winner's softmax probability too, in the accumulation dtype.
labels_and_confidence = Op(
    f"upsample_argmax_confidence({_ARGUMENTS}) -> (Tensor, Tensor)",
    kernels={"cpu": COMPILED, "triton": "fastfuse.ops.upsample_argmax.triton:forward_confidence"},
    fake=_both_fake,
    flops=_flops,
)
