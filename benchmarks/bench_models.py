"""Whole segmentation models, image to logits, against the same in plain PyTorch.

PSPNet with ResNet-50 at output stride 8 and UPerNet with ResNet-50 at 32, 150 classes, images of
512 x 512. The plain model has plain heads (``plain_heads``), a backbone of ``nn.Conv2d`` only, and
upsamples its logits by ``interpolate``; weights are shared. Modes, rivals and counts are those of
``bench_heads``.

Quick runs measure UPerNet, float32 forward, without what compiles.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import networks
import plain_heads
import torch.nn.functional as F
from cell import DTYPES, FORWARD, OURS, Cell
from measure import Allowance
from networks import PLAIN, TRAINING, rivals, runtimes_of
from torch import Tensor, nn

import fastfuse
from fastfuse import heads
from fastfuse.models import ResNetV1c, Segmentor

__all__ = ["CELLS", "Cell", "build", "cells", "work"]

OP = "models"
IMAGE = (512, 512)
MODELS = {  # output stride, head, its in_channels
    "UPerNet": (32, "UPerHead", [256, 512, 1024, 2048]),
    "PSPNet": (8, "PSPHead", 2048),
}
CELLS = [
    Cell(
        f"{model} ResNet-50 512x512",
        dtype,
        mode,
        (*rivals(PLAIN, compiled=True), *runtimes_of(mode)),
    )
    for model in MODELS
    for dtype in DTYPES
    for mode in (FORWARD, TRAINING)
]


def cells(quick: bool, regime: str, device: str) -> list[Cell]:
    if regime != "fresh":
        return []
    if not quick:
        return CELLS
    return [
        replace(cell, rivals=rivals(PLAIN, compiled=False))
        for cell in CELLS
        if cell.shape.startswith("UPerNet") and (cell.dtype, cell.mode) == ("float32", FORWARD)
    ]


class PlainSegmentor(nn.Module):
    def __init__(self, backbone: nn.Module, decode_head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head

    def forward(self, images: Tensor) -> Tensor:
        logits = self.decode_head(self.backbone(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> networks.NetworkCall:
    """A call of a variant: weights and images are the same for every one."""
    output_stride, head, in_channels = MODELS[shape.split()[0]]
    decode = getattr(heads, head)(in_channels, dropout=0.0)
    backbone = ResNetV1c(50, output_stride=output_stride)
    model: nn.Module = Segmentor(backbone, decode)
    if name != OURS:
        plain = plain_heads.PLAIN[head](in_channels, dropout=0.0)
        plain.load_state_dict(decode.state_dict())
        model = PlainSegmentor(backbone, plain)
        for module in backbone.modules():
            if type(module) is fastfuse.nn.Conv2d:
                module.__class__ = nn.Conv2d
    batch = 1 if mode == FORWARD else 2
    shapes = [(batch, 3, *IMAGE)]
    return networks.network_call(model, name, shapes, layout, dtype, mode, device, sequence=False)


work = partial(networks.work, build)


def test_models(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    networks.measure_cell(OP, cell, build, benchmark=benchmark, device=device, allowance=allowance)
