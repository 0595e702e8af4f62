"""The heads, whole, against the same in plain PyTorch (``plain_heads``).

Settings are the papers': 512 channels (SegFormer-B2: 768), 150 classes, features of ConvNeXt-T for
UPerHead, of SegFormer-B2 for its own, and of a ResNet with output stride 8 for the others, of
images of 512 x 512 and 512 x 1024. Variants share weights. Forward is one image in evaluation mode;
a training step is forward and backward of two images in training mode, with the gradients of
features and parameters (batch norm needs two values for each channel, and a pooled branch has one
per image). Dropout is off, so that results compare.

Rivals are plain heads in both memory formats, weights included, compiled ones in their faster
format, and forward the plain head by OpenVINO and ONNX Runtime (``runtimes``). FLOPs are those that
a variant does itself, by the counter of PyTorch and the ops' formulas.

Quick runs measure UPerHead and PSPHead at 512 x 512, float32 forward, without what compiles.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import networks
import plain_heads
from cell import DTYPES, FORWARD, OURS, Cell
from measure import Allowance
from networks import PLAIN, TRAINING, rivals, runtimes_of

from fastfuse import heads

__all__ = ["CELLS", "Cell", "build", "cells", "work"]

OP = "heads"
SIZES = {"512x512": (512, 512), "512x1024": (512, 1024)}
# in_channels, and (channels, stride) of each feature
CONVNEXT = ([96, 192, 384, 768], [(96, 4), (192, 8), (384, 16), (768, 32)])
SEGFORMER = ([64, 128, 320, 512], [(64, 4), (128, 8), (320, 16), (512, 32)])
RESNET = (2048, [(256, 4), (2048, 8)])
HEADS = {
    "UPerHead": CONVNEXT,
    "PSPHead": RESNET,
    "ASPPHead": RESNET,
    "SepASPPHead": RESNET,
    "FCNHead": RESNET,
    "SegformerHead": SEGFORMER,
}
OPTIONS = {"SegformerHead": {"channels": 768}}
QUICK = ("UPerHead 512x512", "PSPHead 512x512")
CELLS = [
    Cell(f"{head} {size}", dtype, mode, (*rivals(PLAIN, compiled=True), *runtimes_of(mode)))
    for head in HEADS
    for size in SIZES
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
        if cell.shape in QUICK and (cell.dtype, cell.mode) == ("float32", FORWARD)
    ]


def build(
    name: str, layout: str, shape: str, dtype: str, mode: str, device: str = "cpu"
) -> networks.NetworkCall:
    """A call of a variant: weights and features are the same for every one."""
    head, size = shape.split()
    in_channels, features = HEADS[head]
    height, width = SIZES[size]
    batch = 1 if mode == FORWARD else 2
    shapes = [(batch, c, height // stride, width // stride) for c, stride in features]
    options = {"dropout": 0.0, **OPTIONS.get(head, {})}
    ours = getattr(heads, head)(in_channels, **options)
    model = ours
    if name != OURS:
        model = plain_heads.PLAIN[head](in_channels, **options)
        model.load_state_dict(ours.state_dict())
    return networks.network_call(model, name, shapes, layout, dtype, mode, device, sequence=True)


work = partial(networks.work, build)


def test_heads(benchmark: Any, cell: Cell, device: str, allowance: Allowance) -> None:
    networks.measure_cell(OP, cell, build, benchmark=benchmark, device=device, allowance=allowance)
