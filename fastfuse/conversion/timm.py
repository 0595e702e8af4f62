"""timm: ConvNeXt's blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastfuse.conversion.parts import are_untouched, as_convnext_block
from fastfuse.conversion.pattern import register_pattern


def _check(block: Any) -> str | None:
    if block.use_conv_mlp:
        return "has a convolutional MLP"
    if type(block.shortcut) is not nn.Identity:
        return "has a shortcut of its own"
    if type(block.mlp).__name__ != "Mlp" or type(block.mlp.norm) is not nn.Identity:
        return f"has a {type(block.mlp).__name__} with more between its layers"
    return None


def _is_idle(dropout: Any) -> bool:
    return type(dropout) is nn.Dropout and (dropout.p == 0 or not dropout.training)


@register_pattern("timm.models.convnext:ConvNeXtBlock", check=_check)
def convnext_block(self: Any, x: Tensor) -> Tensor:
    mlp = self.mlp
    idle = are_untouched(self.shortcut, mlp, mlp.drop1, mlp.norm, mlp.drop2)
    if idle and _is_idle(mlp.drop1) and _is_idle(mlp.drop2):
        out = as_convnext_block(
            x, self.conv_dw, self.norm, mlp.fc1, mlp.act, mlp.fc2, self.gamma, self.drop_path
        )  # fmt: skip
        if out is not None:
            return out
    return type(self).forward(self, x)
