"""Small CEDNets, and what their tests share."""

from __future__ import annotations

from typing import Any

import plain_cednet
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastfuse.models import CEDNet
from fastfuse.models.cednet_settings import STYLES
from fastfuse.tolerances import relative_error

__all__ = [
    "SMALL",
    "assert_alike",
    "cednet",
    "count",
    "every_style",
    "plain_cednet",
    "randomized",
    "results",
]

SMALL: dict[str, Any] = {"channels": (8, 12, 16, 20), "depths": (1, 2, 3, 2), "stages": 2}

every_style = pytest.mark.parametrize("style", STYLES)


def randomized(model: nn.Module) -> Any:
    """Norms, biases and layer scales that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                center = 0.0 if name.endswith("bias") else 0.8
                parameter.copy_(center + 0.3 * torch.randn(parameter.shape))
    return model


def cednet(style: str = "fpn", **options: Any) -> CEDNet:
    return randomized(CEDNet("tiny", style, **{**SMALL, **options}))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def results(model: Any, *inputs: Any) -> dict[str, Tensor]:
    """All outputs, and the gradients of every input and every parameter."""
    inputs = tuple(torch.utils._pytree.tree_map(_leaf, x) for x in inputs)
    outputs = tree_leaves(model(*inputs))
    for parameter in model.parameters():
        parameter.grad = None
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs
    ]
    torch.autograd.backward(outputs, cotangents)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    found |= {f"input {i}": x.grad for i, x in enumerate(tree_leaves(inputs))}
    return found | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], most: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(found[key], value) <= most, key
