"""CEDNet, ConvNeXt with FPN, RetinaNet and UPerNet in plain PyTorch: rivals and oracle.

Written as the papers' authors and MMDetection compose them: every convolution, norm and activation
a pass of its own, ``F.interpolate`` and ``+``. CEDNet's keys are those of ``fastfuse.models``, so
that a state dict of one loads into the other. Of each block's MLP there are two ways: ``linear``,
the authors', and ``conv``, 1x1 convolutions, which other libraries may compute and which keep
channels_last; weights load into both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import plain_heads
import torch
import torch.nn.functional as F
from plain_blocks import SHIFT, CSwinBlock, Norm, ResNetBlock, SwinBlock, depthwise
from torch import Tensor, nn

__all__ = ["CEDNet", "ConvNeXt", "ConvNeXtFPN", "Features", "RetinaHead", "RetinaNet", "UPerNet"]

CHANNELS = {  # c2 to c5, of CED blocks by variant, of the others' tiny ones
    "tiny": (96, 192, 352, 512),
    "small": (96, 192, 352, 512),
    "base": (128, 256, 448, 704),
    "resnet": (64, 128, 256, 384),
    "swin": (96, 160, 288, 416),
    "cswin": (64, 128, 256, 320),
}
DEPTHS = {
    "tiny": (3, (2, 4, 2), 3),
    "small": (3, (2, 7, 2), 4),
    "base": (3, (2, 7, 2), 4),
    "resnet": (3, (1, 4, 2), 3),
    "swin": (3, (2, 4, 2), 3),
    "cswin": (3, (2, 8, 1), 3),
}
STRIPES = (1, 2, 7, None)  # of c2 to c5
CONVNEXT = {  # channels and depths of the four stages
    "tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
}


def normed(conv: nn.Conv2d, norm: type[nn.Module] = Norm) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, norm=norm(conv.out_channels)))


class Block(nn.Module):
    """A CED block, or with ``long_range`` an LR CED block, without stochastic depth."""

    def __init__(self, channels: int, mlp: str, long_range: bool, layer_scale: float) -> None:
        super().__init__()
        self.mlp = mlp
        self.dw, self.norm = depthwise(channels), Norm(channels)
        self.dw2 = self.norm2 = None
        if long_range:
            self.dw2, self.norm2 = depthwise(channels, 3), Norm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x))
        if self.dw2 is not None:
            y = x + F.gelu(y)
            y = y + F.gelu(self.norm2(self.dw2(y)))
        if self.mlp == "linear":
            y = self.fc2(F.gelu(self.fc1(y.permute(0, 2, 3, 1))))
            return x + (self.layer_scale * y).permute(0, 3, 1, 2)
        y = F.gelu(F.conv2d(y, self.fc1.weight[:, :, None, None], self.fc1.bias))
        y = F.conv2d(y, self.fc2.weight[:, :, None, None], self.fc2.bias)
        return x + self.layer_scale[:, None, None] * y


class Decoder(nn.Module):
    def __init__(self, channels, depths, style, make, norm) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        _, c3, c4, c5 = channels
        self.lateral = None
        if style == "hourglass":
            self.lateral = nn.ModuleList((make(2), make(1)))
        self.reduce = nn.ModuleList((nn.Conv2d(c5, c4, 1), nn.Conv2d(c4, c3, 1)))
        self.norm = nn.ModuleList((norm(c4), norm(c3)))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(make(level, i) for i in range(count)))
            for level, count in zip((2, 1), depths, strict=True)
        )

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor]:
        if self.lateral is not None:
            c4, c3 = self.lateral[0](c4), self.lateral[1](c3)
        up = F.interpolate(self.reduce[0](c5), scale_factor=2.0, mode="bilinear")
        c4 = self.blocks[0](self.norm[0](c4 + up))
        up = F.interpolate(self.reduce[1](c4), scale_factor=2.0, mode="bilinear")
        return self.blocks[1](self.norm[1](c3 + up)), c4


class Stage(nn.Module):
    def __init__(self, channels, depths, style, make, norm, decodes) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        _, c3, c4, c5 = channels
        n3, n4, n5 = depths
        rest = (0, 0)
        if style != "fpn":
            n3, n4, rest = n3 // 2, n4 // 2, (n4 - n4 // 2, n3 - n3 // 2)
        self.encoder = nn.ModuleList(
            nn.Sequential(*(make(level, i) for i in range(count)))
            for level, count in enumerate((n3, n4, n5), 1)
        )
        self.downsample = nn.ModuleList(
            normed(nn.Conv2d(a, b, 2, stride=2), norm) for a, b in ((c3, c4), (c4, c5))
        )
        self.decoder = Decoder(channels, rest, style, make, norm) if decodes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c3 = self.encoder[0](x)
        c4 = self.encoder[1](self.downsample[0](c3))
        c5 = self.encoder[2](self.downsample[1](c4))
        if self.decoder is not None:
            c3, c4 = self.decoder(c3, c4, c5)
        return c3, c4, c5


class CEDNet(nn.Module):
    """Without stochastic depth, so that results compare; ``mlp``: "linear" or "conv"."""

    def __init__(
        self, variant: str = "tiny", style: str = "fpn", *, mlp: str = "linear",
        last_decoder: bool | None = None, lr_blocks: bool = True, layer_scale: float = 1e-6,
        block: str = "next",
    ) -> None:  # fmt: skip
        super().__init__()
        variant = variant if block == "next" else block
        channels = CHANNELS[variant]
        if (variant, style) == ("tiny", "hourglass"):
            channels = (96, 160, 320, 512)
        self.channels = channels
        stem_depth, depths, stages = DEPTHS[variant]
        norm, activation = (
            (nn.BatchNorm2d, nn.ReLU) if block == "resnet" else (Norm, nn.GELU)
        )  # fmt: skip

        def make(level: int, index: int = 0) -> nn.Module:
            width, long_range = channels[level], level == 3 and lr_blocks
            if block == "resnet":
                return ResNetBlock(width, long_range=long_range)
            if block == "swin":
                return SwinBlock(width, mlp, shift=SHIFT * (index % 2), long_range=long_range)
            if block == "cswin":
                return CSwinBlock(width, mlp, stripe=STRIPES[level])
            return Block(width, mlp, long_range, layer_scale)

        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            norm(32),
            activation(),
            nn.Conv2d(32, channels[0], 3, stride=2, padding=1),
            norm(channels[0]),
            activation(),
        )
        self.blocks = nn.Sequential(*(make(0, i) for i in range(stem_depth)))
        self.downsample = normed(nn.Conv2d(channels[0], channels[1], 2, stride=2), norm)
        if last_decoder is None:
            last_decoder = style != "fpn"
        self.stages = nn.ModuleList(
            Stage(channels, depths, style, make, norm, i < stages - 1 or last_decoder)
            for i in range(stages)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.forward_stages(images)[-1]

    def forward_stages(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """c2, c3, c4 and c5 after every stage."""
        c2 = self.blocks(self.stem(images))
        x, outputs = self.downsample(c2), []
        for stage in self.stages:
            maps = stage(x)
            outputs.append((c2, *maps))
            x = maps[0]
        return outputs


class ConvNeXt(nn.Module):
    """c2 to c5 of ConvNeXt, without stochastic depth or norms after the stages."""

    def __init__(self, variant: str = "tiny", *, mlp: str = "linear") -> None:
        super().__init__()
        self.channels, depths = CONVNEXT[variant]
        entries = [nn.Sequential(nn.Conv2d(3, self.channels[0], 4, stride=4))]
        entries[0].append(Norm(self.channels[0]))
        for a, b in zip(self.channels, self.channels[1:], strict=False):
            entries.append(nn.Sequential(Norm(a), nn.Conv2d(a, b, 2, stride=2)))
        self.downsample_layers = nn.ModuleList(entries)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(c, mlp, False, 1.0) for _ in range(n)))
            for c, n in zip(self.channels, depths, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps


class ConvNeXtFPN(nn.Module):
    """P3 to P7 of ConvNeXt, by MMDetection's FPN as its RetinaNets have it.

    MMDetection's ConvNeXt has a norm after each of the stages it gives; P6 is made from c5.
    """

    out_channels = 256

    def __init__(self, variant: str = "tiny", *, mlp: str = "linear") -> None:
        super().__init__()
        self.backbone = ConvNeXt(variant, mlp=mlp)
        levels, width = self.backbone.channels[1:], self.out_channels
        self.norms = nn.ModuleList(Norm(c) for c in levels)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in levels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in levels)
        self.extra = nn.ModuleList(
            nn.Conv2d(c, width, 3, stride=2, padding=1) for c in (levels[-1], width)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)[1:]
        maps = [norm(c) for norm, c in zip(self.norms, maps, strict=True)]
        laterals = [conv(c) for conv, c in zip(self.lateral_convs, maps, strict=True)]
        for i in (1, 0):
            size = laterals[i].shape[2:]
            laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=size, mode="nearest")
        levels = [conv(c) for conv, c in zip(self.fpn_convs, laterals, strict=True)]
        levels.append(self.extra[0](maps[-1]))
        levels.append(self.extra[1](levels[-1]))
        return levels


class Features(nn.Module):
    """P3 to P7 of CEDNet; keys as ``fastfuse.models.DetectionFeatures``."""

    def __init__(self, backbone: nn.Module, width: int = 256, norm: type[nn.Module] = Norm) -> None:
        super().__init__()
        self.backbone = backbone
        self.reduce = nn.ModuleList(
            normed(nn.Conv2d(c, width, 1), norm) for c in backbone.channels[1:]
        )
        self.extra = nn.ModuleList(
            normed(nn.Conv2d(width, width, 3, stride=2, padding=1)) for _ in range(2)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)[1:]
        levels = [reduce(c) for reduce, c in zip(self.reduce, maps, strict=True)]
        for extra in self.extra:
            levels.append(extra(levels[-1]))
        return levels


class RetinaHead(nn.Module):
    """Keys as ``fastfuse.models.RetinaHead``."""

    def __init__(self, width: int = 256, num_classes: int = 80, anchors: int = 9) -> None:
        super().__init__()

        def tower() -> nn.Sequential:
            layers = []
            for _ in range(4):
                conv = nn.Conv2d(width, width, 3, padding=1)
                layers.append(nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(inplace=True))))
            return nn.Sequential(*layers)

        self.cls_convs, self.reg_convs = tower(), tower()
        self.retina_cls = nn.Conv2d(width, anchors * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(width, anchors * 4, 3, padding=1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits = [self.retina_cls(self.cls_convs(level)) for level in levels]
        return logits, [self.retina_reg(self.reg_convs(level)) for level in levels]


class RetinaNet(nn.Module):
    """Keys as ``fastfuse.models.RetinaNet``."""

    def __init__(self, backbone: nn.Module, num_classes: int = 80) -> None:
        super().__init__()
        self.backbone = backbone
        self.bbox_head = RetinaHead(num_classes=num_classes)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.bbox_head(self.backbone(images))


class UPerNet(nn.Module):
    """With an auxiliary head; keys as ``fastfuse.models.cednet_upernet_*``. ``dropout`` is 0 where
    it is compared."""

    def __init__(self, backbone: CEDNet, num_classes: int = 150, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = plain_heads.UPer(backbone.channels, 512, num_classes, dropout=dropout)
        self.auxiliary_head = plain_heads.FCN(
            backbone.channels[1], 256, num_classes, num_convs=1, concat_input=False,
            dropout=dropout,
        )  # fmt: skip

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        *_, auxiliary, features = self.backbone.forward_stages(images)
        size = images.shape[2:]

        def cross_entropy(logits: Tensor) -> Tensor:
            upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            return F.cross_entropy(upsampled, targets, ignore_index=255)

        loss = cross_entropy(self.decode_head(features))
        return loss + 0.4 * cross_entropy(self.auxiliary_head([auxiliary[1]]))
