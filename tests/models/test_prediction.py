"""Sliding windows, scales and flips, against a plain implementation that holds everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import peak_of, reads_proc
from torch import Tensor, nn

from fastfuse.heads import FCNHead
from fastfuse.models import CEDNet, Segmentor
from fastfuse.models.prediction import window_starts


class Backbone(nn.Module):
    """One feature of stride 4, whose values depend on what is around."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, 2, 1)
        self.second = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.second(self.first(images).relu())]


class Head(nn.Module):
    def __init__(self, classes: int, channels: int = 6, align_corners: bool = False) -> None:
        super().__init__()
        self.conv, self.align_corners = nn.Conv2d(channels, classes, 1, bias=False), align_corners
        nn.init.normal_(self.conv.weight, std=4.0)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(features[0])


def model(classes: int, align_corners: bool = False) -> Segmentor:
    return Segmentor(Backbone(), Head(classes, align_corners=align_corners)).double().eval()


def plain_slide(
    net: Segmentor, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The mean of all windows' logits, of the whole image at once."""
    height, width = images.shape[2:]
    total: Any = 0
    count = torch.zeros(height, width, dtype=images.dtype)
    rows = -(-max(height - crop[0], 0) // stride[0]) + 1
    columns = -(-max(width - crop[1], 0) // stride[1]) + 1
    for i in range(rows):
        for j in range(columns):
            bottom = min(i * stride[0] + crop[0], height)
            right = min(j * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            logits = net(images[:, :, top:bottom, left:right])
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            count[top:bottom, left:right] += 1
    return total / count


def plain(net: Segmentor, images: Tensor, **options: Any) -> Tensor:
    crop, stride = options.get("crop"), options.get("stride")
    size, align = tuple(images.shape[2:]), net.decode_head.align_corners
    total: Any = 0
    scales = options.get("scales", (1.0,))
    if scales == (1.0,) and not options.get("flip"):
        logits = plain_slide(net, images, crop, stride) if crop else net(images)
        return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    for scale in scales:
        multiples = tuple(max(32, round(n * scale / 32) * 32) for n in size)
        scaled = size if scales == (1.0,) else multiples
        resized = F.interpolate(images, scaled, mode="bilinear")
        for mirrored in (False, True) if options.get("flip") else (False,):
            inputs = resized.flip(3) if mirrored else resized
            if crop:
                window = tuple(min(c, n) for c, n in zip(crop, scaled, strict=True))
                logits = plain_slide(net, inputs, window, stride)
            else:
                logits = net.decode_head(net.backbone(inputs))
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=align)
            found = logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()
            total = total + (found.flip(3) if mirrored else found)
    count = len(scales) * (2 if options.get("flip") else 1)
    return total.argmax(1) if total.shape[1] > 1 else (total[:, 0] / count > 0.5).long()


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "slide": {"crop": (32, 32), "stride": (20, 24)},
    "narrow steps": {"crop": (32, 48), "stride": (8, 12)},
    "side by side": {"crop": (32, 32), "stride": (32, 32)},
    "one window": {"crop": (72, 100), "stride": (72, 100)},
    "flip": {"flip": True},
    "scales": {"scales": (0.5, 1.0, 1.5), "flip": True},
    "scales of windows": {
        "crop": (32, 48),
        "stride": (16, 32),
        "scales": (0.5, 1.25),
        "flip": True,
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("align_corners", [False, True])
def test_as_a_plain_implementation(case: str, classes: int, align_corners: bool) -> None:
    net, images = model(classes, align_corners), torch.randn(2, 3, 72, 100, dtype=torch.float64)
    options = CASES[case]
    mode = "slide" if "crop" in options else "whole"
    with torch.no_grad():
        expected = plain(net, images, **options)
    found = net.predict(images, mode=mode, **options)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert len(found.unique()) > 1 or classes == 1


def test_a_stride_that_is_not_given() -> None:
    """Two thirds of the window, up to a pixel."""
    net, images = model(4), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    found = net.predict(images, mode="slide", crop=32)
    assert torch.equal(found, net.predict(images, mode="slide", crop=(32, 32), stride=22))


def test_every_pixel_is_seen() -> None:
    for extent in range(1, 40):
        for crop in range(1, extent + 1):
            for stride in range(1, crop + 1):
                starts = window_starts(extent, crop, stride)
                seen = {p for s in starts for p in range(s, s + crop)}
                assert seen == set(range(extent))
                assert starts == sorted(set(starts))


def test_a_threshold_of_windows() -> None:
    net, images = model(1), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    shares = [
        net.predict(images, mode="slide", crop=32, threshold=t).double().mean()
        for t in (0.3, 0.5, 0.7)
    ]
    assert shares[0] > shares[1] > shares[2]


def test_metrics_of_torchmetrics() -> None:
    """As docs/heads.md has it: intersection over union by counting pixels."""
    classification = pytest.importorskip("torchmetrics").classification
    options = {"num_classes": 5, "ignore_index": 255}
    per_class = classification.MulticlassJaccardIndex(**options, average="none")
    pixels = classification.MulticlassAccuracy(**options, average="micro")
    net, labels, targets = model(5), [], []
    for _ in range(2):
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        target = torch.randint(5, (2, 32, 32))
        target[:, :3] = 255
        labels.append(net.predict(images))
        targets.append(target)
        for metric in (per_class, pixels):
            metric.update(labels[-1], target)
    a, b = torch.cat(labels), torch.cat(targets)
    counted = b != 255
    for c, iou in enumerate(per_class.compute()):
        mine, theirs = (a == c) & counted, (b == c) & counted
        assert iou.item() == pytest.approx(float((mine & theirs).sum() / (mine | theirs).sum()))
    assert pixels.compute().item() == pytest.approx(float((a == b)[counted].double().mean()))


def test_windows_of_narrow_logits() -> None:
    """Their sum has the digits of float32, however many they are."""
    net = model(19).bfloat16()
    images = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    total: Any = 0
    with torch.no_grad():
        for top in range(0, 33, 2):
            for left in range(0, 33, 2):
                window = images[:, :, top : top + 32, left : left + 32]
                logits = net(window).float()
                total = total + F.pad(logits, (left, 32 - left, top, 32 - top))
    found = net.predict(images, mode="slide", crop=32, stride=2)
    count = torch.zeros(64).index_add_(
        0, torch.cat([torch.arange(t, t + 32) for t in range(0, 33, 2)]), torch.ones(17 * 32)
    )
    expected = (total / (count[:, None] * count)).argmax(1)
    assert (found != expected).double().mean() < 1e-3


def test_scales_of_any_size() -> None:
    """A backbone that takes multiples of 32 alone gets them."""
    backbone = CEDNet("tiny", channels=(4, 6, 8, 10), depths=(1, 1, 1, 1), stages=2)
    net = Segmentor(backbone, FCNHead(10, 4, 3, num_convs=1, concat_input=False)).eval()
    images = torch.randn(1, 3, 70, 100)
    assert net.predict(images, scales=(0.5, 1.0), flip=True).shape == (1, 70, 100)


@reads_proc
def test_memory_of_windows() -> None:
    """Of 1024 x 1024 with 150 classes, whose logits take 600 MiB."""
    before = """
from torch import nn
torch.set_num_threads(1)

class Head(nn.Conv2d):
    def forward(self, features):
        return super().forward(features[0])

net = fastfuse.models.Segmentor(nn.Conv2d(3, 8, 4, 4), Head(8, 150, 1)).eval()
images = torch.randn(1, 3, 1024, 1024)
net.predict(images[:, :, :256, :256], mode="slide", crop=256)
"""
    measured = 'labels = net.predict(images, mode="slide", crop=256)'
    assert peak_of(measured, before=before) < 175 << 20


BAD: list[tuple[dict[str, Any], str]] = [
    ({"mode": "slide"}, "mode 'slide' needs crop, the window's .* got None"),
    ({"crop": 8}, "crop and stride are of mode 'slide'; got mode 'whole'"),
    ({"mode": "slide", "crop": 0}, r"crop must be a positive int or two \(height, width\); got 0"),
    ({"mode": "slide", "crop": 8.0}, r"crop must be a positive int or two .* got 8\.0"),
    ({"mode": "slide", "crop": (8, 8, 8)}, "crop must be a positive int or two"),
    (
        {"mode": "slide", "crop": 65},
        "crop must not be larger than the images, 64 x 64; got 65 x 65",
    ),
    (
        {"mode": "slide", "crop": (8, 16), "stride": 12},
        "stride must not be larger than crop, 8 x 16, or pixels are left out; got 12 x 12",
    ),
    ({"mode": "slide", "crop": 8, "stride": 0}, "stride must be a positive int"),
    ({"scales": ()}, r"scales must be positive numbers, one at least; got \(\)"),
    ({"scales": (1.0, 0.0)}, "scales must be positive numbers"),
    ({"scales": (float("inf"),)}, "scales must be positive numbers"),
    ({"scales": (True,)}, "scales must be positive numbers"),
    ({"scales": 1.0}, "scales must be positive numbers, one at least; got 1.0"),
    ({"mode": "tiles"}, "mode must be one of whole, slide; got 'tiles'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Segmentor: {message}"):
        model(3).predict(torch.randn(1, 3, 64, 64, dtype=torch.float64), **options)
