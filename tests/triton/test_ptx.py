"""The Triton kernels as compiled PTX, run on the CPU, and on a device where there is one.

A selection of the kernels' tests: each kernel once. ``make test-gpu-proof`` runs all.
"""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import INTERPRETING, requires_triton, run_child

if INTERPRETING:
    pytest.skip("the selected tests run by themselves", allow_module_level=True)

SELECTION = {
    "depthwise_conv2d": (
        "test_forward[7x7-float32-contiguous]",
        "test_flipped_with_an_addend[3x3_dilated-bfloat16-contiguous]",
        "test_backward_weight[3x3-float32-contiguous]",
    ),
    "pointwise": (
        "test_layer_norm[odd-bfloat16-without-without]",
        "test_layer_norm_backward[odd-float32-with]",
        "test_bias_gelu[odd-float32-with]",
        "test_bias_gelu_backward[odd-bfloat16-without]",
        "test_residual[odd-float32-with]",
        "test_residual_backward[odd-float32-with]",
    ),
    "tap_sum": (
        "test_forward[odd_sizes-float32-channels_last-corners]",
        "test_backward[odd_sizes-float32-channels_last-corners]",
    ),
    "upsample_add": ("test_forward[primes-bfloat16]",),
    "upsample_argmax": ("test_values[primes-bfloat16]",),
    "upsample_cross_entropy": ("test_values_and_gradients[primes-bfloat16]",),
    "upsample_equalize_concat": (
        "test_sampling_rule[31-97-half-float32]",
        "test_forward[primes-float32-contiguous-half]",
        "test_backward[primes-float32-contiguous-half]",
    ),
}


@requires_triton
@pytest.mark.parametrize("on", ["sm_90", pytest.param("device", marks=pytest.mark.gpu)])
def test_a_selection(on: str) -> None:
    names = [f"test_{op}.py::{test}" for op, tests in SELECTION.items() for test in tests]
    outcomes, output = run_child({"TRITON_TESTS_ON": on}, *(f"tests/triton/{n}" for n in names))
    assert sorted(outcomes) == sorted(names), output
    for name, failure in outcomes.items():
        assert failure is None, f"{name}\n{failure}"


@requires_triton
def test_tensors_of_a_device() -> None:
    """Slices are slices there too, and what is written comes back: without one, on the CPU."""
    import triton_device
    from ptx.launch import Launcher

    from fastfuse.ops.pointwise import triton as kernels

    whole, bias = torch.zeros(7, 20), torch.ones(17)
    with Launcher(90):
        triton_device.install("cpu")
        kernels.residual_into(whole[:, 1:-2], whole[:, 1:-2], whole[:, :-3], bias, None, None, 1, 0)
    assert torch.equal(whole.sum(0), torch.tensor([0.0, *17 * [7.0], 0.0, 0.0]))
