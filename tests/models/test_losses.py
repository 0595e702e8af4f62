"""Losses of whole models: one class, labels that do not fit, dtypes, memory, empty batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfuse
from fastfuse import heads
from fastfuse.models import CEDNetClassifier, Segmentor, cednet_upernet_tiny
from fastfuse.tolerances import relative_error

IGNORED = 255
SIZE = (20, 14)


class Backbone(nn.Module):
    """Two features, of strides 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.first(images)
        return [x, self.second(x)]


def segmentor(num_classes: int = 1, auxiliary_classes: int | None = None) -> Segmentor:
    decode = heads.FCNHead(6, 8, num_classes, dropout=0.0)
    auxiliary = None
    if auxiliary_classes is not None:
        auxiliary = heads.FCNHead(
            4, 4, auxiliary_classes, num_convs=1, concat_input=False, dropout=0.0
        )
    model = Segmentor(Backbone(), decode, auxiliary)
    for head in (decode, auxiliary):
        if head is not None:  # logits of either sign, and not small
            nn.init.normal_(head.conv_seg.weight, std=2.0)
    return model


def batch(num_classes: int = 1, count: int = 2) -> tuple[Tensor, Tensor]:
    """Images, and labels of which a few are ignored."""
    targets = torch.randint(max(num_classes, 2), (count, *SIZE))
    targets[:, :3] = IGNORED
    return torch.randn(count, 3, *SIZE), targets


def plainly(model: Segmentor, images: Tensor, targets: Tensor) -> Tensor:
    """The loss in PyTorch, all images at once."""
    features = model.backbone(images)
    parts = [(1.0, model.decode_head, features)]
    if model.auxiliary_head is not None:
        parts.append((0.4, model.auxiliary_head, features[:1]))
    counted = targets != IGNORED
    total = images.new_zeros(())
    for weight, head, maps in parts:
        logits = F.interpolate(head(maps), size=SIZE, mode="bilinear")
        if logits.shape[1] == 1:
            chosen, labels = logits[:, 0][counted], targets[counted]
            loss = F.binary_cross_entropy(chosen.sigmoid(), labels.to(chosen.dtype))
        else:
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED)
        total = total + weight * loss
    return total


@pytest.mark.parametrize(("classes", "auxiliary"), [(1, None), (1, 1), (3, 3)])
def test_loss_and_gradients_equal_the_plain_composition(
    classes: int, auxiliary: int | None
) -> None:
    model, (images, targets) = segmentor(classes, auxiliary).double(), batch(classes)
    images = images.double()
    loss = model(images, targets)
    assert torch.equal(loss, model.loss(images, targets))
    expected = plainly(model, images, targets)
    assert relative_error(loss.reshape(1), expected.reshape(1)) < 1e-13
    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    assert max(grad.abs().max().item() for grad in theirs) > 1e-3
    for a, b in zip(ours, theirs, strict=True):
        # The biases before BatchNorm have gradients of nothing but roundings.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_one_class_is_learned() -> None:
    """Where the first channel is above 0."""
    model, (images, _) = segmentor(1, 1), batch()
    targets = (F.avg_pool2d(images[:, 0], 5, 1, 2) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.predict(images).unique().tolist() == [0, 1]


@pytest.mark.parametrize("threshold", [None, 0.5, 0.2, 0.9])
def test_predict_of_one_class(threshold: float | None) -> None:
    model, (images, _) = segmentor().eval(), batch()
    probabilities = model(images).sigmoid()
    expected = (probabilities[:, 0] > (threshold or 0.5)).long()
    assert expected.unique().tolist() == [0, 1]
    assert torch.equal(model.predict(images, threshold=threshold), expected)


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "label", "expected"),
    [
        (1, 2, "from 0 to 1, for num_classes is 1, or ignore_index = 255; targets.unique"),
        (1, -1, "from 0 to 1"),
        (3, 3, "from 0 to 2 or ignore_index = 255"),
        (3, -1, "from 0 to 2"),
    ],
)
def test_labels_that_are_no_class(classes: int, label: int, expected: str) -> None:
    model, (images, targets) = segmentor(classes, classes), batch(classes)
    targets[1, 5, 7] = label
    message = f"Segmentor: targets must be classes {expected}"
    if classes > 1:
        message = rf"upsample_cross_entropy: target must be classes {expected}.* at \[1, 5, 7\]"
    with pytest.raises(RuntimeError, match=message):
        model(images, targets)
    model.ignore_index = label
    targets[targets == IGNORED] = label
    assert model(images, targets).isfinite()


@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels(classes: int) -> None:
    """A whole image: the others' mean. The whole batch: nan, as PyTorch's cross_entropy."""
    model, (images, targets) = segmentor(classes).eval(), batch(classes, 3)
    targets[1] = IGNORED
    expected = plainly(model, images, targets)
    torch.testing.assert_close(model(images, targets), expected)
    torch.testing.assert_close(model(images[::2], targets[::2]), expected)
    targets[:] = IGNORED
    assert math.isnan(model(images, targets).item())
    logits = torch.randn(1, 3, 2, 2)
    assert math.isnan(F.cross_entropy(logits, targets[:1, :2, :2], ignore_index=IGNORED).item())


@pytest.mark.parametrize("classes", [1, 3])
def test_empty_batches(classes: int) -> None:
    model, (images, targets) = segmentor(classes, classes).eval(), batch(classes)
    assert model(images[:0]).shape == (0, classes, *SIZE)
    assert model.predict(images[:0]).shape == (0, *SIZE)
    loss = model(images[:0], targets[:0])
    assert math.isnan(loss.item())  # the mean of nothing
    loss.backward()


# ---- dtypes, layouts, memory --------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
def test_loss_under_autocast(classes: int) -> None:
    model, (images, targets) = segmentor(classes, classes), batch(classes)
    expected = plainly(model, images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("classes", [1, 3])
def test_loss_of_bfloat16_models(classes: int) -> None:
    model, (images, targets) = segmentor(classes, classes).bfloat16(), batch(classes)
    loss = model(images.bfloat16(), targets)
    assert loss.dtype == torch.float32
    expected = plainly(model.float(), images.bfloat16().float(), targets)
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("classes", [1, 3])
def test_channels_last(classes: int) -> None:
    model, (images, targets) = segmentor(classes, classes).eval(), batch(classes)
    expected = model(images, targets), model(images), model.predict(images)
    last = images.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    found = model(last, targets), model(last), model.predict(last)
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(found[2], expected[2])


def test_full_size_logits_are_not_kept_for_backward() -> None:
    """Of what a forward saves, nothing but images and a number for each pixel is full-size."""
    model, (images, targets) = segmentor(3), batch(3)
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, targets)
    loss.backward()
    full = [s for s in shapes if s[-2:] == SIZE and s not in (images.shape, targets.shape)]
    assert shapes
    assert full == []


# ---- bad input ----------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: segmentor(3, 1)(*batch(3)),
        ValueError,
        "Segmentor: auxiliary_head must have the decode_head's 3 classes; got 1",
    ),
    (
        lambda: segmentor(1, 2)(*batch()),
        ValueError,
        "Segmentor: auxiliary_head must have the decode_head's 1 classes; got 2",
    ),
    (
        lambda: segmentor(3).predict(batch()[0], threshold=0.4),
        ValueError,
        "Segmentor: threshold must be None for several classes.*; got 0.4 for 3 classes",
    ),
    (
        lambda: segmentor().predict(batch()[0], threshold=1.0),
        ValueError,
        "Segmentor: threshold must be between 0 and 1; got 1.0",
    ),
    *(
        (
            lambda call=call: call(segmentor(), batch()[0].byte()),
            ValueError,
            "Segmentor: images must be float64, float32, bfloat16 or float16; got uint8",
        )
        for call in (
            lambda model, images: model(images),
            lambda model, images: model.predict(images),
            lambda model, images: model(images, batch()[1]),
        )
    ),
    (
        lambda: segmentor()(torch.zeros(2, 4, *SIZE)),
        RuntimeError,
        r"expected input\[2, 4, 20, 14\] to have 3 channels, but got 4 channels",
    ),
    (
        lambda: cednet_upernet_tiny(1, depths=(1, 1, 1, 1))(torch.zeros(1, 4, 32, 32)),
        ValueError,
        "CEDNet: images must have 3 channels; got shape",
    ),
    (
        lambda: segmentor()(batch()[0], batch()[1].to("meta")),
        ValueError,
        "Segmentor: targets must be on the logits' device, cpu; got meta",
    ),
    (
        lambda: segmentor()(batch()[0], batch()[1].byte()),
        ValueError,
        r"Segmentor: targets must be int64 of shape \(2, 20, 14\); got uint8 of shape \(2, 20",
    ),
    (
        lambda: CEDNetClassifier("tiny", 1, **TINY)(
            torch.randn(2, 3, 32, 32), torch.zeros(2).long()
        ),
        ValueError,
        "CEDNetClassifier: loss needs num_classes of at least 2.*; got 1. Use 2 classes, or",
    ),
]
TINY = {"depths": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- the classifier -----------------------------------------------------------------------------


def test_classifier_gives_its_loss_when_called() -> None:
    model = CEDNetClassifier("tiny", 4, **TINY)
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([3, 0])
    expected = sum(
        F.cross_entropy(x, targets, label_smoothing=0.2) for x in model.forward_heads(images)
    )
    found = model(images, targets, label_smoothing=0.2)
    torch.testing.assert_close(found, expected / len(model.heads))
    assert model(images).shape == (2, 4)


def test_functional_gradients() -> None:
    """torch.func differentiates a loss, whose logits are not computed again then."""
    model = cednet_upernet_tiny(3, channels=(4, 6, 8, 10), depths=(1, 1, 1, 1), stages=2)
    model.eval().backbone.checkpoint = True
    images, targets = torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32))
    model(images, targets).backward()
    parameters = dict(model.named_parameters())
    with fastfuse.backend("reference"):
        gradients = torch.func.grad(
            lambda parameters: torch.func.functional_call(model, parameters, (images, targets))
        )(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
