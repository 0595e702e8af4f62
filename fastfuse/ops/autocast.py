"""Autocast, by hand: an op casts its features and weights, never statistics such as mean and std,
and blocks and fusion_conv2d no vectors either (biases, norms, layer scale), which are float32.

(``torch.library.register_autocast`` would cast every floating-point argument.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastfuse.backends import accumulation_dtype

__all__ = [
    "autocasts",
    "cast_dtype",
    "cast_for_autocast",
    "vector_for_autocast",
    "without_autocast",
]


_CAST = (torch.float32, torch.bfloat16, torch.float16)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a device."""
    return _autocast_dtype(device_type) is not None


def cast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which an op takes a tensor."""
    dtype = _autocast_dtype(tensor.device.type)
    return tensor.dtype if dtype is None or tensor.dtype not in _CAST else dtype


def cast_for_autocast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in autocast's dtype if autocast is on for their device; float64 stays."""
    dtype = _autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return list(tensors)
    return [t.to(dtype) if t.dtype in _CAST else t for t in tensors]


def vector_for_autocast(vector: Tensor, like: Tensor) -> Tensor:
    """A vector beside an image that was cast: as it is, in that dtype or the accumulation dtype."""
    if not autocasts(like.device.type) or not vector.is_floating_point():
        return vector
    wide = accumulation_dtype(like.dtype)
    return vector if vector.dtype in (like.dtype, wide) else vector.to(wide)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which what was cast stays as it is."""
    if not autocasts(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
