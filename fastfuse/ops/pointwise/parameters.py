"""What an MLP's parameters are to its steps, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

__all__ = ["Mlp", "MlpGradients", "Norm", "convolution_bias", "to_accumulation"]


@overload
def to_accumulation(vector: Tensor) -> Tensor: ...


@overload
def to_accumulation(vector: None) -> None: ...


def to_accumulation(vector: Tensor | None) -> Tensor | None:
    """A vector as the pointwise steps take it: contiguous, in the accumulation dtype."""
    if vector is None:
        return None
    if vector.dtype not in (torch.float32, torch.float64):
        vector = vector.float()
    return vector.contiguous()


def convolution_bias(bias: Tensor, x: Tensor) -> Tensor:
    """The bias as the depthwise convolution of x takes it: the CPU kernels in x's dtype."""
    return bias.to(x.dtype) if x.device.type == "cpu" else bias


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, eps: float) -> Norm:
        return cls(to_accumulation(weight), to_accumulation(bias), eps)


class Mlp(NamedTuple):
    """Matrices in the dtype of images, vectors in the accumulation dtype.

    Attributes:
        pixels: rows of an image.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Tensor | None
    keep: Tensor | None
    norm: Norm | None
    pixels: int

    @classmethod
    def of(
        cls, x: Tensor, parameters: Sequence[Any], keep: Tensor | None, norm: Norm | None = None
    ) -> Mlp:
        """Of a block's last five parameters: both layers' and the scale."""
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale = parameters
        return cls(
            fc1_weight,
            to_accumulation(fc1_bias),
            fc2_weight,
            to_accumulation(fc2_bias),
            to_accumulation(scale),
            to_accumulation(keep),
            norm,
            x.shape[2] * x.shape[3],
        )


class MlpGradients(NamedTuple):
    """Of vectors in the accumulation dtype; of matrices too where they sum several chunks. In the
    order of a block's parameters."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Tensor | None

    @classmethod
    def of_sums(
        cls,
        mlp: Mlp,
        norm: Sequence[Tensor | None],
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        unscaled_fc2: Tensor,
        room: Tensor | None = None,
    ) -> MlpGradients:
        """Of the sums over pixels, which know nothing of the scale; with memory for a product."""
        scale = None
        if mlp.scale is not None:
            fc2_weight = fc2_weight.to(mlp.scale.dtype)
            scale = torch.mul(fc2_weight, unscaled_fc2, out=room).sum(1) + mlp.fc2_bias * fc2_bias
            fc2_weight *= mlp.scale[:, None]
            fc2_bias = mlp.scale * fc2_bias
        norm_weight, norm_bias = norm if mlp.norm else (None, None)
        return cls(norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale)
