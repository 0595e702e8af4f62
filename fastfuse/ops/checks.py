"""Checks of what users pass to ops. Every message says: op, argument, what was expected, what came.

They run under torch.compile too, so they are plain Python on shapes and dtypes and never read a
tensor's values.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.backends import DTYPES, accumulation_dtype

# Constants are applied in float32 (float64 for float64): they and their inverses must exist there.
FLOAT32 = torch.finfo(torch.float32)

__all__ = [
    "FLOAT32",
    "check_constants",
    "check_convolved_size",
    "check_count",
    "check_depthwise_weight",
    "check_dilation",
    "check_eps",
    "check_feature_map",
    "check_features",
    "check_ints",
    "check_keep",
    "check_kernel_size",
    "check_matrix",
    "check_padding",
    "check_same_kind",
    "check_size",
    "check_tensor",
    "check_vector",
    "feature_list",
    "is_int",
]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(value: object) -> str:
    """The class of what is no tensor, and what to do about those of torch.fx."""
    if isinstance(value, torch.fx.Proxy):
        return "torch.fx's Proxy: trace a model that contains it, or use torch.export"
    return type(value).__name__


def feature_list(op: str, features: Sequence[Tensor]) -> list[Tensor]:
    """``features`` as a list, once it is known to be a non-empty sequence of tensors."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(
            f"{op}: features must be a sequence of tensors, one per level; got {_named(features)}"
        )
    if len(features) == 0:
        raise ValueError(f"{op}: features must have at least one level; got none")
    for i, feature in enumerate(features):
        check_tensor(op, f"features[{i}]", feature)
    return list(features)


def check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor; got {_named(value)}")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {argument} must be a dense tensor; got layout {value.layout}")


def check_count(op: str, argument: str, what: str, count: int, device: torch.device) -> None:
    """Kernels and libraries of GPUs count with 32 bits. (A compiled graph would have a condition of
    it on its sizes.)"""
    if device.type != "cpu" and not torch.compiler.is_compiling() and count >= 2**31:
        raise ValueError(f"{op}: {argument} must have fewer than 2^31 {what} on GPUs; got {count}")


def check_feature_map(op: str, argument: str, x: Tensor, *, channels: int | None = None) -> None:
    """A (N, C, H, W) floating-point tensor, at least 1 pixel high and wide, of some channels."""
    check_tensor(op, argument, x)
    shape = tuple(x.shape)
    if x.dim() != 4:
        raise ValueError(f"{op}: {argument} must have 4 dimensions (N, C, H, W); got shape {shape}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{op}: {argument} must be float64, float32, bfloat16 or float16; got {_name(x.dtype)}"
        )
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"{op}: {argument} must be at least 1 pixel high and wide; got shape {shape}"
        )
    if channels is not None and shape[1] != channels:  # `in` has no symbols
        raise ValueError(f"{op}: {argument} must have {channels} channels; got shape {shape}")
    if x.device.type != "cpu":
        pixels = shape[0] * shape[2] * shape[3]
        check_count(op, argument, "pixels, of all samples,", pixels, x.device)
        check_count(op, argument, "channels", shape[1], x.device)


def check_features(op: str, features: Sequence[Tensor]) -> None:
    """Levels are (N, C_i, H_i, W_i) floating-point feature maps of one N, device and dtype."""
    first = features[0]
    for i, feature in enumerate(features):
        shape = tuple(feature.shape)
        check_feature_map(op, f"features[{i}]", feature)
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


def check_size(
    op: str,
    size: Sequence[int] | None,
    features: Sequence[Tensor] = (),
    *,
    like: Tensor | None = None,
) -> tuple[int, int]:
    """The target size: as given, or the largest height and width among the levels, if any; of
    images like the first of them."""
    if size is None and features:
        size = max(f.shape[2] for f in features), max(f.shape[3] for f in features)
    if not (isinstance(size, Sequence) and len(size) == 2 and all(_is_extent(n) for n in size)):
        raise ValueError(
            f"{op}: size must be two positive ints (height, width) below 2^31; got {size!r}"
        )
    like = features[0] if features else like
    if like is not None and like.device.type != "cpu":
        pixels = like.shape[0] * size[0] * size[1]
        check_count(op, "size", "pixels, of all samples,", pixels, like.device)
    return size[0], size[1]


def _is_extent(value: object) -> bool:
    return is_int(value) and 1 <= value < 2**31  # type: ignore[operator]


def is_int(value: object) -> bool:
    if isinstance(value, Tensor):  # a size under torch.jit.trace
        return value.dim() == 0 and value.dtype == torch.int64
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def check_ints(
    op: str, minimum: int | None = None, below: int | None = None, /, **arguments: int
) -> None:
    """Ints, by their names, of at least ``minimum`` and below a power of two."""
    for argument, value in arguments.items():
        if not is_int(value):
            raise TypeError(f"{op}: {argument} must be an int; got {type(value).__name__}")
        if minimum is not None and not (value >= minimum and (below is None or value < below)):
            most = "" if below is None else f" and below 2^{below.bit_length() - 1}"
            raise ValueError(f"{op}: {argument} must be at least {minimum}{most}; got {value}")


def check_kernel_size(op: str, kernel_size: int) -> int:
    check_ints(op, kernel_size=kernel_size)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{op}: kernel_size must be odd and positive; got {kernel_size}")
    return kernel_size


def check_padding(op: str, padding: int | None, kernel_size: int) -> int:
    """Zeros on each side, on both axes; None keeps the size."""
    if padding is None:
        return kernel_size // 2
    check_ints(op, 0, 2**30, padding=padding)
    return padding


def check_dilation(op: str, dilation: int) -> None:
    check_ints(op, 1, 2**15, dilation=dilation)


def check_depthwise_weight(op: str, argument: str, weight: Tensor, x: Tensor) -> None:
    """(C, 1, k, k) with k odd, in the dtype and on the device of x."""
    check_tensor(op, argument, weight)
    shape, channels = tuple(weight.shape), x.shape[1]
    if not (
        len(shape) == 4
        and shape[:2] == (channels, 1)
        and shape[2] == shape[3]
        and shape[2] % 2 == 1
        and shape[2] < 2**15
    ):
        raise ValueError(
            f"{op}: {argument} must have shape (C, 1, k, k) with k odd and C = {channels}; "
            f"got {shape}"
        )
    check_count(op, argument, "values", channels * shape[2] ** 2, x.device)
    check_same_kind(op, argument, weight, x)


def check_convolved_size(op: str, size: tuple[int, int], kernel_size: int, padding: int) -> None:
    """A convolution must leave at least a pixel of a map."""
    height, width = (extent + 2 * padding - (kernel_size - 1) for extent in size)
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: size and padding must leave at least 1 pixel for a kernel of {kernel_size}; "
            f"got size ({size[0]}, {size[1]}) and padding {padding}"
        )


def check_vector(
    op: str,
    argument: str,
    vector: Tensor,
    length: int,
    meaning: str,
    like: Tensor,
    *,
    wide: bool = False,
) -> None:
    """A 1-D tensor of a length, on the device of ``like`` and in its dtype, or, ``wide``, in the
    accumulation dtype."""
    check_tensor(op, argument, vector)
    if tuple(vector.shape) != (length,):
        raise ValueError(
            f"{op}: {argument} must have {meaning}, shape ({length},); "
            f"got shape {tuple(vector.shape)}"
        )
    check_same_kind(op, argument, vector, like, wide=wide)


def check_matrix(
    op: str,
    argument: str,
    matrix: Tensor,
    shape: tuple[int | None, int],
    meaning: str,
    like: Tensor,
) -> None:
    """A matrix of a shape, None for any extent from 1, in the dtype and on ``like``'s device."""
    check_tensor(op, argument, matrix)
    fits = matrix.dim() == 2 and all(
        wanted is None or extent == wanted
        for extent, wanted in zip(matrix.shape, shape, strict=True)
    )
    if not fits or matrix.shape[0] < 1:
        numbers = ", ".join("at least 1" if extent is None else str(extent) for extent in shape)
        raise ValueError(
            f"{op}: {argument} must have shape {meaning} = ({numbers}); "
            f"got shape {tuple(matrix.shape)}, and an input of {like.shape[1]} channels"
        )
    check_same_kind(op, argument, matrix, like)


def check_eps(op: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"{op}: eps must be a number; got {type(eps).__name__}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"{op}: eps must be above 0 and finite; got {eps}")


def check_keep(op: str, keep: Tensor | None, x: Tensor) -> None:
    """A constant factor for every sample."""
    if keep is None:
        return
    check_tensor(op, "keep", keep)
    if tuple(keep.shape) != (x.shape[0],):
        raise ValueError(
            f"{op}: keep must have one value per sample, shape ({x.shape[0]},); "
            f"got shape {tuple(keep.shape)}"
        )
    if not keep.is_floating_point():
        raise ValueError(f"{op}: keep must be a floating-point tensor; got {_name(keep.dtype)}")
    if keep.requires_grad:
        raise ValueError(
            f"{op}: keep must be constant; got a tensor that requires grad (use .detach())"
        )
    if keep.device != x.device:
        raise ValueError(
            f"{op}: keep must be on the input's device {x.device}; got one on {keep.device}"
        )


def check_same_kind(
    op: str, argument: str, tensor: Tensor, like: Tensor, *, wide: bool = False
) -> None:
    if tensor.dtype != like.dtype:
        allowed = [like.dtype]
        if wide and accumulation_dtype(like.dtype) != like.dtype:
            allowed.append(accumulation_dtype(like.dtype))
        if tensor.dtype not in allowed:
            dtypes = " or ".join(_name(dtype) for dtype in allowed)
            raise ValueError(
                f"{op}: {argument} must have the input's dtype {dtypes}; got {_name(tensor.dtype)}"
            )
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {argument} must be on the input's device {like.device}; "
            f"got one on {tensor.device}"
        )


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
        check_tensor(op, argument, values)
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
    if device.type == "cpu":
        return torch.tensor(list(values), dtype=torch.float64, device="cpu")
    return _filled(values, device)


def _filled(values: Sequence[float], device: torch.device) -> Tensor:
    """The values on a device, written there: a copy from the host, whose memory is not pinned,
    would wait, and cannot be captured in a CUDA graph."""
    numbers_of_python = (float, int, torch.SymFloat, torch.SymInt)
    first, *rest = (v if isinstance(v, numbers_of_python) else float(v) for v in values)
    constants = torch.full((len(values),), first, dtype=torch.float64, device=device)
    for i, value in enumerate(rest, 1):
        constants.select(0, i).fill_(value)
    return constants
