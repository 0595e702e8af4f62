"""Fresh memory for large results of the ops that are written in Python."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse import _extension

__all__ = ["empty"]


def empty(
    shape: Sequence[int],
    like: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A tensor on the device of ``like``, in its dtype or another one, in huge pages where there
    are any."""
    dtype, device = dtype or like.dtype, like.device
    tensor = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    if _extension.module is not None and device.type == "cpu":
        _extension.module.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
