"""Where each level is convolved: at its own resolution, or at the target's after upsampling.

A static rule, by counted work, in multiply-adds (MACs) of a large matrix product:

- at its own resolution a level of h x w pixels costs ``k * k * h * w * C_out * C_in``, and as much
  as ``tap_macs`` more per tap value, written and read once, and per value of the result, which
  ``tap_sum`` computes from the taps, ``sum_macs`` and ``sum_tap_macs`` for each of k * k taps;
- at the target's resolution it costs ``m * H * W * C_out * C_in``, m = k * k, or ``winograd_macs``
  where a 3x3 convolution runs by Winograd's F(4x4, 3x3) (2.25, and its transforms), and
  ``upsample_macs`` per upsampled value if it has another size.

The constants are the policy's, by dtype; results do not hang on their digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastfuse.ops.costs import FusionCosts
from fastfuse.ops.fusion_conv2d import cudnn, winograd
from fastfuse.ops.fusion_conv2d.shape import FusionShape
from fastfuse.ops.policy import policy_of

__all__ = ["Plan", "make_plan", "plan_of"]


@dataclass(frozen=True)
class Plan:
    """Indices of the levels convolved at the target's resolution, and at their own.

    A level without channels is in neither.
    """

    target: tuple[int, ...]
    own: tuple[int, ...]
    winograd: bool = False  # what is convolved at the target's resolution, is by that algorithm


def make_plan(
    channels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    out_channels: int,
    target: tuple[int, int],
    kernel_size: int,
    winograd: bool,
    winograd_macs: float,
    costs: FusionCosts,
) -> Plan:
    """The plan for levels of ``channels`` and ``sizes``, fused at the size ``target``."""
    taps, pixels = kernel_size**2, target[0] * target[1]
    per_pixel = winograd_macs if winograd else taps
    per_sum = costs.sum_macs + taps * costs.sum_tap_macs
    at_target: list[int] = []
    at_own: list[int] = []
    for i, (c, size) in enumerate(zip(channels, sizes, strict=True)):
        if c == 0:
            continue
        if tuple(size) == tuple(target):
            at_target.append(i)
            continue
        own = taps * size[0] * size[1] * (c + costs.tap_macs) + pixels * per_sum
        upsampled = pixels * (per_pixel * c + costs.upsample_macs * c / max(out_channels, 1))
        (at_own if own < upsampled else at_target).append(i)
    return Plan(tuple(at_target), tuple(at_own))


def plan_of(shape: FusionShape, like: Tensor) -> Plan:
    """The plan for tensors like one."""
    device = like.device.type
    policy = policy_of(device)
    costs = policy.fusion_costs[like.dtype]
    if policy.tf32_costs is not None and like.dtype == torch.float32 and cudnn.allows_tf32():
        costs = policy.tf32_costs

    def plan(fewer_products: bool) -> Plan:
        return make_plan(
            shape.channels, shape.sizes, shape.out_channels, shape.size, shape.kernel_size,
            fewer_products, policy.winograd_macs, costs,
        )  # fmt: skip

    chosen = plan(True)
    inputs = sum(shape.channels[i] for i in chosen.target)
    if winograd.applies(
        device, like.dtype, inputs, shape.out_channels, shape.out_pixels, shape.kernel_size,
        shape.padding,
    ):  # fmt: skip
        return replace(chosen, winograd=True)
    return plan(False)
