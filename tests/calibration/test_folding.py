"""fold_scale_equalizers: exact with the mean, the paper's form without it, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    DETAIL,
    POOLING,
    TOP_DOWN,
    Bare,
    Model,
    Pair,
    assert_same_state,
    random_batches,
    state,
)
from torch import Tensor, nn
from torch.nn.utils import prune

from fastfuse import calibrate, fold_scale_equalizers
from fastfuse.nn import MultiLevelFusion, SeparableFusion
from fastfuse.tolerances import relative_error


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """These models are too small for more."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("align_corners", [False, True])
def test_outputs_stay_with_the_mean(align_corners: bool) -> None:
    model = Model(align_corners=align_corners)
    batches = random_batches(2, 4)
    calibrate(model, batches)
    model.train()(batches[0])  # running statistics that are not those of a fresh BatchNorm
    model.eval()
    with torch.no_grad():
        before = model(batches[1])
        assert fold_scale_equalizers(model) == [POOLING, TOP_DOWN, DETAIL]
        assert relative_error(model(batches[1]), before) < 1e-6
    for name in (POOLING, TOP_DOWN, DETAIL):
        equalizer = model.get_submodule(name)
        assert equalizer.std.tolist() == [1.0] * equalizer.num_levels
        assert equalizer.mean.abs().max() > 0
    folded = state(model)
    fold_scale_equalizers(model)  # once more: nothing is left to fold
    assert_same_state(model, folded)


def levels_of(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(2, 3, 8, 8, dtype=dtype) + 1, torch.randn(2, 5, 4, 2, dtype=dtype) + 1]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("kind", [MultiLevelFusion, SeparableFusion])
def test_without_the_mean_it_is_the_convolution_of_x_over_std(
    kind: Any, align_corners: bool
) -> None:
    options = {"norm": nn.Identity, "activation": nn.Identity, "align_corners": align_corners}
    fusion = kind([3, 5], 4, scale_equalizer=True, **options).double()
    fusion.equalizer.set_statistics([0.3, 0.7], [0.25, 3.0])
    weight = fusion.level_weight.detach().clone()
    keys = set(fusion.state_dict())
    assert fold_scale_equalizers(fusion, keep_mean=False) == ["equalizer"]
    assert fusion.equalizer is None
    assert keys - set(fusion.state_dict()) == {"equalizer.mean", "equalizer.std"}

    features = levels_of(torch.float64)
    up = [
        F.interpolate(f, (8, 8), mode="bilinear", align_corners=align_corners) / std
        for f, std in zip(features, (0.25, 3.0), strict=True)
    ]
    groups = 1 if kind is MultiLevelFusion else 8
    expected = F.conv2d(torch.cat(up, 1), weight, padding=1, groups=groups)
    if kind is SeparableFusion:
        expected = fusion.pointwise_conv(expected)
    torch.testing.assert_close(fusion(features), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [MultiLevelFusion, SeparableFusion])
def test_batch_statistics_take_the_mean_away_but_at_the_border(kind: Any) -> None:
    """The paper's form under batch statistics: the fusion's own, away from the padding."""
    fusion = kind([3, 5], 4, scale_equalizer=True, norm=nn.Identity, activation=nn.Identity)
    fusion.double().equalizer.set_statistics([1.3, -0.7], [0.25, 3.0])
    features = levels_of(torch.float64)
    with torch.no_grad():
        before = fusion(features)
        fold_scale_equalizers(fusion, keep_mean=False)
        change = fusion(features) - before
    inside = change[..., 1:-1, 1:-1]
    per_channel = inside[..., :1, :1].expand_as(inside)
    torch.testing.assert_close(inside, per_channel, rtol=1e-9, atol=1e-9)  # what BatchNorm removes
    assert (change[..., 0, :] - per_channel[..., :1, 0]).abs().max() > 0.01


def test_the_identity_folds_into_itself() -> None:
    model = Model()
    before = state(model)
    assert fold_scale_equalizers(model) == [POOLING, TOP_DOWN, DETAIL]
    assert_same_state(model, before)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match=r"^fold_scale_equalizers: the model has no scale equal"):
        fold_scale_equalizers(Model(scale_equalizer=False))

    model = Model()
    model.spare = Bare()
    model.decode_head.bottleneck.equalizer.std.fill_(2)
    before = state(model)
    with pytest.raises(ValueError, match=r"these stand alone: \['spare.equalizer'\]"):
        fold_scale_equalizers(model)
    assert_same_state(model, before)

    shared = nn.ModuleList(MultiLevelFusion([3, 3], 4, scale_equalizer=True) for _ in range(2))
    shared[1].equalizer = shared[0].equalizer
    with pytest.raises(ValueError, match=r"fusions '0' and '1' share a ScaleEqualizer"):
        fold_scale_equalizers(shared)
    shared[1].equalizer = MultiLevelFusion([3, 3], 4, scale_equalizer=True).equalizer
    shared[1].conv.weight = shared[0].conv.weight
    with pytest.raises(ValueError, match=r"fusions '0' and '1' share a Parameter"):
        fold_scale_equalizers(shared)

    pair = Pair(MultiLevelFusion([3, 3], 4, scale_equalizer=True))
    pair.fusion.equalizer.std.fill_(1e-37)
    pair.fusion.half()
    pair.fusion.equalizer.float().std.fill_(1e-7)
    before = state(pair)
    with pytest.raises(ValueError, match=r"'fusion' divided by its std must be finite in torch.f"):
        fold_scale_equalizers(pair)
    assert_same_state(pair, before)

    pair = Pair(MultiLevelFusion([3, 3], 4, scale_equalizer=True))
    nn.utils.parametrizations.weight_norm(pair.fusion.conv)
    with pytest.raises(ValueError, match=r"fusion 'fusion': .* is a .*ParametrizedConv2d: remove"):
        fold_scale_equalizers(pair)
    pair = Pair(MultiLevelFusion([3, 3], 4, scale_equalizer=True))
    prune.l1_unstructured(pair.fusion.conv, "weight", 0.5)
    for fold in (lambda: fold_scale_equalizers(pair), pair.fusion.fold_equalizer):
        with pytest.raises(
            ValueError, match=r"the convolution has a computed weight: .* permanent"
        ):
            fold()


@pytest.mark.parametrize(
    "done", ["pre-hook", "hook of the equalizer", "hook of a unit", "forward", "subclass", "meta"]
)
def test_what_children_do_is_not_folded(done: str) -> None:
    separable = done == "hook of a unit"
    kind = SeparableFusion if separable else MultiLevelFusion
    pair = Pair(kind([3, 3], 4, scale_equalizer=True))
    conv, equalizer = pair.fusion.level_conv, pair.fusion.equalizer
    if separable:
        pair.fusion.depthwise_conv.register_forward_pre_hook(lambda module, x: None)
    elif done == "pre-hook":
        conv.register_forward_pre_hook(lambda module, x: (x[0].clamp(-1, 1),))
    elif done == "hook of the equalizer":
        equalizer.register_forward_hook(lambda module, x, y: y)
    elif done == "forward":
        conv.forward = lambda x: x
    elif done == "subclass":
        equalizer.__class__ = type("Clamped", (type(equalizer),), {})
    else:
        pair.to("meta")
    for fold in (lambda: fold_scale_equalizers(pair), pair.fusion.fold_equalizer):
        with pytest.raises(
            ValueError, match=r"expected a convolution and an equalizer to which noth"
        ):
            fold()
