"""Cross-entropy at the target's size, of logits that are upsampled and never built."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype, is_transformed, select
from fastfuse.ops.autocast import without_autocast
from fastfuse.ops.checks import (
    check_count,
    check_feature_map,
    check_ints,
    check_tensor,
    check_vector,
)
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
    check_feature_map(NAME, "logits", logits)
    _check_target(logits, target)
    weight = _checked_weight(logits, weight)
    check_ints(NAME, ignore_index=ignore_index)
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{NAME}: ignore_index must be an int of 64 bits; got {ignore_index}")
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
            try:
                return reference(logits, target, *options, reduction)
            except (IndexError, RuntimeError):
                if device == "cpu" and not is_transformed():  # where values can be read
                    _check_classes(target, logits.shape[1], ignore_index)
                raise
        loss, _ = forward[backend](logits, target, *options)
        if reduction == "none":
            return loss
        total = _sum(loss)
        return total if reduction == "sum" else total / _count(target, weight, ignore_index)


def _sum(values: Tensor) -> Tensor:
    """Axis by axis: the order of torch.sum over all of them depends on the number of threads."""
    return values.sum(2).sum(1).sum()


def _count(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """How many pixels count, or their weights' sum."""
    if weight is None:
        return (target != ignore_index).count_nonzero()
    weights = weight[target.clamp(0, weight.shape[0] - 1)]
    return _sum(weights.masked_fill(target == ignore_index, 0))


def _check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """PyTorch names the value, or neither; the kernels say where it is too."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    for at in wrong.nonzero()[:1].tolist():
        raise RuntimeError(
            f"{NAME}: target must be classes from 0 to {classes - 1} or ignore_index = "
            f"{ignore_index}; got {target[tuple(at)].item()} at {at}"
        )


def _check_dense(argument: str, value: Tensor) -> None:
    check_tensor(NAME, argument, value)
    if value.layout != torch.strided:
        raise ValueError(f"{NAME}: {argument} must be a dense tensor; got layout {value.layout}")


def _check_target(logits: Tensor, target: Tensor) -> None:
    _check_dense("target", target)
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
    check_count(NAME, "target", "pixels, of all samples,", target.numel(), logits.device)
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
    _check_dense("weight", weight)
    if not weight.is_floating_point():
        name = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{NAME}: weight must be a floating-point tensor; got {name}")
    if weight.requires_grad:
        raise ValueError(
            f"{NAME}: weight must be constant; got a tensor that requires grad (use .detach())"
        )
    like = logits.new_empty(0, dtype=accumulation_dtype(logits.dtype))
    if weight.device == logits.device:
        weight = weight.to(like.dtype)
    check_vector(NAME, "weight", weight, logits.shape[1], "one value per class", like)
    return weight


OPERATION = Operation(forward, reference, samples, twice_differentiable=False, autocasts=False)
