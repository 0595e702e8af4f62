"""How often Triton compiles: counted on meta tensors, for what a launch is specialised to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from triton_offline import recorded, specialisation

from fastfuse.ops.ced_block import kernel as ced_block
from fastfuse.ops.depthwise_conv2d import triton as depthwise
from fastfuse.ops.lr_ced_block import kernel as lr_ced_block
from fastfuse.ops.pointwise import linear
from fastfuse.ops.pointwise import triton as pointwise

KERNELS: dict[str, Callable[..., Any]] = {
    "depthwise_conv2d": depthwise.forward,
    "depthwise_conv2d_backward_weight": depthwise.backward_weight,
    **{name: getattr(room, name) for room in (pointwise, linear) for name in room.__all__},
}


class OnTriton(TorchDispatchMode):
    """Steps of blocks run their Triton launchers, on tensors of any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastfuse":
            return KERNELS[func._opname](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def image(*shape: int) -> Tensor:
    return torch.empty(
        shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last
    )


def parameters(channels: int, steps: int) -> list[Tensor]:
    convolution = [(channels, 1, 7, 7), (channels,), (channels,), (channels,)]
    hidden = 4 * channels
    mlp = [(hidden, channels), (hidden,), (channels, hidden), (channels,), (channels,)]
    return [
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in (*steps * convolution, *mlp)
    ]


def detection_sizes(batches: int) -> Iterator[tuple[int, int]]:
    """As detectors resize: a short side of 480 to 800, a long one up to 1333, padded to 32."""
    rng = random.Random(0)
    for _ in range(batches):
        short = rng.randrange(480, 801, 32)
        long = min(1333, int(short * rng.uniform(1.0, 1.8)))
        sides = [-(-side // 32) * 32 for side in (short, long)]
        yield (sides[0], sides[1]) if rng.random() < 0.7 else (sides[1], sides[0])


def test_blocks_on_detection_sizes() -> None:
    """CEDNet-T's blocks, forward and backward, on 60 batches of images of many sizes."""
    blocks = [(96, 4, 1), (192, 8, 1), (352, 16, 1), (512, 32, 2)]  # channels, stride, steps
    weights = {channels: parameters(channels, steps) for channels, _, steps in blocks}
    found: set[tuple[Any, ...]] = set()

    def step(x: Tensor, steps: int) -> None:
        kernel, options = (ced_block, (1e-6,)) if steps == 1 else (lr_ced_block, (3, 1e-6))
        of_block = weights[x.shape[1]]
        with OnTriton():
            kernel.forward(x, of_block, None, options, False)
            kernel.backward(x, x, of_block, None, options, [], True, True)

    for height, width in detection_sizes(60):
        for channels, stride, steps in blocks:
            x = image(2, channels, height // stride, width // stride)
            found |= set(map(specialisation, recorded(lambda x=x, steps=steps: step(x, steps))))
    assert len(found) <= 40, sorted({launch[0].__name__ for launch in found})
