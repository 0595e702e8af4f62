"""depthwise_conv2d in PyTorch's machinery."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import depthwise_conv2d


def inputs(dtype: torch.dtype = torch.float32, channels: int = 6, k: int = 5) -> list[Tensor]:
    shapes = ((2, channels, 9, 8), (channels, 1, k, k), (channels,))
    return [torch.randn(s).to(dtype) for s in shapes]


def test_autocast_casts_everything(any_backend: str) -> None:
    x, weight, bias = leaves = [t.requires_grad_() for t in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = depthwise_conv2d(x, weight, bias)
        mixed = depthwise_conv2d(x.bfloat16(), weight, bias.bfloat16())
        without_bias = depthwise_conv2d(x, weight)
        double = depthwise_conv2d(*(t.double() for t in leaves))
    assert output.dtype == mixed.dtype == without_bias.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    with torch.no_grad():
        expected = depthwise_conv2d(*(t.bfloat16() for t in leaves))
    assert torch.equal(output, expected)
    assert torch.equal(mixed, expected)
    for gradient in torch.autograd.grad(output.float().sum(), leaves):
        assert gradient.dtype == torch.float32


def test_flop_formula() -> None:
    x, weight, bias = inputs()
    once = (
        2 * 25 * 2 * 6 * 9 * 8
    )  # a multiply-add for each tap of each value, as if none is outside
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight, bias, dilation=2)
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight.requires_grad_(), bias.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 2 * once
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x.requires_grad_(), weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * once


def test_a_changed_input_is_noticed() -> None:
    """x is kept for backward: PyTorch refuses to go back through what was overwritten."""
    x, weight, _ = inputs()
    output = depthwise_conv2d(x, weight.requires_grad_())
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
