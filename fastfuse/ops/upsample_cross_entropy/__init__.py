"""Cross-entropy at the target's size, of logits that are upsampled and never built."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from fastfuse.backends import select
from fastfuse.ops.autocast import without_autocast
from fastfuse.ops.checks import check_image, check_tensor, check_vector
from fastfuse.ops.define import Operation
from fastfuse.ops.upsample_cross_entropy.autograd import forward
from fastfuse.ops.upsample_cross_entropy.reference import reference
from fastfuse.ops.upsample_cross_entropy.samples import samples

__all__ = ["OPERATION", "upsample_cross_entropy"]

NAME = "upsample_cross_entropy"
_REDUCTIONS = ("mean", "sum", "none")


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """``cross_entropy(UP(logits), target)`` with UP to the target's size.

    UP is bilinear interpolation as in ``torch.nn.functional.interpolate`` (any ratio, up or down),
    and the rest ``torch.nn.functional.cross_entropy``, argument for argument. Upsampled logits are
    never stored, nor kept for backward: a pixel's classes are interpolated in registers. Memory
    beside the gradient is two numbers a pixel.

    Args:
        logits: (N, C, h, w), float64, float32, bfloat16 or float16 (computed in float32, or float64
            for float64), C at least 1, any strides.
        target: (N, H, W) int64, the class of each pixel, 0 to C - 1, or ignore_index.
        weight: (C,), of the classes, floating-point and constant; None: 1.
        ignore_index: the target of pixels that do not count.
        label_smoothing: in [0, 1].
        reduction: "mean", over the weights of the pixels that count; "sum"; "none".
        align_corners: as in ``interpolate``.

    Returns:
        A scalar, or (N, H, W) of no reduction, in float32 (float64 for float64). The mean of no
        pixel is nan.

    Raises:
        TypeError: an argument is not a tensor, or a number not one.
        ValueError: shapes, dtypes, devices or numbers that do not fit.
        RuntimeError: a target that is no class, which is named. On CUDA devices nothing waits for
            such a check: that pixel's loss is nan, and with it the mean and the sum.
        BackendError: a backend was asked for by name and cannot run.

    First derivatives for logits (second ones: the reference backend); the same bits from run to
    run, and on CPUs for any number of threads. Autocast changes nothing: the loss is float32 at
    least. Source: the loss of every segmentation network.

    >>> import torch, fastfuse
    >>> logits = torch.randn(2, 19, 16, 32, requires_grad=True)
    >>> target = torch.randint(19, (2, 64, 128))
    >>> fastfuse.upsample_cross_entropy(logits, target, ignore_index=255).backward()
    >>> logits.grad.shape
    torch.Size([2, 19, 16, 32])
    """
    check_image(NAME, "logits", logits)
    _check_target(logits, target)
    weight = _checked_weight(logits, weight)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"{NAME}: ignore_index must be an int; got {type(ignore_index).__name__}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real):
        kind = type(label_smoothing).__name__
        raise TypeError(f"{NAME}: label_smoothing must be a number; got {kind}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{NAME}: label_smoothing must be in [0, 1]; got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        expected = ", ".join(_REDUCTIONS)
        raise ValueError(f"{NAME}: reduction must be one of {expected}; got {reduction!r}")
    options = weight, ignore_index, float(label_smoothing), align_corners
    backend, device = select(OPERATION, logits), logits.device.type
    with without_autocast(device):
        if backend == "reference":
            return reference(logits, target, *options, reduction)
        loss, _ = forward[backend](logits, target, *options)
        if reduction == "none":
            return loss
        total = loss.sum()
        return total if reduction == "sum" else total / _count(target, weight, ignore_index)


def _count(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """How many pixels count, or their weights' sum."""
    counted = target != ignore_index
    if weight is None:
        return counted.count_nonzero()
    return weight[target.masked_fill(~counted, 0).clamp(0, weight.shape[0] - 1)][counted].sum()


def _check_target(logits: Tensor, target: Tensor) -> None:
    check_tensor(NAME, "target", target)
    if logits.shape[1] < 1:
        raise ValueError(
            f"{NAME}: logits must have at least 1 class; got shape {tuple(logits.shape)}"
        )
    if target.dim() != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{NAME}: target must have shape (N, H, W) with N = {logits.shape[0]}; "
            f"got shape {tuple(target.shape)}"
        )
    if target.shape[1] < 1 or target.shape[2] < 1:
        raise ValueError(
            f"{NAME}: target must be at least 1 pixel high and wide; "
            f"got shape {tuple(target.shape)}"
        )
    if target.dtype != torch.int64:
        name = str(target.dtype).removeprefix("torch.")
        raise ValueError(f"{NAME}: target must be int64; got {name}")
    if target.device != logits.device:
        raise ValueError(
            f"{NAME}: target must be on the logits' device {logits.device}; "
            f"got one on {target.device}"
        )


def _checked_weight(logits: Tensor, weight: Tensor | None) -> Tensor | None:
    """In the accumulation dtype."""
    if weight is None:
        return None
    check_tensor(NAME, "weight", weight)
    if not weight.is_floating_point():
        name = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{NAME}: weight must be a floating-point tensor; got {name}")
    if weight.requires_grad:
        raise ValueError(
            f"{NAME}: weight must be constant; got a tensor that requires grad (use .detach())"
        )
    wide = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    if weight.device == logits.device:
        weight = weight.to(wide.dtype)
    check_vector(NAME, "weight", weight, logits.shape[1], "one value per class", wide)
    return weight


OPERATION = Operation(forward, reference, samples, twice_differentiable=False, autocasts=False)
