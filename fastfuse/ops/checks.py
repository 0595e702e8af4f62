"""Checks of what users pass to ops. Every message says: op, argument, what was expected, what came.

They run under torch.compile too, so they are plain Python on shapes and dtypes and never read a
tensor's values.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.backends import DTYPES

# Constants are applied in float32 (float64 for float64): they and their inverses must exist there.
FLOAT32 = torch.finfo(torch.float32)

__all__ = ["FLOAT32", "check_constants", "check_features", "check_size", "feature_list"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def feature_list(op: str, features: Sequence[Tensor]) -> list[Tensor]:
    """``features`` as a list, once it is known to be a non-empty sequence of tensors."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(
            f"{op}: features must be a sequence of tensors, one per level; "
            f"got {type(features).__name__}"
        )
    if len(features) == 0:
        raise ValueError(f"{op}: features must have at least one level; got none")
    for i, feature in enumerate(features):
        if not isinstance(feature, Tensor):
            raise TypeError(f"{op}: features[{i}] must be a tensor; got {type(feature).__name__}")
    return list(features)


def check_features(op: str, features: Sequence[Tensor]) -> None:
    """Levels are (N, C_i, H_i, W_i) floating-point images of one N, device and dtype."""
    first = features[0]
    for i, feature in enumerate(features):
        shape = tuple(feature.shape)
        if feature.dim() != 4:
            raise ValueError(
                f"{op}: features[{i}] must have 4 dimensions (N, C, H, W); got shape {shape}"
            )
        if feature.layout != torch.strided:
            raise ValueError(
                f"{op}: features[{i}] must be a dense tensor; got layout {feature.layout}"
            )
        if feature.dtype not in DTYPES:
            raise ValueError(
                f"{op}: features[{i}] must be float64, float32, bfloat16 or float16; "
                f"got {_name(feature.dtype)}"
            )
        if feature.dtype != first.dtype:
            raise ValueError(
                f"{op}: features must share one dtype; features[0] is {_name(first.dtype)}, "
                f"features[{i}] is {_name(feature.dtype)}"
            )
        if feature.device != first.device:
            raise ValueError(
                f"{op}: features must be on one device; features[0] is on {first.device}, "
                f"features[{i}] is on {feature.device}"
            )
        if shape[0] != first.shape[0]:
            raise ValueError(
                f"{op}: features must share one batch size N; features[0] has {first.shape[0]}, "
                f"features[{i}] has {shape[0]}"
            )
        if shape[2] < 1 or shape[3] < 1:
            raise ValueError(
                f"{op}: features[{i}] must be at least 1 pixel high and wide; got shape {shape}"
            )


def check_size(op: str, size: Sequence[int] | None, features: Sequence[Tensor]) -> tuple[int, int]:
    """The target size: as given, or the largest height and width among the levels."""
    if size is None:
        return max(f.shape[2] for f in features), max(f.shape[3] for f in features)
    if isinstance(size, Sequence) and len(size) == 2 and all(_is_extent(value) for value in size):
        return size[0], size[1]
    raise ValueError(
        f"{op}: size must be two positive ints (height, width) below 2^31; got {size!r}"
    )


def _is_extent(value: object) -> bool:
    is_int = isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
    return is_int and 1 <= value < 2**31  # type: ignore[operator]


def check_constants(
    op: str,
    argument: str,
    values: Sequence[float] | Tensor | None,
    features: Sequence[Tensor],
    *,
    positive: bool = False,
) -> Tensor | None:
    """One constant per level, as a 1-D float32 or float64 tensor on the features' device.

    Floats are checked here. A tensor's values are not read: that would wait for the device, and
    break a compiled graph; they are checked where they are written.
    """
    if values is None:
        return None
    levels, device = len(features), features[0].device
    if isinstance(values, Tensor):
        if tuple(values.shape) != (levels,):
            raise ValueError(
                f"{op}: {argument} must have one value per level, shape ({levels},); "
                f"got shape {tuple(values.shape)}"
            )
        if not values.is_floating_point():
            raise ValueError(
                f"{op}: {argument} must be a floating-point tensor; got {_name(values.dtype)}"
            )
        if values.requires_grad:
            raise ValueError(
                f"{op}: {argument} must be constant; got a tensor that requires grad "
                f"(use .detach())"
            )
        if values.device != device:
            raise ValueError(
                f"{op}: {argument} must be on the features' device {device}; "
                f"got one on {values.device}"
            )
        return values if values.dtype in (torch.float32, torch.float64) else values.float()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(
            f"{op}: {argument} must be a sequence of {levels} floats, a tensor of shape "
            f"({levels},) or None; got {type(values).__name__}"
        )
    if len(values) != levels:
        raise ValueError(
            f"{op}: {argument} must have one value per level, {levels}; got {len(values)}"
        )
    for i, value in enumerate(values):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{op}: {argument}[{i}] must be a float; got {type(value).__name__}")
        # Comparisons, for values may be symbols of a compiled graph.
        if not -FLOAT32.max <= value <= FLOAT32.max or (positive and value < FLOAT32.tiny):
            wanted = f"positive (at least {FLOAT32.tiny:.2e}) and finite" if positive else "finite"
            raise ValueError(f"{op}: {argument}[{i}] must be {wanted}; got {value}")
    constants = torch.tensor(list(values), dtype=torch.float64)
    return constants if device.type == "cpu" else constants.to(device, non_blocking=True)
