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
) -> Tensor:
    """A tensor in the dtype and on the device of ``like``, in huge pages where there are any."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    if tensor.device.type == "cpu" and _extension.module is not None:
        _extension.module.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
