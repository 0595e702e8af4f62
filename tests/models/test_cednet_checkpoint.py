"""The authors' checkpoints: their module tree, its key names, and its results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cednets import SMALL, assert_alike, cednet, every_style, plain_cednet, randomized
from inputs import images
from plain_heads import PLAIN
from small_models import assert_same_state, state
from torch import Tensor, nn

from fastfuse import heads
from fastfuse.models import (
    CEDNetClassifier,
    DetectionFeatures,
    RetinaHead,
    RetinaNet,
    Segmentor,
    load_published_cednet,
)
from fastfuse.models.cednet_checkpoint import _keys
from fastfuse.models.cednet_upernet import CEDNetSegmentor

# ---- the published structure, by its names ------------------------------------------------------

Norm = plain_cednet.Norm


def step(a: int, b: int, k: int, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, k, **options), Norm(b))


def depthwise(c: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, c, 7, padding=3 * dilation, dilation=dilation, groups=c)


class Next(nn.Module):
    """A block; the last half is the same in both kinds."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.add_mixing(c)
        self.pwconv1, self.pwconv2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(torch.ones(c))

    def add_mixing(self, c: int) -> None:
        self.dwconv, self.norm = depthwise(c), Norm(c)

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(self.dwconv(x))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.pwconv2(F.gelu(self.pwconv1(self.mix(x).movedim(1, 3))))
        return x + (self.gamma * rows).movedim(3, 1)


class LongRange(Next):
    def add_mixing(self, c: int) -> None:
        self.dwconv1 = nn.Sequential(depthwise(c), Norm(c), nn.GELU())
        self.dwconv2 = nn.Sequential(depthwise(c, 3), Norm(c), nn.GELU())

    def mix(self, x: Tensor) -> Tensor:
        x = x + self.dwconv1(x)
        return x + self.dwconv2(x)


def chain(kind: type[Next], c: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(kind(c) for _ in range(count)))


class Encoder(nn.Module):
    def __init__(self, c3: int, c4: int, c5: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        kinds = (Next, Next, LongRange)
        self.encoder = nn.ModuleList(map(chain, kinds, (c3, c4, c5), depths))
        self.encoder_downsample = nn.ModuleList(
            (step(c3, c4, 2, stride=2), step(c4, c5, 2, stride=2))
        )

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        c3 = self.encoder[0](x[0] if isinstance(x, tuple) else x)
        c4 = self.encoder[1](self.encoder_downsample[0](c3))
        return c3, c4, self.encoder[2](self.encoder_downsample[1](c4))


class Decoder(nn.Module):
    def __init__(self, c3: int, c4: int, c5: int, depths: tuple[int, ...], style: str) -> None:
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.decoder_upsample = nn.ModuleList(
            (nn.Sequential(nn.Conv2d(c5, c4, 1), up), nn.Sequential(nn.Conv2d(c4, c3, 1), up))
        )
        self.decoder_norm = nn.Sequential(Norm(c4), Norm(c3))
        if style != "fpn":
            self.decoder = nn.Sequential(*map(chain, (Next, Next), (c4, c3), depths))
        if style == "hourglass":
            self.lateral = nn.Sequential(Next(c4), Next(c3))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        c3, c4, c5 = maps
        found, coarser = [], c5
        for i, skip in enumerate((c4, c3)):
            skip = self.lateral[i](skip) if hasattr(self, "lateral") else skip
            coarser = self.decoder_norm[i](skip + self.decoder_upsample[i](coarser))
            coarser = self.decoder[i](coarser) if hasattr(self, "decoder") else coarser
            found.append(coarser)
        return found[1], found[0], c5


class Published(nn.Module):
    """Of the small size; ``forward`` gives c2 and the maps of every stage."""

    def __init__(self, style: str = "fpn", last_decoder: bool = False) -> None:
        super().__init__()
        (c2, *channels), (n0, n3, n4, n5) = SMALL["channels"], SMALL["depths"]
        encoder, decoder = (n3, n4, n5), (0, 0)
        if style != "fpn":
            encoder, decoder = (n3 // 2, n4 // 2, n5), (n4 - n4 // 2, n3 - n3 // 2)
        conv = {"stride": 2, "padding": 1}
        stem = (*step(3, 32, 3, **conv), nn.GELU(), *step(32, c2, 3, **conv), nn.GELU())
        self.stem = nn.Sequential(*stem)
        first = nn.Sequential(*chain(Next, c2, n0), step(c2, channels[0], 2, stride=2))
        self.stages = nn.ModuleList((first,))
        for i in range(SMALL["stages"]):
            stage: list[nn.Module] = [Encoder(*channels, encoder)]
            if i < SMALL["stages"] - 1 or last_decoder:
                stage.append(Decoder(*channels, decoder, style))
            self.stages.append(nn.Sequential(*stage))

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        c2 = self.stages[0][:-1](self.stem(x))
        x, maps = self.stages[0][-1](c2), []
        for stage in self.stages[1:]:
            x = stage(x)
            maps.append(x)
        return c2, maps

    def maps(self, x: Tensor) -> list[Tensor]:
        c2, maps = self(x)
        return [c2, *maps[-1]]


class PublishedClassifier(Published):
    """With a head for every stage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        c5, stages = SMALL["channels"][-1], range(SMALL["stages"])
        self.final_layers = nn.ModuleList(
            nn.Sequential(*step(c5, 2048, 1), nn.GELU()) for _ in stages
        )
        self.norms = nn.ModuleList(nn.LayerNorm(2048, eps=1e-6) for _ in stages)
        self.heads = nn.ModuleList(nn.Linear(2048, 5) for _ in stages)

    def logits(self, x: Tensor) -> list[Tensor]:
        parts = zip(self.final_layers, self.norms, self.heads, self(x)[1], strict=True)
        return [head(norm(layer(m[-1]).mean((2, 3)))) for layer, norm, head, m in parts]


class PublishedFeatures(Published):
    """Of detectors; with ``two_stages`` from P2 on."""

    def __init__(self, two_stages: bool, **options: Any) -> None:
        super().__init__(**options)
        c2, *channels = SMALL["channels"]
        extra = 1 if two_stages else 2
        self.reduce_convs = nn.ModuleList(step(c, 6, 1) for c in channels)
        self.add_blocks = nn.ModuleList(step(6, 6, 3, stride=2, padding=1) for _ in range(extra))
        if two_stages:
            self.reduce_c2 = step(c2, 6, 1)
            self.merge_c2 = nn.Sequential(Norm(6), nn.Conv2d(6, 6, 3, padding=1))

    def levels(self, x: Tensor) -> list[Tensor]:
        c2, *maps = self.maps(x)
        levels = [reduce(m) for reduce, m in zip(self.reduce_convs, maps, strict=True)]
        for block in self.add_blocks:
            levels.append(block(levels[-1]))
        if hasattr(self, "merge_c2"):
            up = F.interpolate(levels[0], scale_factor=2, mode="bilinear")
            levels.insert(0, self.merge_c2(up + self.reduce_c2(c2)))
        return levels


def prefixed(**parts: nn.Module) -> dict[str, Any]:
    """As MMDetection and MMSegmentation write it."""
    states = {f"{name}.{k}": v for name, m in parts.items() for k, v in m.state_dict().items()}
    return {"meta": {"epoch": 12}, "state_dict": states}


def alike(found: Any, expected: Any) -> None:
    assert_alike(dict(enumerate(found)), dict(enumerate(expected)), 1e-5)


# ---- what loads ---------------------------------------------------------------------------------


@every_style
@pytest.mark.parametrize("last_decoder", [False, True], ids=["raw", "decoded"])
def test_backbone(style: str, last_decoder: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"style": style, "last_decoder": last_decoder}
    theirs, ours = randomized(Published(**options)), cednet(**options)
    torch.save({"model": theirs.state_dict()}, tmp_path / "cednet.pth")
    load_published_cednet(ours, tmp_path / "cednet.pth")
    (x,) = images((1, 3, 64, 96))
    alike(ours(x), theirs.maps(x))


@every_style
def test_classifier(style: str) -> None:
    """All heads, the last one, and none: dense prediction starts from the backbone."""
    theirs = randomized(PublishedClassifier(style=style))
    checkpoint = {"model": theirs.state_dict()}
    (x,) = images((2, 3, 64, 32))
    expected = theirs.logits(x)
    for auxiliary_heads in (True, False):
        options: dict[str, Any] = {"style": style, "auxiliary_heads": auxiliary_heads}
        ours = CEDNetClassifier("tiny", 5, **options, **SMALL).eval()
        load_published_cednet(ours, checkpoint)
        alike([ours(x)], expected[-1:])
        alike(ours.forward_heads(x), expected if auxiliary_heads else expected[-1:])
    backbone = cednet(style, last_decoder=False)
    load_published_cednet(backbone, checkpoint)
    alike(backbone(x), theirs.maps(x))


@pytest.mark.parametrize("levels", ["p3-p7", "p2-p6"])
def test_features(levels: str) -> None:
    """Of detectors whose other heads are nobody's here."""
    theirs = randomized(PublishedFeatures(levels == "p2-p6"))
    ours = DetectionFeatures(cednet(), 6, levels=levels, as_tuple=True)
    rest = {name: nn.Linear(2, 2) for name in ("bbox_head", "rpn_head", "roi_head")}
    load_published_cednet(ours, prefixed(backbone=theirs, **rest))
    (x,) = images((1, 3, 64, 96))
    alike(ours(x), theirs.levels(x))


def test_retinanet() -> None:
    theirs = randomized(PublishedFeatures(False, style="unet", last_decoder=True))
    head = randomized(plain_cednet.RetinaHead(6, 3))
    ours = RetinaNet(DetectionFeatures(cednet("unet"), 6), RetinaHead(6, 3))
    load_published_cednet(ours, prefixed(backbone=theirs, bbox_head=head))
    (x,) = images((1, 3, 64, 96))
    for found, expected in zip(ours(x), head(theirs.levels(x)), strict=True):
        alike(found, expected)


def segmentor() -> Segmentor:
    channels = SMALL["channels"]
    auxiliary = heads.FCNHead(channels[1], 4, 5, num_convs=1, concat_input=False)
    return CEDNetSegmentor(cednet(), heads.UPerHead(channels, 8, 5), auxiliary)


def published_segmentor() -> dict[str, nn.Module]:
    channels = SMALL["channels"]
    decode = PLAIN["UPerHead"](channels, 8, 5)
    auxiliary = PLAIN["FCNHead"](channels[1], 4, 5, num_convs=1, concat_input=False)
    parts = {"backbone": Published(), "decode_head": decode, "auxiliary_head": auxiliary}
    return {name: randomized(part).eval() for name, part in parts.items()}


def test_segmentor() -> None:
    theirs, ours = published_segmentor(), segmentor().eval()
    load_published_cednet(ours, prefixed(**theirs))
    (x,) = images((1, 3, 64, 96))
    c2, stages = theirs["backbone"](x)
    logits = theirs["decode_head"]([c2, *stages[-1]])
    alike([ours(x)], [F.interpolate(logits, size=(64, 96), mode="bilinear")])
    features, read = ours.training_features(x)
    alike(features, [c2, *stages[-1]])
    alike(ours.auxiliary_head([read]), theirs["auxiliary_head"]([stages[-2][0]]))


# ---- what does not ------------------------------------------------------------------------------

Fault = Callable[[dict[str, Tensor]], Any]
KEY = "backbone.stages.2.0.encoder.2.1.dwconv2.0.weight"
FAULTS: dict[str, tuple[Fault, str]] = {
    "missing": (lambda s: s.pop(KEY), f"load_published_cednet: missing keys: {KEY}$"),
    "unexpected": (
        lambda s: s.update({"neck.weight": torch.ones(1)}),
        "load_published_cednet: unexpected keys: neck.weight$",
    ),
    "our names": (
        lambda s: s.update({"backbone.blocks.0.fc1.weight": torch.ones(1)}),
        "unexpected keys: backbone.blocks.0.fc1.weight$",
    ),
    "another block": (
        lambda s: s.update({KEY.replace("dwconv2.0", "dwconv"): s.pop(KEY)}),
        f"missing keys: {KEY}; unexpected keys: backbone.stages.2.0.encoder.2.1.dwconv.weight$",
    ),
    "a head of the classifier": (
        lambda s: s.update({"backbone.heads.0.weight": torch.ones(1)}),
        "unexpected keys: backbone.heads.0.weight$",
    ),
    "shape": (lambda s: s.update({KEY: s[KEY][:1]}), r"dw2\.weight: copying a param with shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_changes_nothing(fault: str) -> None:
    model, checkpoint = segmentor(), prefixed(**published_segmentor())
    spoil, message = FAULTS[fault]
    spoil(checkpoint["state_dict"])
    before = state(model)
    with pytest.raises(RuntimeError, match=message):
        load_published_cednet(model, checkpoint)
    assert_same_state(model, before)


def test_another_configuration_does_not_fit() -> None:
    checkpoint = PublishedClassifier().state_dict()
    for options, message in (
        ({"depths": (2, 2, 3, 2)}, r"missing keys: stages\.0\.1\.dwconv"),
        ({"depths": (0, 2, 3, 2)}, r"unexpected keys: stages\.0\.0\.dwconv"),
        ({"lr_blocks": False}, r"encoder\.2\.0\.dwconv\."),
        ({"stages": 3}, r"missing keys: stages\.2\.1\.decoder_norm"),
        ({"last_decoder": True}, r"missing keys: stages\.2\.1\.decoder_norm"),
        ({"style": "unet", "last_decoder": False}, r"stages\.1\.1\.decoder\.0\.0\.dwconv"),
        ({"layer_scale": None}, r"unexpected keys: stages\.0\.0\.gamma"),
    ):
        with pytest.raises(RuntimeError, match=message):
            load_published_cednet(cednet(**options), checkpoint)
    with pytest.raises(ValueError, match="must have the depthwise token mixer"):
        load_published_cednet(cednet(token_mixer=nn.Identity), checkpoint)


def test_every_tensor_has_a_published_name() -> None:
    for style in ("fpn", "unet", "hourglass"):
        model = cednet(style=style)
        assert sorted(ours for _, ours in _keys(model)) == sorted(model.state_dict())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Segmentor(nn.Identity(), nn.Identity())])
def test_other_models(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"model must be a CEDNet, .*; got {type(model).__name__}"):
        load_published_cednet(model, {"stem.0.bias": torch.ones(32)})


def test_no_state_dict() -> None:
    with pytest.raises(ValueError, match="must hold a state dict"):
        load_published_cednet(cednet(), {"epoch": 12})
