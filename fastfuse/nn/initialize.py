"""The initial weights of backbones and heads."""

from __future__ import annotations

from torch import nn

__all__ = ["he_normal"]


def he_normal(module: nn.Module) -> None:
    """He's normal distribution by fan-out for every convolution, as MMSegmentation has it."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
