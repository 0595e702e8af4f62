"""The picture of docs/scale_equalization.md, by the command line, on CamVid.

    cd docs/figures && python -m fastfuse report scale_equalization:upernet \
        --data CAMVID/train --batch-size 8 --max-batches 2 --size 180 240 \
        --output ../scale_equalization_report.png
"""

from __future__ import annotations

from torch import nn

from fastfuse.heads import UPerHead
from fastfuse.models import ResNetV1c, Segmentor


def upernet() -> nn.Module:
    """UPerNet with ResNet-50 at initialization, 11 classes, 128 channels."""
    head = UPerHead([256, 512, 1024, 2048], 128, 11, scale_equalizer=True)
    return Segmentor(ResNetV1c(50, output_stride=32), head)
