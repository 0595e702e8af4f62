"""What the strategies of a fusion have in common.

A strategy convolves some of the levels, and has two methods: ``forward``, their part of the result,
and ``backward``, the part of the gradients that is theirs. All features are channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastfuse.ops.fusion_conv2d.shape import Equalization, FusionShape, Gradients

__all__ = ["Scaled", "Strategy"]


@dataclass(frozen=True)
class Scaled:
    """A convolution that is still to be multiplied by 1 / std of a ``level``, unless None; the bias
    comes after that."""

    value: Tensor
    level: int | None


class Strategy:
    """A way to convolve some levels of a fusion.

    Args:
        shape: the fusion's.
        equalization: the fusion's.
        levels: the strategy's.
    """

    def __init__(
        self, shape: FusionShape, equalization: Equalization, levels: Sequence[int]
    ) -> None:
        self.shape = shape
        self.equalization = equalization
        self.levels = tuple(levels)

    def backward(
        self,
        grad_output: Tensor,
        features: Sequence[Tensor],
        weight: Tensor | None,
        gradients: Gradients,
    ) -> None:
        """Finds those of ``gradients`` that are wanted; features are there for the weight's, the
        weight for the features'."""
        raise NotImplementedError

    def described(self, products: str, sums: str) -> str:
        """Where and how, by the names of the dtypes of products and of sums."""
        raise NotImplementedError
