"""Modules and heads beside plain compositions of the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plain_blocks
import plain_cednet
import plain_heads
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse import heads
from fastfuse.nn import (
    CEDBlock,
    LRCEDBlock,
    MultiLevelFusion,
    ScaleEqualizer,
    SeparableFusion,
)

__all__ = ["MODELS", "Levels", "block", "plain_cednet", "results"]

Pair = tuple[nn.Module, nn.Module, list[Tensor]]


class PlainNorm(plain_cednet.Norm):
    """The oracle's layer norm, with an eps that can be changed."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.eps = plain_blocks.EPS

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        y = F.layer_norm(y, self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class Levels(nn.Module):
    """A module of several levels, called with one argument each."""

    def __init__(self, module: nn.Module, size: Sequence[int] | None = None) -> None:
        super().__init__()
        self.module, self.size = module, size

    def forward(self, *levels: Tensor) -> Tensor:
        return self.module(list(levels), *([] if self.size is None else [self.size]))


def prepared(ours: nn.Module, plain: nn.Module, inputs: list[Tensor]) -> Pair:
    """Both with the same parameters, of which every one does something; float64."""
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, ScaleEqualizer):
                module.set_statistics(
                    torch.randn(module.num_levels), torch.rand(module.num_levels) + 0.5
                )
    plain.load_state_dict(ours.state_dict())
    return ours.double().eval(), plain.double().eval(), [x.double() for x in inputs]


def block(long_range: bool) -> Pair:
    ours = (LRCEDBlock if long_range else CEDBlock)(6, layer_scale=0.7)
    plain = plain_cednet.Block(6, "linear", long_range, 0.7)
    for name in ("norm", "norm2") if long_range else ("norm",):
        setattr(plain, name, PlainNorm(6))
    return prepared(ours, plain, [torch.randn(2, 6, 9, 8)])


def fusion(separable: bool, equalized: bool, k: int = 3) -> Pair:
    channels = [4, 6, 3]
    if separable:
        ours: nn.Module = SeparableFusion(channels, 5, k, scale_equalizer=equalized)
        plain: nn.Module = plain_heads.SeparableFusion(channels, 5, equalized, False)
    else:
        ours = MultiLevelFusion(channels, 5, k, scale_equalizer=equalized)
        plain = plain_heads.Fusion(channels, 5, k, equalized, False)
    inputs = [torch.randn(2, c, 12 >> i, 8 >> i) for i, c in enumerate(channels)]
    return prepared(Levels(ours, (12, 8)), Levels(plain, (12, 8)), inputs)


def head(name: str, *arguments: Any, shapes: Sequence[tuple[int, ...]], **options: Any) -> Pair:
    options = {"scale_equalizer": True, "dropout": 0.0, **options}
    ours, plain = (
        Levels(make(*arguments, **options))
        for make in (getattr(heads, name), plain_heads.PLAIN[name])
    )
    return prepared(ours, plain, [torch.randn(2, *shape) for shape in shapes])


MODELS: dict[str, Callable[[], Pair]] = {
    "CEDBlock": lambda: block(False),
    "LRCEDBlock": lambda: block(True),
    "MultiLevelFusion": lambda: fusion(False, False),
    "MultiLevelFusion, equalized": lambda: fusion(False, True),
    "MultiLevelFusion, 1x1": lambda: fusion(False, True, 1),
    "SeparableFusion": lambda: fusion(True, True),
    "UPerHead": lambda: head("UPerHead", [4, 6], 4, 3, shapes=[(4, 12, 8), (6, 6, 4)]),
    "PSPHead": lambda: head("PSPHead", 6, 4, 3, shapes=[(6, 8, 6)]),
    "ASPPHead": lambda: head("ASPPHead", 6, 4, 3, dilations=(1, 2), shapes=[(6, 8, 6)]),
    "SegformerHead": lambda: head(
        "SegformerHead", [4, 6, 3], 4, 3, shapes=[(4, 8, 6), (6, 4, 4), (3, 2, 3)]
    ),
    "SepASPPHead": lambda: head(
        "SepASPPHead", 6, 4, 3, dilations=(1, 2), c1_in_channels=4, c1_channels=3,
        shapes=[(4, 12, 8), (6, 6, 4)],
    ),
    "FCNHead": lambda: head("FCNHead", 6, 4, 3, shapes=[(6, 8, 6)]),
}  # fmt: skip


def results(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of inputs and parameters, of a second step as of a first."""
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        model.zero_grad()
        output = model(*leaves)
        cotangent = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device)
        output.backward(cotangent.view(output.shape))
    found = {"output": output.detach()}
    found |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
