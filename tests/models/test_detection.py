"""Detection features, RetinaNet and the classifier on CEDNet."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cednets import assert_alike, cednet, count, plain_cednet, randomized, results
from inputs import both_layouts, images
from torch import Tensor, nn

from fastfuse.models import (
    CEDNetClassifier,
    DetectionFeatures,
    RetinaHead,
    RetinaNet,
    cednet_retinanet_tiny,
)
from fastfuse.tolerances import relative_error

NAMES = {"p3-p7": ["0", "1", "2", "p6", "p7"], "p2-p6": ["0", "1", "2", "3", "pool"]}
both_levels = pytest.mark.parametrize("levels", NAMES)
TINY: dict[str, Any] = {"channels": (4, 6, 8, 10), "depths": (0, 1, 1, 1), "stages": 2}


def features(levels: str = "p3-p7", width: int = 6, **options: Any) -> DetectionFeatures:
    return randomized(DetectionFeatures(cednet(**TINY), width, levels=levels, **options))


# ---- detection features -------------------------------------------------------------------------


@both_levels
def test_levels(levels: str) -> None:
    model, (x,) = features(levels), images((2, 3, 128, 64))
    maps = model(x)
    first = 8 if levels == "p3-p7" else 4
    sizes = [(2, 6, 128 // s, max(64 // s, 1)) for s in (first << i for i in range(5))]
    assert list(maps) == NAMES[levels]
    assert [tuple(m.shape) for m in maps.values()] == sizes
    assert model.out_channels == 6
    model.as_tuple = True
    as_tuple = model(x)
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, maps.values(), strict=True))


class Composed(nn.Module):
    """The same levels of a model's own weights, by the paper's formulas."""

    def __init__(self, model: DetectionFeatures) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        model = self.model

        def norm(x: Tensor, norm: Any) -> Tensor:
            rows = x.permute(0, 2, 3, 1)
            rows = F.layer_norm(rows, rows.shape[3:], norm.weight, norm.bias, 1e-6)
            return rows.permute(0, 3, 1, 2)

        def conv(x: Tensor, conv: Any, **options: int) -> Tensor:
            return F.conv2d(x, conv.weight, conv.bias, **options)

        c2, *coarser = model.backbone(x)
        levels = [
            norm(conv(c, part.conv), part.norm)
            for c, part in zip(coarser, model.reduce, strict=True)
        ]
        for part in model.extra:
            levels.append(norm(conv(levels[-1], part.conv, stride=2, padding=1), part.norm))
        if model.lateral is not None:
            p3 = F.interpolate(levels[0], scale_factor=2, mode="bilinear")
            joined = p3 + norm(conv(c2, model.lateral.conv), model.lateral.norm)
            p2 = conv(norm(joined, model.merge.norm), model.merge.conv, padding=1)
            levels.insert(0, p2)
        return levels


@both_levels
@both_layouts
def test_equals_the_formulas(levels: str, channels_last: bool) -> None:
    model = features(levels).double()
    (x,) = images((2, 3, 64, 96), dtype=torch.float64, channels_last=channels_last)
    expected = {k.removeprefix("model."): v for k, v in results(Composed(model), x).items()}
    assert_alike(results(model, x), expected, 1e-10)


# ---- RetinaNet ----------------------------------------------------------------------------------


def test_head_equals_its_plain_composition() -> None:
    ours, theirs = RetinaHead(8, 3).double(), plain_cednet.RetinaHead(8, 3).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    levels = images(*((2, 8, 16 >> i, 12 >> i) for i in range(4)), dtype=torch.float64)
    assert_alike(results(ours, levels), results(theirs, levels), 1e-10)


def test_head_starts_with_background() -> None:
    head = RetinaHead(8, 3)
    logits, deltas = head(images((1, 8, 4, 4)))
    torch.testing.assert_close(
        logits[0].sigmoid(), torch.full_like(logits[0], 0.01), atol=3e-3, rtol=0
    )
    assert deltas[0].abs().max() < 0.1


def test_retinanet() -> None:
    model, (x,) = cednet_retinanet_tiny(3, **TINY).eval(), images((1, 3, 64, 96))
    logits, deltas = model(x)
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert [tuple(x.shape) for x in logits] == [(1, 27, *size) for size in sizes]
    assert [tuple(x.shape) for x in deltas] == [(1, 36, *size) for size in sizes]
    again = model.bbox_head(list(model.backbone(x).values()))
    assert torch.equal(again[1][4], deltas[4])
    assert count(RetinaHead(4, 5, num_anchors=2, num_convs=1)) == 37 * (2 * 4 + 2 * 5 + 2 * 4)


def tiny_retinanet() -> RetinaNet:
    model = randomized(RetinaNet(features(), RetinaHead(6, 3, num_convs=1)))
    return model.eval()


def test_compile() -> None:
    model, (x,) = tiny_retinanet(), images((1, 3, 64, 32))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {k.removeprefix("_orig_mod."): v for k, v in results(compiled, x).items()}
    assert_alike(found, results(model, x), 1e-5)


def test_export() -> None:
    model, x = tiny_retinanet(), tuple(images((1, 3, 64, 32)))
    program = torch.export.export(model, x)
    for kind in (0, 1):
        for a, b in zip(program.module()(*x)[kind], model(*x)[kind], strict=True):
            assert relative_error(a, b) < 1e-5


# ---- torchvision --------------------------------------------------------------------------------


@pytest.mark.parametrize(("detector", "levels"), [("RetinaNet", "p3-p7"), ("FasterRCNN", "p2-p6")])
def test_torchvision_detector(detector: str, levels: str) -> None:
    try:
        detection = importlib.import_module("torchvision.models.detection")
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"needs torchvision: {reason}")
    options = {"num_classes": 3, "min_size": 64, "max_size": 96}
    model = getattr(detection, detector)(features(levels), **options)
    target = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 80)], [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.backbone.reduce.parameters())
    (found,) = model.eval()([torch.rand(3, 64, 80)])
    assert {"boxes", "labels", "scores"} <= found.keys()


# ---- classifier ---------------------------------------------------------------------------------


def classifier(**options: Any) -> CEDNetClassifier:
    return randomized(CEDNetClassifier("tiny", 5, **{**TINY, **options}))


def test_classifier_has_a_head_for_every_stage() -> None:
    model, (x,) = classifier(stages=3), images((2, 3, 64, 32))
    targets = torch.tensor([1, 4])
    logits = model.forward_heads(x)
    assert [tuple(x.shape) for x in logits] == [(2, 5)] * 3
    for head, output, found in zip(
        model.heads, model.backbone.forward_stages(x), logits, strict=True
    ):
        y = F.conv2d(output.c5, head.expand.conv.weight, head.expand.conv.bias)
        y = F.gelu(head.expand.norm(y)).mean((2, 3))
        y = F.layer_norm(y, (2048,), head.norm.weight, head.norm.bias, 1e-6)
        assert relative_error(found, head.linear(y)) < 1e-5
    for target in (targets, torch.rand(2, 5).softmax(1)):
        losses = [F.cross_entropy(x, target, label_smoothing=0.1) for x in logits]
        torch.testing.assert_close(model.loss(x, target, label_smoothing=0.1), sum(losses) / 3)
    assert torch.equal(model.eval()(x), logits[-1])
    model.loss(x, targets).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_classifier_with_one_head() -> None:
    model, (x,) = classifier(auxiliary_heads=False), images((2, 3, 32, 32))
    assert len(model.heads) == 1
    (logits,) = model.forward_heads(x)
    assert torch.equal(model(x), logits)
    assert relative_error(model.heads[0](model.backbone(x)[-1]), logits) < 1e-6
    assert model.backbone.stages[-1].decoder is None


# ---- bad input ----------------------------------------------------------------------------------


class Number(nn.Module):
    def forward(self, x: Tensor) -> int:
        return 3


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: features("p3-p6"),
        ValueError,
        "DetectionFeatures: levels must be one of p3-p7, p2-p6; got 'p3-p6'",
    ),
    (
        lambda: features(width=0),
        ValueError,
        "DetectionFeatures: out_channels must be at least 1; got 0",
    ),
    (
        lambda: DetectionFeatures(nn.Identity()),
        ValueError,
        "DetectionFeatures: backbone must have an attribute channels, four ints .*; got None",
    ),
    *(
        (
            partial(RetinaHead, **{name: value}),
            ValueError,
            f"RetinaHead: {name} must be at least 1; got {value}",
        )
        for name, value in (
            ("in_channels", 0),
            ("num_classes", 0),
            ("num_anchors", -1),
            ("num_convs", 0),
        )
    ),
    (
        lambda: RetinaHead(8)(images((1, 8, 4, 4), (1, 6, 2, 2))),
        ValueError,
        r"RetinaHead: levels\[1\] must be .* C = 8; got shape \(1, 6, 2, 2\)",
    ),
    (lambda: RetinaHead(num_classes=True), TypeError, "num_classes must be an int; got bool"),
    (lambda: RetinaHead(8)(3), TypeError, "RetinaHead: expected a sequence or mapping of tensors"),
    (
        lambda: RetinaNet(Number(), RetinaHead(8))(torch.zeros(1)),
        TypeError,
        "RetinaHead: expected a sequence or mapping of tensors.*; got int",
    ),
    (
        lambda: CEDNetClassifier(num_classes=0),
        ValueError,
        "CEDNetClassifier: num_classes must be at least 1; got 0",
    ),
    (
        lambda: classifier().loss(*images((2, 3, 32, 32)), torch.zeros(3).long()),
        ValueError,
        r"CEDNetClassifier: targets must be int64 classes of shape \(2,\) or probabilities of "
        r"shape \(2, 5\); got int64 of shape \(3,\)",
    ),
    (
        lambda: classifier().loss(*images((2, 3, 32, 32)), torch.zeros(2)),
        ValueError,
        r"CEDNetClassifier: targets must be .*; got float32 of shape \(2,\)",
    ),
    (lambda: CEDNetClassifier("huge"), ValueError, "CEDNet: variant must be one of tiny"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD]
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


class Maps(nn.Module):
    """Gives maps of some sizes and channels, whatever it is asked."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes = shapes
        self.channels = (4, 8, 12, 16)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images.new_zeros(1, c, size, size) for c, size in self.shapes]


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 16), (8, 8), (12, 4)),
        ((4, 16), (8, 8), (12, 4), (12, 2)),
        ((4, 16), (8, 8), (12, 8), (16, 8)),
    ],
    ids=["three maps", "other channels", "dilated"],
)
def test_maps_that_do_not_fit_are_refused(shapes: tuple[tuple[int, int], ...]) -> None:
    features = DetectionFeatures(Maps(*shapes), 8)
    with pytest.raises(ValueError, match="DetectionFeatures: backbone must give four maps of"):
        features(torch.zeros(1, 3, 64, 64))


def test_the_head_takes_what_features_give() -> None:
    features = DetectionFeatures(Maps((4, 16), (8, 8), (12, 4), (16, 2)), 8)
    head = RetinaHead(8, 2, num_convs=1)
    images = torch.zeros(1, 3, 64, 64)
    logits, _ = head(features(images))
    assert [x.shape[2] for x in logits] == [8, 4, 2, 1, 1]
