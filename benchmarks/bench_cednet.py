"""CEDNet-T, whole, against the same in plain PyTorch (``plain_cednet``).

Forward is one image of 800 x 1280 in evaluation mode: the backbone, and RetinaNet with 80 classes,
which is what the paper times. A training step is forward and backward of 512 x 512 in training
mode, of the backbone (one image, the mean square of its maps as a loss) and of UPerNet with its
auxiliary head and cross-entropies (two images, 150 classes); its peak memory is that of a fresh
process. Stochastic depth and dropout are off, so that results compare. ``-resnet``, ``-swin`` and
``-cswin``: with these blocks.

Rivals, with shared weights, in both memory formats, weights included:

- eager, linear: blocks as the authors write them, channels moved to the end for ``F.linear``;
- eager, 1x1 conv: the same products as 1x1 convolutions, which other libraries may compute;
- compiled: the latter by ``torch.compile``.

The comparison with ConvNeXt-T + FPN is in ``paper_tables.py``.

Quick runs measure forward alone, without compiled rivals.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import networks
import plain_cednet
import torch
from cell import DTYPES, FORWARD, OURS, Cell
from measure import Allowance
from networks import TRAINING, rivals
from peak_memory import of_variants
from torch import Tensor, nn

from fastfuse import models

__all__ = ["CELLS", "Cell", "build", "cells", "work"]

OP = "cednet"
FIRST_TURN = 4  # after the main shape of every op, both dtypes, with and without backward
RIVALS = ("eager, linear", "eager, 1x1 conv")
SIZES = {"800x1280": (800, 1280), "512x512": (512, 512), "64x64": (64, 64)}
CELLS = [
    Cell(f"{model} {size}", dtype, mode, rivals(*RIVALS, compiled=True))
    for model, size, mode in (
        ("backbone", "800x1280", FORWARD),
        ("RetinaNet", "800x1280", FORWARD),
        ("backbone", "512x512", TRAINING),
        ("UPerNet", "512x512", TRAINING),
    )
    for dtype in DTYPES
]
CELLS += [  # with the blocks of the paper's table 5
    Cell(f"{model}-{block} {size}", "float32", mode, rivals(*RIVALS, compiled=True))
    for model, size, mode in (
        ("backbone", "800x1280", FORWARD),
        ("RetinaNet", "800x1280", FORWARD),
        ("backbone", "512x512", TRAINING),
    )
    for block in ("resnet", "swin", "cswin")
]


class Maps(nn.Module):
    """A model's outputs one after the other; in training the mean of their squares."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        outputs = self.model(images)
        if isinstance(outputs[0], list):
            outputs = (*outputs[0], *outputs[1])
        if not self.training:
            return tuple(outputs)
        return torch.stack([x.float().square().mean() for x in outputs]).sum().reshape(1)


class Loss(nn.Module):
    """A segmentor's loss at fixed targets."""

    def __init__(self, model: nn.Module, size: tuple[int, int], batch: int) -> None:
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(150, (batch, *size), generator=generator)
        self.register_buffer("targets", targets)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.loss(images, self.targets).reshape(1)


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if regime != "fresh":
        return []
    if not quick:
        return CELLS
    return [replace(c, rivals=rivals(*RIVALS, compiled=False)) for c in CELLS if c.mode == FORWARD]


def _model(name: str, kind: str) -> nn.Module:
    """Ours, or a rival with its weights; a kind is a model, or a model and its block."""
    torch.manual_seed(0)
    kind, _, block = kind.partition("-")
    block = block or "next"
    make = {
        "backbone": models.CEDNet,
        "RetinaNet": models.cednet_retinanet_tiny,
        "UPerNet": models.cednet_upernet_tiny,
    }
    ours = make[kind](block=block, layer_scale=1.0)
    for module in ours.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    if name == OURS:
        return ours
    mlp = "linear" if name.endswith("linear") else "conv"
    plain: nn.Module = plain_cednet.CEDNet("tiny", mlp=mlp, block=block)
    if kind == "RetinaNet":
        norm = nn.BatchNorm2d if block == "resnet" else plain_cednet.Norm
        plain = plain_cednet.RetinaNet(plain_cednet.Features(plain, norm=norm))
    elif kind == "UPerNet":
        plain = plain_cednet.UPerNet(plain, dropout=0.0)
    plain.load_state_dict(ours.state_dict())
    return plain


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> networks.NetworkCall:
    """A call of a variant: weights and images are the same for every one."""
    kind, size = shape.split()
    batch = 2 if kind == "UPerNet" else 1
    height, width = SIZES[size]
    model = _model(name, kind)
    wrapped = Loss(model, (height, width), batch) if kind == "UPerNet" else Maps(model)
    shapes = [(batch, 3, height, width)]
    return networks.network_call(wrapped, name, shapes, layout, dtype, mode, device, sequence=False)


work = partial(networks.work, build)


def test_cednet(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    tiny = {"shape": f"{cell.shape.split()[0]} 64x64"}
    memory = of_variants(build, cell, tiny, device) if cell.mode == TRAINING else None
    networks.measure_cell(
        OP,
        cell,
        build,
        benchmark=benchmark,
        device=device,
        allowance=allowance,
        memory=memory,
    )
