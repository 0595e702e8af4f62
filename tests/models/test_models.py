"""ResNetV1c, Segmentor and checkpoints: keys, values, adapters, errors."""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfuse
from fastfuse import heads
from fastfuse.models import ResNetV1c, Segmentor, feature_maps, load_checkpoint
from fastfuse.tolerances import relative_error

# ---- ResNetV1c ----------------------------------------------------------------------------------

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# (stride, dilation of the first block, dilation of the others) of each stage
STAGES = {
    8: ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)),
    16: ((1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)),
    32: ((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)),
}


def plain_resnet(
    images: Tensor, state: dict[str, Tensor], depth: int, output_stride: int
) -> list[Tensor]:
    """MMSegmentation's ResNetV1c as a function of its state dict, in evaluation mode."""
    used = set()

    def conv(x: Tensor, key: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = state[f"{key}.weight"]
        used.add(f"{key}.weight")
        padding = dilation * (weight.shape[2] // 2)
        return F.conv2d(x, weight, None, stride, padding, dilation)

    def norm(x: Tensor, key: str) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        used.update(f"{key}.{name}" for name in (*names, "num_batches_tracked"))
        return F.batch_norm(x, *(state[f"{key}.{name}"] for name in names))

    x = F.relu(norm(conv(images, "stem.0", stride=2), "stem.1"))
    x = F.relu(norm(conv(x, "stem.3"), "stem.4"))
    x = F.relu(norm(conv(x, "stem.6"), "stem.7"))
    x = F.max_pool2d(x, 3, 2, 1)
    outputs = []
    for i, (stage_stride, first, rest) in enumerate(STAGES[output_stride]):
        for block in range(BLOCKS[depth][i]):
            key = f"layer{i + 1}.{block}"
            stride, dilation = (1, rest) if block else (stage_stride, first)
            y = F.relu(norm(conv(x, f"{key}.conv1"), f"{key}.bn1"))
            y = F.relu(norm(conv(y, f"{key}.conv2", stride, dilation), f"{key}.bn2"))
            y = norm(conv(y, f"{key}.conv3"), f"{key}.bn3")
            if block == 0:
                x = norm(conv(x, f"{key}.downsample.0", stride), f"{key}.downsample.1")
            x = F.relu(y + x)
        outputs.append(x)
    assert used == state.keys()
    return outputs


@pytest.mark.parametrize("output_stride", STAGES)
def test_resnet_equals_its_plain_composition(output_stride: int) -> None:
    backbone = ResNetV1c(50, output_stride=output_stride).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.running_mean, std=0.1)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours = backbone(images)
        theirs = plain_resnet(images, backbone.state_dict(), 50, output_stride)
    strides = (4, 8, min(output_stride, 16), output_stride)
    assert [tuple(f.shape) for f in ours] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(ResNetV1c.channels, strides, strict=True)
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(("depth", "expected"), [(50, 23_527_264), (101, 42_519_392)])
def test_resnet_parameters(depth: int, expected: int) -> None:
    """Without the classifier; the plain ResNets have 23,508,032 and 42,500,160, with a stem of
    9,408 + 128 where this one's has 28,768."""
    with torch.device("meta"):
        backbone = ResNetV1c(depth)
    assert sum(p.numel() for p in backbone.parameters()) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetV1c(18), "ResNetV1c: depth must be one of 50, 101; got 18"),
        (lambda: ResNetV1c(50, output_stride=4), "output_stride must be one of 8, 16, 32; got 4"),
        (lambda: ResNetV1c(50)(torch.zeros(1, 4, 8, 8)), r"images must have 3 channels; got shape"),
        (lambda: ResNetV1c(50)(torch.zeros(3, 8, 8)), r"images must have 4 dimensions"),
    ],
)
def test_resnet_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- Segmentor ----------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Two features, of strides 2 and 4, in whatever ``wrap`` makes of them."""

    def __init__(self, wrap: Callable[[list[Tensor]], Any] = list) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        x = self.first(images)
        return self.wrap([x, self.second(x)])


def segmentor(wrap: Callable[[list[Tensor]], Any] = list, **options: Any) -> Segmentor:
    decode = heads.UPerHead([4, 6], 8, 5, dropout=0.0, scale_equalizer=True)
    auxiliary = heads.FCNHead(4, 4, 5, num_convs=1, concat_input=False, dropout=0.0)
    return Segmentor(Backbone(wrap), decode, auxiliary, **options)


class Output(OrderedDict[str, Any]):
    """A mapping of more than feature maps, as transformers' outputs are."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__(feature_maps=tuple(maps), hidden_states=None)
        self.feature_maps = self["feature_maps"]


WRAPS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda maps: {str(i): m for i, m in enumerate(maps)},
    "OrderedDict": lambda maps: OrderedDict(zip("ab", maps, strict=True)),
    "feature_maps": lambda maps: SimpleNamespace(feature_maps=tuple(maps)),
    "mapping with feature_maps": Output,
}


def test_segmentor() -> None:
    model = segmentor(auxiliary_weight=0.25, ignore_index=4)
    assert {key.split(".")[0] for key in model.state_dict()} == {
        "backbone",
        "decode_head",
        "auxiliary_head",
    }
    images, targets = torch.randn(2, 3, 22, 18), torch.randint(5, (2, 22, 18))
    features = model.backbone(images)
    up = [
        F.interpolate(head(maps), size=(22, 18), mode="bilinear")
        for head, maps in ((model.decode_head, features), (model.auxiliary_head, features[:1]))
    ]
    expected = sum(
        weight * F.cross_entropy(logits, targets, ignore_index=4)
        for weight, logits in zip((1, 0.25), up, strict=True)
    )
    torch.testing.assert_close(model(images), up[0])
    torch.testing.assert_close(model.loss(images, targets), expected)
    model.loss(images, targets).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["PSPHead", "ASPPHead", "SepASPPHead", "FCNHead"])
def test_logits_are_upsampled_as_the_head_says(name: str) -> None:
    options = {"c1_in_channels": 4, "c1_channels": 4} if name == "SepASPPHead" else {}
    head = getattr(heads, name)(6, 8, 5, align_corners=True, **options)
    model = Segmentor(Backbone(), head).eval()
    images = torch.randn(1, 3, 14, 18)
    logits = head(model.backbone(images))
    expected = F.interpolate(logits, size=(14, 18), mode="bilinear", align_corners=True)
    torch.testing.assert_close(model(images), expected)


def test_predict_leaves_the_modes() -> None:
    model = segmentor()
    model.train()
    model.decode_head.bottleneck.eval()
    before = {name: module.training for name, module in model.named_modules()}
    images = torch.randn(1, 3, 16, 16)  # one image: batch statistics would fail
    labels = model.predict(images)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(labels, model.eval()(images).argmax(1))
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_backbones_return(wrap: str) -> None:
    images = torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    expected = segmentor().eval()(images)
    torch.manual_seed(0)
    assert torch.equal(segmentor(WRAPS[wrap]).eval()(images), expected)


def test_a_tensor_is_one_feature() -> None:
    x = torch.randn(1, 2, 3, 3)
    assert feature_maps(x)[0] is x


def imported(package: str) -> Any:
    """A package, or a skip: also where its own dependencies do not fit this torch."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"needs {package}: {reason}")


def test_timm_backbone() -> None:
    backbone = imported("timm").create_model("resnet10t", features_only=True, pretrained=False)
    head = heads.UPerHead(backbone.feature_info.channels(), 8, 5)
    assert Segmentor(backbone, head).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5, 64, 64)


def test_transformers_backbone() -> None:
    transformers = imported("transformers")
    config = transformers.ConvNextConfig(
        hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1], out_indices=[1, 2, 3, 4]
    )
    backbone = transformers.ConvNextBackbone(config)
    head = heads.UPerHead([4, 6, 8, 10], 8, 5)
    assert Segmentor(backbone, head).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5, 64, 64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: segmentor(lambda maps: 3)(torch.zeros(2, 3, 8, 8)),
            TypeError,
            "Segmentor: expected a sequence or mapping of tensors.*; got int",
        ),
        (
            lambda: segmentor(lambda maps: [])(torch.zeros(2, 3, 8, 8)),
            TypeError,
            "Segmentor: expected a sequence",
        ),
        (
            lambda: segmentor(auxiliary_index=2)(torch.zeros(2, 3, 8, 8)),
            ValueError,
            "Segmentor: auxiliary_index must be below the backbone's 2 features; got 2",
        ),
        (
            lambda: segmentor().predict(torch.zeros(2, 3, 8, 8), mode="half"),
            ValueError,
            "Segmentor: mode must be one of whole, slide; got 'half'",
        ),
        (
            lambda: segmentor().loss(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 7).long()),
            ValueError,
            r"Segmentor: targets must be int64 of shape \(2, 8, 8\); got int64 of shape \(2, 8, 7",
        ),
        (
            lambda: segmentor().loss(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8)),
            ValueError,
            "Segmentor: targets must be int64",
        ),
        (lambda: segmentor()(torch.zeros(3, 8, 8)), ValueError, "images must have 4 dimensions"),
    ],
)
def test_segmentor_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- checkpoints --------------------------------------------------------------------------------


def test_checkpoints_of_whole_models(tmp_path: Path) -> None:
    """As MMSegmentation writes them, by file and by dict; a backbone's or a head's part."""
    model, other = segmentor(), segmentor()
    path = tmp_path / "model.pth"
    torch.save({"meta": {"epoch": 3}, "state_dict": model.state_dict()}, path)
    load_checkpoint(other, path)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    backbone = Backbone()
    load_checkpoint(backbone, path, prefix="backbone.")
    assert torch.equal(backbone.first.weight, model.backbone.first.weight)
    load_checkpoint(backbone, {"model": Backbone().state_dict()})
    with pytest.raises(ValueError, match=r"no key starts with prefix 'neck.'; keys start with aux"):
        load_checkpoint(backbone, path, prefix="neck.")
    with pytest.raises(ValueError, match="checkpoint must hold a state dict"):
        load_checkpoint(backbone, {"epoch": 3})


def test_checkpoints_in_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = Backbone(), Backbone()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_checkpoint(other, tmp_path / "model.safetensors")
    assert torch.equal(other.second.weight, model.second.weight)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "value"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(fault: str) -> None:
    model = segmentor()
    before = copy.deepcopy(model.state_dict())
    state = segmentor().state_dict()
    key = "decode_head.bottleneck.conv.weight"
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        key = "decode_head.extra.weight"
        state[key] = torch.zeros(1)
    elif fault == "shape":
        state[key] = state[key][:1]
    else:
        key = "decode_head.bottleneck.equalizer.std"
        state[key] = torch.zeros_like(state[key])
    with pytest.raises(RuntimeError, match=key):
        load_checkpoint(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Versioned(nn.Module):
    """Doubles what older checkpoints have; keeps a state that is no tensor."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.extra: Any = "extra"

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if metadata.get("version") != 2:
            state[f"{prefix}w"] = 2 * state[f"{prefix}w"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_versions_of_modules_are_kept() -> None:
    model = nn.Sequential(Versioned())
    load_checkpoint(model, model.state_dict())
    load_checkpoint(model[0], model.state_dict(), prefix="0.")
    with pytest.raises(RuntimeError, match="unknown"):
        load_checkpoint(model, {**model.state_dict(), "unknown": torch.ones(1)})
    assert model[0].w.item() == 1
    assert model[0].extra == "extra"
    norm = nn.BatchNorm2d(2)
    state = norm.state_dict()
    del state["num_batches_tracked"]  # which older versions only may lack
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        load_checkpoint(norm, state)
    load_checkpoint(norm, dict(state))


def test_heads_without_equalizers_take_published_keys() -> None:
    """A checkpoint knows nothing of equalizers: a head that has them says which keys it misses."""
    plain, equalized = (
        heads.PSPHead(4, 4, 3, scale_equalizer=equalized) for equalized in (False, True)
    )
    with pytest.raises(RuntimeError, match=r"bottleneck\.equalizer\.mean"):
        load_checkpoint(equalized, plain.state_dict())
    assert isinstance(equalized.bottleneck, fastfuse.nn.MultiLevelFusion)
