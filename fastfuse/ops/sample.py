"""One input to check an op with: shared by ``verify``, the tests and gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    name: str
    inputs: tuple[Tensor, ...]  # the differentiable arguments
    call: Callable[..., Tensor]  # the public op on such inputs
    exact: Callable[..., Tensor]  # its definition on float64 inputs
    channels_last: bool  # the memory format the output must have
    reduction: float = 1.0  # how many values a gradient sums: its tolerance grows by the root
