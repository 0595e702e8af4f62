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
    # The public op on such inputs, in their dtype; of several or of integer outputs something that
    # tells as much, such as the value of the class that was chosen.
    call: Callable[..., Tensor]
    exact: Callable[..., Tensor]  # its definition on float64 inputs
    channels_last: bool  # the memory format the output must have
    # How many values a gradient sums, for all or for each: its tolerance grows by the root.
    reduction: float | tuple[float, ...] = 1.0
    # As much for the output, and how often the fused op rounds on the way to either.
    output_reduction: float = 1.0
    roundings: int = 1
    differentiable: bool = True

    def reduction_of(self, index: int) -> float:
        return self.reduction[index] if isinstance(self.reduction, tuple) else self.reduction
