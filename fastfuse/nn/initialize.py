"""The initial weights of backbones and heads."""

from __future__ import annotations

from torch import nn

__all__ = ["he_normal", "kaiming_linear"]


def he_normal(module: nn.Module) -> None:
    """He's normal distribution by fan-out for every convolution, as MMSegmentation has it."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


def kaiming_linear(module: nn.Module) -> None:
    """Kaiming's normal distribution by fan-out without a gain, biases zero, as CEDNet has it."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="linear")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
