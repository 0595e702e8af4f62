"""What a run is: whoever has the same configuration, data and thread count has the same weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from examples.camvid.models import BACKBONES, HEADS, MULTI_LEVEL

__all__ = ["DIVISOR", "DTYPES", "EQUALIZERS", "PIPELINES", "PRESETS", "Config", "differences"]

_LIMIT = 1 << 31  # of numbers
_MAX_LR = 100.0
DIVISOR = 32  # the coarsest stride of the backbones
EQUALIZERS = ("none", "module", "fold")
PIPELINES = ("fused", "plain")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Defaults, and what --quick makes of them: a small network, half the size, few epochs.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {
        "backbone": "cednet-nano",
        "channels": 64,
        "size": (180, 240),
        "crop": (96, 128),
        "batch": 4,
        "epochs": 12,
    },
}


@dataclass(frozen=True)
class Config:
    """All that decides about the weights, but data, threads and processes.

    Attributes:
        head, backbone: names of ``examples.camvid.models``.
        scale_equalizer: "none"; "module": calibrated before training and kept; "fold": calibrated,
            then folded into the initial weights, the paper's auxiliary initializer.
        pipeline: "fused", or "plain": PyTorch's own operations, full-size logits and all.
        dtype: float32, or bfloat16 by autocast.
        epochs: passes over the training images.
        batch: images of a step and process, at least 2: pooled branches are normalized over it.
        size: (height, width) that images are resized to.
        crop: (height, width) of the random crops, multiples of 32.
        channels: of the head.
        output_stride: of ResNets; 0: 32 for heads that read all levels, else 8.
        lr: the largest; 0: the backbone's.
        seed: of weights, order, augmentation and dropout.

    Raises:
        ValueError: an argument out of its range, named.

    >>> Config(backbone="resnet", crop=(96, 100))
    Traceback (most recent call last):
    ValueError: camvid: --crop must be multiples of 32; got (96, 100)
    """

    head: str = "uper"
    backbone: str = "resnet"
    scale_equalizer: str = "none"
    pipeline: str = "fused"
    dtype: str = "float32"
    epochs: int = 100
    batch: int = 8
    size: tuple[int, int] = (360, 480)
    crop: tuple[int, int] = (288, 384)
    channels: int = 512
    output_stride: int = 0
    lr: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, Any] = {
            "head": HEADS,
            "backbone": BACKBONES,
            "scale_equalizer": EQUALIZERS,
            "pipeline": PIPELINES,
            "dtype": DTYPES,
        }
        for name, allowed in choices.items():
            _require(name, getattr(self, name), "one of " + ", ".join(allowed), allowed)
        for name, least in (("epochs", 1), ("batch", 2), ("channels", 1), ("seed", 0)):
            value = getattr(self, name)
            _require(name, value, f"at least {least}", (value,) if value >= least else ())
            _require(name, value, "below 2^31", (value,) if value < _LIMIT else ())
        for name in ("size", "crop"):
            value = getattr(self, name)
            _require(name, value, "positive", (value,) if min(value) > 0 else ())
        whole = all(n % DIVISOR == 0 for n in self.crop)
        _require("crop", self.crop, f"multiples of {DIVISOR}", (self.crop,) if whole else ())
        fits = all(c <= s for c, s in zip(self.crop, self.size, strict=True))
        _require("crop", self.crop, f"at most --size {self.size}", (self.crop,) if fits else ())
        if not BACKBONES[self.backbone].dilated:
            fixed = f"left out, for {self.backbone}'s is fixed"
            _require("output_stride", self.output_stride, fixed, (0,))
        allowed_strides = (0, 8, 16, 32)
        _require("output_stride", self.output_stride, "one of 8, 16, 32", allowed_strides)
        _require("lr", self.lr, "positive", (self.lr,) if self.lr >= 0 else ())
        small = self.lr <= _MAX_LR
        _require("lr", self.lr, f"at most {_MAX_LR:g}", (self.lr,) if small else ())
        if not self.output_stride and BACKBONES[self.backbone].dilated:
            stride = 32 if self.head in MULTI_LEVEL else 8
            object.__setattr__(self, "output_stride", stride)
        if not self.lr:
            object.__setattr__(self, "lr", BACKBONES[self.backbone].lr)

    def identity(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not the same, as "head: psp, not uper".

    >>> differences({"head": "psp", "seed": 0}, {"head": "uper", "seed": 0})
    ['head: psp, not uper']
    """
    return [
        f"{key}: {found.get(key)}, not {expected.get(key)}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]


def _require(name: str, value: Any, expected: str, allowed: Any) -> None:
    if value not in allowed:
        option = "--" + name.replace("_", "-")
        raise ValueError(f"camvid: {option} must be {expected}; got {value}")
