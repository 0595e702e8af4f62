"""Every pattern of another library: the same results, and the children are called as before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from same_results import assert_same_results, randomized
from torch import Tensor, nn

import fastfuse

CHANNELS = (3, 8, 16, 24, 32, 40)
Case = tuple[nn.Module, tuple[Any, ...], str]  # a model, its arguments, what is converted


def pyramid(size: tuple[int, int], channels: tuple[int, ...] = CHANNELS) -> list[Tensor]:
    """Features of an encoder, each half as large as the one before, rounded up."""
    height, width = size
    return [
        torch.randn(2, c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate(channels)
    ]


# ---- segmentation_models_pytorch ----


def smp_decoder(name: str, size: tuple[int, int], **options: Any) -> Case:
    pytest.importorskip("segmentation_models_pytorch")
    from segmentation_models_pytorch.decoders import deeplabv3, fpn, pspnet, upernet

    features: list[Tensor] = pyramid(size)
    if name == "upernet":
        decoder = upernet.decoder.UPerNetDecoder(CHANNELS, decoder_channels=16)
    elif name == "pspnet":
        decoder = pspnet.decoder.PSPDecoder(CHANNELS, out_channels=16, **options)
    elif name == "fpn":
        decoder = fpn.decoder.FPNDecoder(
            list(CHANNELS), pyramid_channels=16, segmentation_channels=32, **options
        )
    elif name == "deeplabv3":
        decoder = deeplabv3.decoder.DeepLabV3Decoder(40, 16, (2, 4, 6), aspp_dropout=0.2, **options)
        return decoder, (features,), "aspp"
    else:
        decoder = deeplabv3.decoder.DeepLabV3PlusDecoder(
            CHANNELS, 5, 16, (2, 4, 6), 16, aspp_dropout=0.2, **options
        )
        features[-1] = torch.randn(2, 40, *(-(-s // 16) for s in size))
    return decoder, (features,), ""


SMP: dict[str, Callable[[], Case]] = {
    "smp UPerNet": lambda: smp_decoder("upernet", (64, 96)),
    "smp UPerNet, odd": lambda: smp_decoder("upernet", (77, 101)),
    "smp PSPNet": lambda: smp_decoder("pspnet", (77, 101)),
    "smp PSPNet, no norm": lambda: smp_decoder("pspnet", (64, 64), use_norm=False),
    "smp DeepLabV3": lambda: smp_decoder("deeplabv3", (205, 333), aspp_separable=False),
    "smp DeepLabV3, separable": lambda: smp_decoder("deeplabv3", (205, 333), aspp_separable=True),
    "smp DeepLabV3+": lambda: smp_decoder("deeplabv3+", (96, 160), aspp_separable=True),
    "smp DeepLabV3+, dense": lambda: smp_decoder("deeplabv3+", (96, 160), aspp_separable=False),
    "smp FPN": lambda: smp_decoder("fpn", (64, 96)),
    "smp FPN, concatenated": lambda: smp_decoder("fpn", (64, 96), merge_policy="cat"),
    "smp FPN, bilinear": lambda: smp_decoder("fpn", (64, 96), interpolation_mode="bilinear"),
}


def smp_model(name: str) -> Case:
    smp = pytest.importorskip("segmentation_models_pytorch")
    kind = getattr(smp, name)
    model = kind("resnet18", encoder_weights=None, classes=5)
    return model, (torch.randn(2, 3, 64, 96),), "decoder" if name != "DeepLabV3" else "decoder.aspp"


for _name in ("UPerNet", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "FPN"):
    SMP[f"smp {_name}, whole"] = lambda name=_name: smp_model(name)  # type: ignore[misc]


# ---- torchvision ----


def torchvision_aspp() -> Case:
    pytest.importorskip("torchvision")
    from torchvision.models.segmentation.deeplabv3 import ASPP

    return ASPP(24, (2, 4), out_channels=16), (torch.randn(2, 24, 17, 23),), ""


def torchvision_convnext() -> Case:
    pytest.importorskip("torchvision")
    from torchvision.models.convnext import CNBlock

    return CNBlock(16, 0.5, 0.5), (torch.randn(4, 16, 9, 11),), ""


def torchvision_model() -> Case:
    """Its parts are as small as they get: the pattern is the last step."""
    pytest.importorskip("torchvision")
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
    from torchvision.models.segmentation.fcn import FCNHead

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 24, 3, stride=4, padding=1)
            self.rest = nn.Conv2d(24, 32, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.stem(x)
            return {"aux": x, "out": self.rest(x)}

    model = DeepLabV3(Backbone(), DeepLabHead(32, 5), FCNHead(24, 5))
    return model, (torch.randn(2, 3, 65, 91),), ""


TORCHVISION: dict[str, Callable[[], Case]] = {
    "torchvision ASPP": torchvision_aspp,
    "torchvision ConvNeXt": torchvision_convnext,
    "torchvision DeepLabV3, FCN": torchvision_model,
}


# ---- MMSegmentation ----


def heads_of_mmseg() -> Any:
    class Extension(ModuleType):
        """Stands for the compiled operators, which the heads do not call."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **kwargs: None

    pytest.importorskip("mmcv")
    if "mmcv._ext" not in sys.modules:
        sys.modules["mmcv._ext"] = Extension("mmcv._ext")
    pytest.importorskip("mmseg", exc_type=ImportError)
    from mmseg.models import decode_heads

    return decode_heads


def mmseg_head(name: str, *, separate: bool = False, **options: Any) -> Case:
    heads = heads_of_mmseg()
    channels = (8, 16, 24, 32)
    given = {"channels": 16, "num_classes": 5, "norm_cfg": {"type": "BN"}, **options}
    if name == "UPerHead":
        given |= {"in_channels": channels, "in_index": (0, 1, 2, 3)}
    elif "input_transform" not in given:
        given |= {"in_channels": 32, "in_index": 3}
    return getattr(heads, name)(**given), (pyramid((57, 83), channels),), ""


_HRNET = {"input_transform": "resize_concat", "in_channels": (8, 16, 24, 32)}
_HRNET |= {"in_index": (0, 1, 2, 3)}
MMSEG: dict[str, Callable[[], Case]] = {
    "mmseg UPerHead": lambda: mmseg_head("UPerHead"),
    "mmseg UPerHead, corners": lambda: mmseg_head("UPerHead", align_corners=True),
    "mmseg UPerHead, no norm": lambda: mmseg_head("UPerHead", norm_cfg=None, act_cfg=None),
    "mmseg PSPHead": lambda: mmseg_head("PSPHead"),
    "mmseg PSPHead, corners": lambda: mmseg_head("PSPHead", align_corners=True),
    "mmseg ASPPHead": lambda: mmseg_head("ASPPHead", dilations=(1, 2, 3)),
    "mmseg DepthwiseSeparableASPPHead": lambda: mmseg_head(
        "DepthwiseSeparableASPPHead", dilations=(1, 2, 3), c1_in_channels=8, c1_channels=4
    ),
    "mmseg DepthwiseSeparableASPPHead, corners": lambda: mmseg_head(
        "DepthwiseSeparableASPPHead", c1_in_channels=8, c1_channels=4, align_corners=True
    ),
    "mmseg DepthwiseSeparableASPPHead, one level": lambda: mmseg_head(
        "DepthwiseSeparableASPPHead", c1_in_channels=0, c1_channels=0
    ),
    "mmseg FCNHead of HRNet": lambda: mmseg_head(
        "FCNHead", num_convs=1, kernel_size=1, concat_input=False, **_HRNET
    ),
    "mmseg FCNHead, concatenated": lambda: mmseg_head("FCNHead", align_corners=True, **_HRNET),
}

CASES = {**SMP, **TORCHVISION, **MMSEG}


@pytest.mark.parametrize("name", CASES)
def test_results_gradients_and_statistics(name: str) -> None:
    torch.manual_seed(0)
    model, args, converted = CASES[name]()
    is_deep = name.endswith("whole")
    assert_same_results(randomized(model), *args, converted=converted, is_deep=is_deep)


def interpolations(model: nn.Module, args: tuple[Any, ...]) -> int:
    with torch.no_grad(), fastfuse.backend("cpu"), torch.profiler.profile() as profile:
        model(*args)
    return sum(event.name == "aten::upsample_bilinear2d" for event in profile.events())


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"torchvision ConvNeXt"}))
def test_no_level_is_interpolated(name: str) -> None:
    model, args, _ = CASES[name]()
    model.eval()
    assert interpolations(model, args) > 0
    fastfuse.convert(model)
    assert interpolations(model, args) == 0


@pytest.mark.parametrize("name", [name for name in CASES if "whole" not in name])
def test_every_module_is_called_where_it_has_hooks(name: str) -> None:
    """Of every module in turn: one that is called is called once, and its hook's result counts."""
    torch.manual_seed(0)
    model, args, _ = CASES[name]()
    randomized(model).eval()
    names = [n for n, _ in model.named_modules() if "encoder" not in n]
    for hooked in names:
        module = model.get_submodule(hooked)
        calls: list[int] = []

        def double(module: nn.Module, args: Any, out: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            if isinstance(out, Tensor):
                return 2 * out
            if isinstance(out, dict):
                return {key: 2 * value for key, value in out.items()}
            return [2 * value for value in out]

        handle = module.register_forward_hook(double)
        with torch.no_grad():
            expected = model(*args)
            count = len(calls)
            fastfuse.convert(model)
            got = model(*args)
        fastfuse.revert(model)
        handle.remove()
        assert len(calls) == 2 * count, hooked
        scale = max(1.0, *(float(t.abs().max()) for t in _flat(expected)))
        for a, b in zip(_flat(got), _flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * scale, msg=hooked)


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.values())


def test_subclasses_with_another_method_are_left() -> None:
    heads = heads_of_mmseg()

    class Own(heads.PSPHead):  # type: ignore[misc, name-defined]
        def _forward_feature(self, inputs: Any) -> Tensor:
            return 2 * super()._forward_feature(inputs)

    given: Any = {"channels": 8, "num_classes": 5, "norm_cfg": {"type": "BN"}}
    head = Own(in_channels=8, in_index=-1, **given)
    left = fastfuse.convert(head).left
    assert left[""] == f"is a {Own.__qualname__}, with a _forward_feature of its own"
    separable = mmseg_head("DepthwiseSeparableASPPHead", c1_in_channels=8, c1_channels=4)[0]
    assert fastfuse.convert(separable).found[0].target.endswith(":DepthwiseSeparableASPPHead")
    plain = mmseg_head("FCNHead")[0]
    assert "reads one level" in fastfuse.convert(plain).left[""]


def test_nearest_upsampling_is_left() -> None:
    ops = pytest.importorskip("torchvision.ops")
    model = ops.FeaturePyramidNetwork([8, 16], 8)
    assert "nearest" in fastfuse.convert(model).left[""]


@pytest.mark.parametrize(
    ("up", "is_known"),
    [
        (nn.Upsample(scale_factor=4, mode="bilinear", align_corners=True), True),
        (nn.UpsamplingBilinear2d(scale_factor=2), True),
        (nn.Upsample(size=(9, 31), mode="bilinear"), True),
        (nn.Upsample(size=40, mode="bilinear"), True),
        (nn.Upsample(scale_factor=1.5, mode="bilinear"), False),
        (nn.Upsample(scale_factor=(2.0, 3.0), mode="bilinear"), False),
        (nn.Upsample(scale_factor=2), False),
    ],
    ids=str,
)
def test_upsampling(up: nn.Upsample, is_known: bool) -> None:
    report = assert_same_results(up, torch.randn(2, 5, 7, 11))
    assert bool(report.converted) == is_known


def test_a_unit_whose_forward_was_replaced_is_called() -> None:
    model, args, _ = mmseg_head("PSPHead")
    model.eval()
    unit = model.bottleneck
    before = unit.forward
    unit.forward = lambda x: before(x) * 2
    expected = model(*args)
    fastfuse.convert(model)
    torch.testing.assert_close(model(*args), expected, rtol=1e-4, atol=1e-5)
