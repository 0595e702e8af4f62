"""fusion_conv2d's plan: which levels are convolved at their own resolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_like import cuda_like

from fastfuse.backends import DTYPES
from fastfuse.ops.costs import CPU_COSTS, GPU_COSTS, GPU_TF32_COSTS
from fastfuse.ops.fusion_conv2d.plan import Plan, plan_of
from fastfuse.ops.fusion_conv2d.plan import make_plan as make_plan_by
from fastfuse.ops.fusion_conv2d.shape import FusionShape
from fastfuse.ops.policy import CPU_CLASSES, Machine, cpu_policy, policy_of

COSTS = [CPU_COSTS, GPU_TF32_COSTS, *GPU_COSTS.values()]


def make_plan(*arguments: Any) -> Plan:
    """The plan, which on every kind of machine and in every dtype is this one; Winograd's algorithm
    runs on CPUs."""
    winograd = arguments[-1]
    (plan,) = {
        make_plan_by(*arguments, 2.5, costs) for costs in ([CPU_COSTS] if winograd else COSTS)
    }
    return plan


def test_costs_of_every_machine() -> None:
    policies = [cpu_policy(Machine(isa=isa)) for isa in CPU_CLASSES]
    assert all(policy.fusion_costs[dtype] is CPU_COSTS for policy in policies for dtype in DTYPES)
    assert all(policy.winograd_macs == 2.5 for policy in policies)
    assert policy_of("cuda").fusion_costs is GPU_COSTS


# Winograd's rule is for 3x3.
every_rule = pytest.mark.parametrize(
    ("k", "winograd"), [(1, False), (3, False), (3, True), (5, False)]
)
both_rules = pytest.mark.parametrize("winograd", [False, True], ids=["direct", "winograd"])


@every_rule
@pytest.mark.parametrize("channels", [1, 64, 2048])
def test_a_level_of_the_targets_size(channels: int, k: int, winograd: bool) -> None:
    assert make_plan([channels], [(32, 48)], 512, (32, 48), k, winograd) == Plan((0,), ())


@every_rule
@pytest.mark.parametrize("size", [(64, 96), (33, 49), (128, 48), (256, 256)])
def test_a_level_larger_than_the_target(size: tuple[int, int], k: int, winograd: bool) -> None:
    assert make_plan([256], [size], 512, (32, 48), k, winograd) == Plan((0,), ())


@both_rules
@pytest.mark.parametrize("target", [(128, 128), (128, 256), (64, 64)])
def test_upernets_levels(target: tuple[int, int], winograd: bool) -> None:
    sizes = [(target[0] >> i, target[1] >> i) for i in range(4)]
    plan = make_plan([512] * 4, sizes, 512, target, 3, winograd)
    assert plan == Plan((0,), (1, 2, 3))


@both_rules
@pytest.mark.parametrize("channels", [2048, 512])
def test_psps_levels(channels: int, winograd: bool) -> None:
    """The features and their averages over 1, 2, 3 and 6 cells a side."""
    sizes = [(64, 64), (1, 1), (2, 2), (3, 3), (6, 6)]
    plan = make_plan([channels, *[512] * 4], sizes, 512, (64, 64), 3, winograd)
    assert plan == Plan((0,), (1, 2, 3, 4))


def test_segformers_levels() -> None:
    sizes = [(128 >> i, 128 >> i) for i in range(4)]
    assert make_plan([256] * 4, sizes, 256, (128, 128), 1, False) == Plan((0,), (1, 2, 3))


def test_a_slightly_smaller_level() -> None:
    """At a ratio of 1.1 Winograd's convolution at the target's resolution is less work."""
    assert make_plan([256], [(58, 58)], 512, (64, 64), 3, True) == Plan((0,), ())


def test_few_channels_are_not_worth_their_taps() -> None:
    plan = make_plan([1, 512], [(16, 16), (16, 16)], 512, (32, 32), 3, False)
    assert plan == Plan((0,), (1,))


def test_fast_products_are_worth_fewer_taps() -> None:
    """On GPUs a narrow product is 6 to 13 times as fast as float32's, a byte is not."""
    half = [128], [(32, 32)], 128, (64, 64), 3, False, 2.5
    assert make_plan_by(*half, CPU_COSTS) == make_plan_by(*half, GPU_COSTS[torch.float32])
    assert make_plan_by(*half, CPU_COSTS) == Plan((), (0,))
    for costs in (GPU_COSTS[torch.bfloat16], GPU_COSTS[torch.float16]):
        assert make_plan_by(*half, costs) == Plan((0,), ())
    quarter = [128], [(16, 16)], 128, (64, 64), 3, False, 2.5
    assert {make_plan_by(*quarter, costs) for costs in COSTS} == {Plan((), (0,))}


def test_the_plan_of_a_dtype_and_precision() -> None:
    """The same setting that products follow."""
    shape = FusionShape(1, (64,), ((32, 32),), 64, (64, 64), 3, 1, False)
    plans = {}
    with cuda_like():
        for dtype in DTYPES:
            plans[dtype] = plan_of(shape, torch.empty(0, dtype=dtype))
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            tf32 = plan_of(shape, torch.empty(0))
        finally:
            torch.backends.cuda.matmul.fp32_precision = "none"
    own = [torch.float64, torch.float32]
    assert plans == {d: Plan((), (0,)) if d in own else Plan((0,), ()) for d in DTYPES}
    assert tf32 == Plan((0,), ())


@both_rules
def test_every_level_has_one_place_and_order_is_kept(winograd: bool) -> None:
    sizes = [(4, 4), (32, 32), (31, 30), (64, 64), (1, 1), (32, 32)]
    channels = [512, 8, 16, 256, 300, 1]
    plan = make_plan(channels, sizes, 64, (32, 32), 3, winograd)
    assert sorted(plan.target + plan.own) == list(range(6))
    assert list(plan.target) == sorted(plan.target)
    assert list(plan.own) == sorted(plan.own)
    assert {1, 3, 5} <= set(plan.target)
    assert {0, 4} <= set(plan.own)


def test_deterministic_and_of_any_sequence() -> None:
    arguments = ([64, 64, 64], [(32, 32), (16, 16), (30, 30)], 64, (32, 32), 3, True)
    plans = {make_plan(*arguments) for _ in range(5)}
    plans.add(make_plan((64, 64, 64), [[32, 32], [16, 16], [30, 30]], 64, [32, 32], 3, True))
    assert len(plans) == 1


def test_no_output_channels() -> None:
    plan = make_plan([64, 64], [(32, 32), (16, 16)], 0, (32, 32), 3, False)
    assert sorted(plan.target + plan.own) == [0, 1]
