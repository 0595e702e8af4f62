"""upsample_equalize_concat under autocast and torch.compile, with floats, and its FLOPs."""

from __future__ import annotations

import torch
from inputs import images, pyramid
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, upsample_equalize_concat


def test_compile_with_floats_and_a_backend_inside() -> None:
    @torch.compile(fullgraph=True)
    def step(features: list[Tensor]) -> Tensor:
        with backend("cpu"):
            return upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])

    features = pyramid()
    expected = upsample_equalize_concat(features, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    torch.testing.assert_close(step(features), expected)


def test_autocast_casts_features_only(any_backend: str) -> None:
    """bfloat16 in and out; mean and std keep their digits."""
    features = [f.requires_grad_() for f in pyramid()]
    mean = torch.tensor([1.00390625, 0.0, 0.0])  # 1 + 2^-8: 1 in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = upsample_equalize_concat(features, mean=mean)
        mixed = upsample_equalize_concat([features[0], features[1].bfloat16()])
        wide = upsample_equalize_concat([features[0].double()])
    assert output.dtype == torch.bfloat16
    assert mixed.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    halves = [f.detach().bfloat16() for f in features]
    with torch.no_grad():
        assert torch.equal(output, upsample_equalize_concat(halves, mean=mean))
    output.float().sum().backward()
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in features)


def test_flop_formula() -> None:
    p2, p3 = images((2, 4, 8, 8), (2, 6, 4, 4))
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2, p3])
    # x: 4 rows of 8 values, y: 8 rows of 8 values, a multiply-add per weight, 2 weights
    assert counter.get_total_flops() == 2 * 6 * 4 * (4 * 8 + 8 * 8)
    with FlopCounterMode(display=False) as counter:
        upsample_equalize_concat([p2.requires_grad_(), p3], std=[1.0, 2.0]).sum().backward()
    forward = 2 * (4 * 2 * 64 + 6 * (2 * 16 + 4 * 96))
    assert counter.get_total_flops() == forward + 2 * 4 * 2 * 64


def test_compile_with_dynamic_sizes_and_floats() -> None:
    """The target's size and the constants may be inputs of the graph."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x: Tensor, like: Tensor, scale: float) -> Tensor:
        return upsample_equalize_concat([x], size=like.shape[2:], std=[scale])

    for height, scale in ((8, 0.5), (12, 0.25), (20, 2.0)):
        x, like = images((2, 3, 4, 6), (2, 1, height, 9))
        expected = upsample_equalize_concat([x], size=(height, 9), std=[scale])
        torch.testing.assert_close(step(x, like, scale), expected)
