"""The initial weights of backbones and heads: Kaiming's normal distribution."""

from __future__ import annotations

from torch import nn

__all__ = ["kaiming_normal_linear", "kaiming_normal_relu"]


def kaiming_normal_relu(module: nn.Module) -> None:
    """By fan-out with the gain of ReLU for every convolution, as MMSegmentation has it."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


def kaiming_normal_linear(module: nn.Module) -> None:
    """By fan-out without a gain, biases zero, as CEDNet has it."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="linear")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
