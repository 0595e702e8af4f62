"""The ways to compute a cell, and their inputs and results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.layout import memory_format

__all__ = [
    "BY_TRITON",
    "CHANNELS_LAST",
    "CONTIGUOUS",
    "EXACT",
    "TIMED",
    "Variant",
    "random_tensors",
    "tensors",
]

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
BY_TRITON = ", Triton"  # at the end of the names of our own variants without CUDA C++
TIMED = ", cudnn.benchmark"  # at the end of the names of variants whose algorithms cuDNN timed
EXACT = "exact"  # the variant that computes in float64


@dataclass(frozen=True)
class Variant:
    """One way to compute a cell. ``call`` takes nothing and returns a tensor or several.

    Args:
        layout: of inputs and results; for the tables.
        rival: False for fastfuse itself.
        differs: why its values are not ours by definition; only shapes and dtypes are then checked.
        optional: needs what a machine may lack (a compiler); left out with the reason if it raises.
        timed: False for one that only checks the others.
    """

    name: str
    call: Callable[[], Any] = field(repr=False)
    layout: str = ""
    rival: bool = True
    differs: str = ""
    optional: bool = False
    timed: bool = True

    @property
    def title(self) -> str:
        return f"{self.name}, {self.layout}" if self.layout else self.name


def random_tensors(name: str, layout: str, dtype: str, device: str) -> Callable[..., Tensor]:
    """A source of a variant's inputs, ``(*size, scale=1)``: the same values for every variant.

    For the variant EXACT these values, rounded to the dtype, are float64.
    """
    generator = torch.Generator().manual_seed(0)
    format_ = memory_format(layout == CHANNELS_LAST)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(size, generator=generator).mul_(scale)
        x = x.to(device, getattr(torch, dtype))
        x = x.double() if name == EXACT else x
        return x.contiguous(memory_format=format_) if len(size) == 4 else x

    return random


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
