"""Small segmentation models for the tests of calibration, folding and reports."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.calibration.images import ImageFolder
from fastfuse.nn import ConvUnit, MultiLevelFusion, ScaleEqualizer, SeparableFusion
from fastfuse.ops.bilinear import interpolate_exactly

POOLING, TOP_DOWN, DETAIL = (
    f"decode_head.{name}.equalizer" for name in ("bottleneck", "fpn_bottleneck", "detail")
)


def camvid() -> Path:
    """The training images of CamVid, or the test is skipped."""
    default = Path(__file__).resolve().parents[3] / "shared" / "camvid"
    folder = Path(os.environ.get("FASTFUSE_CAMVID", default)) / "train"
    if not folder.is_dir():
        pytest.skip(f"needs CamVid at {folder} (FASTFUSE_CAMVID names its folder)")
    return folder


def camvid_batches(count: int, batch_size: int = 3) -> list[Tensor]:
    return list(islice(ImageFolder(camvid(), batch_size, size=(60, 90)), count))


def random_batches(count: int = 2, batch_size: int = 2, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch_size, 3, size, size, generator=generator) for _ in range(count)]


class Backbone(nn.Module):
    """Levels of 8, 12 and 16 channels at 1/2, 1/4 and 1/8."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 8, 12, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in pairwise(channels)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels


class Head(nn.Module):
    """Pyramid pooling into a top-down fusion into a separable one."""

    def __init__(self, norm: Any = nn.BatchNorm2d, **options: Any) -> None:
        super().__init__()
        options["norm"] = norm
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvUnit(16, 4, 1, norm=norm))
            for scale in (1, 2, 3)
        )
        self.bottleneck = MultiLevelFusion([16, 4, 4, 4], 8, **options)
        self.fpn_bottleneck = MultiLevelFusion([8, 12, 8], 8, **options)
        self.detail = SeparableFusion([8, 8], 8, **options)
        self.dropout = nn.Dropout2d(0.5)
        self.conv_seg = nn.Conv2d(8, 5, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        top = self.bottleneck([levels[2], *(pool(levels[2]) for pool in self.pools)])
        fused = self.fpn_bottleneck([*levels[:2], top])
        detail = self.detail([F.avg_pool2d(fused, 2), levels[0]], size=levels[0].shape[2:])
        return self.conv_seg(self.dropout(detail))


class Model(nn.Module):
    def __init__(self, scale_equalizer: bool = True, **options: Any) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.decode_head = Head(scale_equalizer=scale_equalizer, **options)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode_head(self.backbone(images))


class Pair(nn.Module):
    """One fusion of the images and of their average over 4 x 4 pixels; no encoder."""

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, images: Tensor) -> Tensor:
        return self.fusion([images, F.avg_pool2d(images, 4)])


class Bare(nn.Module):
    """An equalizer that no fusion owns."""

    def __init__(self) -> None:
        super().__init__()
        self.equalizer = ScaleEqualizer(2)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.equalizer([images, 3 * images + 1]), 1)


def plain() -> nn.Module:
    """A factory for the command line."""
    torch.manual_seed(0)
    return Model(scale_equalizer=False)


def equalized() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that must come back bit for bit."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }
    identity = [id(t) for t in (*model.parameters(), *model.buffers())]
    return {"tensors": tensors, "modes": modes, "hooks": hooks, "identity": identity}


def assert_same_state(model: nn.Module, before: dict[str, Any], *, but: str = "\0") -> None:
    after = state(model)
    for key in ("modes", "hooks", "identity"):
        assert after[key] == before[key]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        if but not in name:
            assert torch.equal(after["tensors"][name], tensor), name


def levels_seen(model: nn.Module, batches: list[Tensor]) -> Iterator[tuple[str, int, list[Tensor]]]:
    """Fusion, level and that level upsampled in float64 for every batch: plainly, as an oracle.

    The head's BatchNorm on batch statistics, all else in evaluation mode. On a copy.
    """
    model = copy.deepcopy(model).eval()
    for module in model.decode_head.modules():
        module.train(isinstance(module, nn.BatchNorm2d))
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            features = args[0]
            largest = [max(f.shape[dim] for f in features) for dim in (2, 3)]
            size = tuple(kwargs.get("size") or largest)
            for i, f in enumerate(features):
                up = interpolate_exactly(f, size, align_corners=module.align_corners)
                mean, std = (0.0, 1.0)
                if module.equalizer is not None:
                    mean, std = module.equalizer.mean[i].item(), module.equalizer.std[i].item()
                seen.setdefault((name, i), []).append((up - mean) / std)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (MultiLevelFusion, SeparableFusion)):
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for (name, level), tensors in seen.items():
        yield name, level, tensors


def two_pass(tensors: list[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation, every image of weight 1."""
    images = [image for batch in tensors for image in batch]
    mean = sum(image.mean().item() for image in images) / len(images)
    variance = sum((image - mean).square().mean().item() for image in images) / len(images)
    return mean, variance**0.5
