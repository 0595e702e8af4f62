"""The models that can be trained here: a table of backbones, a table of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastfuse import heads
from fastfuse.models import CEDNet, ResNetV1c, Segmentor
from fastfuse.models.cednet_upernet import CEDNetSegmentor

__all__ = ["BACKBONES", "HEADS", "MULTI_LEVEL", "build"]


@dataclass(frozen=True)
class Backbone:
    """How a backbone is made, trained, and read by the auxiliary head.

    Attributes:
        make: called with ``output_stride=`` if ``dilated``.
        lr: the largest learning rate of AdamW, from random weights.
        dilated: whether it is a ResNet, whose last stages can be.
    """

    make: Callable[..., nn.Module]
    lr: float
    dilated: bool = False


def _resnet(depth: int) -> Backbone:
    return Backbone(lambda **options: ResNetV1c(depth, **options), 5e-4, dilated=True)


def _cednet(variant: str, lr: float = 5e-4, **options: Any) -> Backbone:
    return Backbone(lambda: CEDNet(variant, layer_scale=1.0, **options), lr)


BACKBONES = {
    "resnet": _resnet(50),
    "resnet101": _resnet(101),
    "cednet-tiny": _cednet("tiny"),
    "cednet-small": _cednet("small"),
    "cednet-base": _cednet("base"),
    # A million parameters with a narrow head: trains in minutes.
    "cednet-nano": _cednet("tiny", 2e-3, channels=(24, 48, 72, 96), depths=(1, 2, 2, 1), stages=2),
}

Channels = Sequence[int]  # of the levels, finest first
HEADS: dict[str, Callable[..., nn.Module]] = {
    "uper": lambda c, *args, **options: heads.UPerHead(c, *args, **options),
    "psp": lambda c, *args, **options: heads.PSPHead(c[-1], *args, **options),
    "aspp": lambda c, *args, **options: heads.ASPPHead(c[-1], *args, **options),
    "sepaspp": lambda c, *args, **options: heads.SepASPPHead(
        c[-1], *args, c1_in_channels=c[0], **options
    ),
    "fcn": lambda c, *args, **options: heads.FCNHead(c[-1], *args, **options),
}
if (_segformer := getattr(heads, "SegformerHead", None)) is not None:
    HEADS["segformer"] = _segformer
MULTI_LEVEL = ("uper", "segformer")  # read all levels; the others the last, and want it finer


def build(
    head: str,
    backbone: str,
    classes: int,
    channels: int,
    *,
    output_stride: int = 0,
    scale_equalizer: bool = False,
    ignore_index: int,
) -> Segmentor:
    """A model with an auxiliary head, at random weights that do not depend on scale_equalizer.

    >>> model = build("psp", "cednet-nano", 11, 16, ignore_index=11)
    >>> type(model.decode_head).__name__
    'PSPHead'
    """
    spec = BACKBONES[backbone]
    body = spec.make(output_stride=output_stride) if spec.dilated else spec.make()
    levels: Channels = body.channels  # type: ignore[assignment]
    decoder = HEADS[head](levels, channels, classes, scale_equalizer=scale_equalizer)
    # A CEDNet's last stage but one gives what is at 1/8.
    read = levels[-2] if spec.dilated else levels[1]
    auxiliary = heads.FCNHead(read, max(channels // 2, 1), classes, num_convs=1, concat_input=False)
    make = Segmentor if spec.dilated else CEDNetSegmentor
    return make(body, decoder, auxiliary, ignore_index=ignore_index)
