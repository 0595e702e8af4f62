"""The features detectors read from a backbone, and RetinaNet's dense head."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fastfuse.models.cednet import CEDNet, norm_after
from fastfuse.models.cednet_blocks import norm_of
from fastfuse.models.segmentor import feature_maps
from fastfuse.nn import Conv2d, LayerNorm2d
from fastfuse.nn.composition import leaf
from fastfuse.nn.initialize import kaiming_normal_linear
from fastfuse.ops.checks import check_ints, is_int
from fastfuse.ops.layout import prefer_memory_format
from fastfuse.ops.upsample_add import upsample_add

__all__ = [
    "DetectionFeatures",
    "RetinaHead",
    "RetinaNet",
    "cednet_retinanet_base",
    "cednet_retinanet_small",
    "cednet_retinanet_tiny",
]

_LEVELS = {  # as torchvision's feature pyramids call them
    "p3-p7": ("0", "1", "2", "p6", "p7"),
    "p2-p6": ("0", "1", "2", "3", "pool"),
}


class DetectionFeatures(nn.Module):
    """A backbone's maps for detectors: one width, levels above c5, and no feature pyramid network.

    P3, P4, P5 are 1x1 convolutions of c3, c4, c5, and P6, P7 3x3 convolutions of stride 2, each
    with a norm, layer norm but for ``norm``; P2 = Conv3x3(LN(UP(P3) + LN(Conv1x1(c2)))).

    Keys: ``backbone.*``, ``reduce.i.conv|norm`` for c3, c4, c5, ``extra.i.conv|norm``, and with P2
    ``lateral.conv|norm``, ``merge.norm|conv``.

    Args:
        backbone: images -> (c2, c3, c4, c5), with an attribute ``channels`` of four ints, e.g.
            :class:`CEDNet`.
        out_channels: of every level.
        levels: "p3-p7", for RetinaNet, or "p2-p6", for Mask R-CNN.
        norm: channels -> the norm of the reductions of c3, c4, c5, e.g. ``torch.nn.BatchNorm2d``.
        as_tuple: whether the levels come as a tuple, finest first, as MMDetection's necks and
            heads read them, instead of an OrderedDict, as torchvision's detectors do.

    Attributes:
        out_channels: of every level, as torchvision's detectors ask.

    Shape: images (N, 3, H, W) -> five maps (N, out_channels, H_i, W_i), strides 8 to 128 or 4 to
    64; names are torchvision's: "0", "1", "2", "p6", "p7", and "0", "1", "2", "3", "pool".

    Raises:
        ValueError: unknown levels; out_channels below 1; a backbone without four channels, or whose
            maps are not four of these channels, each half the size of the one before.

    Source: CEDNet, section 4.2.

    >>> import torch, fastfuse
    >>> backbone = fastfuse.models.CEDNet("tiny", depths=(1, 1, 1, 1), stages=1)
    >>> features = fastfuse.models.DetectionFeatures(backbone, 32).eval()
    >>> {k: tuple(p.shape[2:]) for k, p in features(torch.randn(1, 3, 64, 64)).items()}
    {'0': (8, 8), '1': (4, 4), '2': (2, 2), 'p6': (1, 1), 'p7': (1, 1)}
    """

    def __init__(
        self,
        backbone: nn.Module,
        out_channels: int = 256,
        *,
        levels: str = "p3-p7",
        norm: Callable[[int], nn.Module] = LayerNorm2d,
        as_tuple: bool = False,
    ) -> None:
        super().__init__()
        if levels not in _LEVELS:
            raise ValueError(
                f"DetectionFeatures: levels must be one of {', '.join(_LEVELS)}; got {levels!r}"
            )
        check_ints("DetectionFeatures", 1, out_channels=out_channels)
        channels = getattr(backbone, "channels", None)
        if not (
            isinstance(channels, Sequence)
            and len(channels) == 4
            and all(is_int(c) for c in channels)
        ):
            raise ValueError(
                "DetectionFeatures: backbone must have an attribute channels, four ints for c2 to "
                f"c5; got {channels!r}"
            )
        self.backbone = backbone
        self.out_channels = out_channels
        self.levels = levels
        self.as_tuple = as_tuple
        c2, *coarser = channels
        with_p2 = levels == "p2-p6"
        self.reduce = nn.ModuleList(norm_after(Conv2d(c, out_channels, 1), norm) for c in coarser)
        self.extra = nn.ModuleList(
            norm_after(Conv2d(out_channels, out_channels, 3, stride=2, padding=1))
            for _ in range(1 if with_p2 else 2)
        )
        self.lateral = self.merge = None
        if with_p2:
            self.lateral = norm_after(Conv2d(c2, out_channels, 1))
            self.merge = nn.Sequential()
            self.merge.add_module("norm", LayerNorm2d(out_channels))
            self.merge.add_module("conv", Conv2d(out_channels, out_channels, 3, padding=1))
        for added in (self.reduce, self.extra, self.lateral, self.merge):
            if added is not None:
                kaiming_normal_linear(added)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor] | tuple[Tensor, ...]:
        c2, *coarser = self._maps(images)
        maps = [reduce(c) for reduce, c in zip(self.reduce, coarser, strict=True)]
        for extra in self.extra:
            maps.append(extra(maps[-1]))
        if self.lateral is not None and self.merge is not None:
            maps.insert(0, self.merge(upsample_add(maps[0], self.lateral(c2))))
        if self.as_tuple:
            return tuple(maps)
        return OrderedDict(zip(_LEVELS[self.levels], maps, strict=True))

    def _maps(self, images: Tensor) -> list[Tensor]:
        """c2 to c5, of the backbone's channels, each half the size of the one before."""
        maps = feature_maps(self.backbone(images), "DetectionFeatures")
        expected = list(self.backbone.channels)  # type: ignore[arg-type]
        shapes = [tuple(m.shape) for m in maps]
        halved = all(
            (a.shape[2] + 1) // 2 == b.shape[2] and (a.shape[3] + 1) // 2 == b.shape[3]
            for a, b in pairwise(maps)
        )
        if [shape[1] for shape in shapes] != expected or not halved:
            raise ValueError(
                f"DetectionFeatures: backbone must give four maps of {expected} channels, each "
                f"half the size of the one before; got shapes {shapes}"
            )
        return maps


class RetinaHead(nn.Module):
    """RetinaNet's dense head: class logits and box deltas of every anchor of every level.

    The same weights on every level. Keys as MMDetection's: ``cls_convs.i.conv``,
    ``reg_convs.i.conv``, ``retina_cls``, ``retina_reg``.

    Args:
        in_channels: of every level, and of the convolutions.
        num_classes: at least 1.
        num_anchors: of a pixel.
        num_convs: with ReLU, before each of the two last ones.

    Shape: levels (N, in_channels, H_i, W_i) -> for each the logits
    (N, num_anchors * num_classes, H_i, W_i), and the deltas (N, num_anchors * 4, H_i, W_i).

    Raises:
        TypeError: a number that is no int; levels that are no sequence or mapping of tensors.
        ValueError: an argument below 1; a level of other channels.

    Source: *Focal Loss for Dense Object Detection*, section 4.

    >>> import torch, fastfuse
    >>> head = fastfuse.models.RetinaHead(16, num_classes=5, num_convs=1)
    >>> logits, deltas = head([torch.randn(1, 16, 8 >> i, 8 >> i) for i in range(3)])
    >>> [tuple(x.shape[1:]) for x in (logits[0], deltas[2])]
    [(45, 8, 8), (36, 2, 2)]
    """

    def __init__(
        self,
        in_channels: int = 256,
        num_classes: int = 80,
        *,
        num_anchors: int = 9,
        num_convs: int = 4,
    ) -> None:
        super().__init__()
        check_ints(
            "RetinaHead",
            1,
            in_channels=in_channels,
            num_classes=num_classes,
            num_anchors=num_anchors,
            num_convs=num_convs,
        )
        self.in_channels = in_channels

        def tower() -> nn.Sequential:
            return nn.Sequential(
                *(
                    nn.Sequential(
                        OrderedDict(
                            conv=Conv2d(in_channels, in_channels, 3, padding=1),
                            relu=nn.ReLU(inplace=True),
                        )
                    )
                    for _ in range(num_convs)
                )
            )

        self.cls_convs, self.reg_convs = tower(), tower()
        self.retina_cls = Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.retina_reg = Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)
            else:  # every anchor starts as background, with probability 0.99
                nn.init.constant_(parameter, -math.log(99) if name == "retina_cls.bias" else 0.0)

    @leaf
    def forward(
        self, levels: Sequence[Tensor] | Mapping[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        levels = feature_maps(levels, "RetinaHead")
        for i, level in enumerate(levels):
            if level.dim() != 4 or level.shape[1] != self.in_channels:
                raise ValueError(
                    f"RetinaHead: levels[{i}] must be (N, C, H, W) with C = {self.in_channels}; "
                    f"got shape {tuple(level.shape)}"
                )
        levels = [prefer_memory_format(level, True) for level in levels]
        logits = [self.retina_cls(self.cls_convs(level)) for level in levels]
        deltas = [self.retina_reg(self.reg_convs(level)) for level in levels]
        return logits, deltas


class RetinaNet(nn.Module):
    """Images to class logits and box deltas of every anchor; keys ``backbone.*``, ``bbox_head.*``.

    Anchors, losses and the suppression of duplicates are a detector's: torchvision's and
    MMDetection's take :class:`DetectionFeatures` as their backbone.

    Args:
        backbone: images -> levels, e.g. :class:`DetectionFeatures`.
        bbox_head: levels -> logits and deltas, e.g. :class:`RetinaHead`.

    Shape: images (N, 3, H, W) -> see :class:`RetinaHead`.

    >>> import torch, fastfuse
    >>> model = fastfuse.models.cednet_retinanet_tiny(3, depths=(1, 1, 1, 1)).eval()
    >>> logits, deltas = model(torch.randn(1, 3, 64, 64))
    >>> [tuple(x.shape[1:]) for x in logits]
    [(27, 8, 8), (27, 4, 4), (27, 2, 2), (27, 1, 1), (27, 1, 1)]
    """

    def __init__(self, backbone: nn.Module, bbox_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.bbox_head = bbox_head

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.bbox_head(self.backbone(images))


def _retinanet(variant: str, num_classes: int, cednet: dict[str, Any]) -> RetinaNet:
    backbone = CEDNet(variant, **cednet)
    features = DetectionFeatures(backbone, norm=norm_of(backbone.block))
    return RetinaNet(features, RetinaHead(features.out_channels, num_classes))


def cednet_retinanet_tiny(num_classes: int = 80, **cednet: Any) -> RetinaNet:
    """RetinaNet on CEDNet-T, 38,635,380 parameters; ``cednet``: see :class:`CEDNet`.

    With ``block`` "resnet", whose reductions have batch norms, 39,384,692; "swin" 37,135,517;
    "cswin" 33,566,132.
    """
    return _retinanet("tiny", num_classes, cednet)


def cednet_retinanet_small(num_classes: int = 80, **cednet: Any) -> RetinaNet:
    """RetinaNet on CEDNet-S, 60,984,052 parameters; ``cednet``: see :class:`CEDNet`."""
    return _retinanet("small", num_classes, cednet)


def cednet_retinanet_base(num_classes: int = 80, **cednet: Any) -> RetinaNet:
    """RetinaNet on CEDNet-B, 99,121,652 parameters; ``cednet``: see :class:`CEDNet`."""
    return _retinanet("base", num_classes, cednet)
