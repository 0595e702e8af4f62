"""ced_block and lr_ced_block as the tests of both see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from inputs import images
from torch import Tensor

import fastfuse
from fastfuse.ops.ced_block import BLOCK as CED_BLOCK
from fastfuse.ops.ced_block import reference as ced_reference
from fastfuse.ops.ced_block.samples import block_parameters, block_shapes
from fastfuse.ops.ced_block.samples import samples as ced_samples
from fastfuse.ops.define import Sample
from fastfuse.ops.lr_ced_block import BLOCK as LR_CED_BLOCK
from fastfuse.ops.lr_ced_block import reference as lr_reference
from fastfuse.ops.lr_ced_block.samples import samples as lr_samples

__all__ = ["BLOCKS", "Block", "both_blocks", "with_gradients"]


@dataclass(frozen=True)
class Block:
    """A block with its reference, and inputs for both."""

    name: str
    steps: int  # convolutions, each with a norm
    call: Callable[..., Tensor] = field(repr=False)
    reference: Callable[..., Tensor] = field(repr=False)
    samples: Callable[..., Iterator[Sample]] = field(repr=False)
    parameters: tuple[str, ...] = field(repr=False)

    def inputs(
        self,
        shape: tuple[int, ...] = (2, 8, 5, 6),
        hidden: int = 32,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        scaled: bool = True,
    ) -> list[Tensor]:
        """x and the parameters in their order, all of them without ``scaled`` but the scale."""
        generator = torch.Generator().manual_seed(7)
        shapes = block_shapes(shape[1], hidden, scaled, self.steps)
        x = images(shape, dtype=dtype, channels_last=channels_last)[0]
        return [x, *block_parameters(shapes, generator, "cpu", dtype)]

    def option(self, *, dilation: int = 3, eps: float = 1e-6) -> tuple[Any, ...]:
        """What ops take behind ``keep``."""
        return (eps,) if self.steps == 1 else (dilation, eps)


def names(block: Any) -> tuple[str, ...]:
    """Of its parameters, with a "?" behind those that may be None."""
    return tuple(p.name + "?" * p.optional for p in block.parameters)


BLOCKS = {
    "ced_block": Block(
        "ced_block", 1, fastfuse.ced_block, ced_reference, ced_samples, names(CED_BLOCK)
    ),
    "lr_ced_block": Block(
        "lr_ced_block", 2, fastfuse.lr_ced_block, lr_reference, lr_samples, names(LR_CED_BLOCK)
    ),
}
both_blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def with_gradients(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor, **options: Any
) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = call(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]
