"""What a fusion's work beside matrix products costs, in multiply-adds (MACs) of these.

On CPUs ratios of rates that were measured. On GPUs counts of bytes and instructions over an H100's
rates, never measured: docs/policy.md derives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["CPU_COSTS", "GPU_COSTS", "GPU_TF32_COSTS", "FusionCosts"]


@dataclass(frozen=True)
class FusionCosts:
    """Of one dtype of products."""

    tap_macs: float  # as much as a tap's value written and read
    sum_macs: float  # as a value of the result that is summed from a level's taps
    sum_tap_macs: float  # and as each tap of it
    upsample_macs: float  # as an upsampled value


CPU_COSTS = FusionCosts(tap_macs=20, sum_macs=40, sum_tap_macs=0, upsample_macs=30)

# An H100's rates a second: bytes of memory; instructions of all threads (132 multiprocessors of 128
# lanes at 1.7 GHz); multiply-adds of large products by cuBLAS.
_BYTES, _INSTRUCTIONS = 3e12, 28.7e12
_MACS = {
    torch.float64: 27e12,
    torch.float32: 25e12,
    torch.bfloat16: 330e12,
    torch.float16: 330e12,
}
_TF32_MACS = 200e12
# Machine code of tap_sum's forward kernel (sm_90, channels_last), for each value of the result and
# level: _SUM + _SUM_TAP k^2 instructions, by bytes of an element, at ratios of 2, 4 and 8.
_SUM, _SUM_TAP = {2: 12.7, 4: 16.9, 8: 33.8}, {2: 4.5, 4: 4.6, 8: 9.2}


def _gpu_costs(itemsize: int, macs: float) -> FusionCosts:
    moved = 2 * itemsize * macs / _BYTES  # a value that is written and read
    instruction = macs / _INSTRUCTIONS
    return FusionCosts(
        tap_macs=moved,
        sum_macs=_SUM[itemsize] * instruction,
        sum_tap_macs=_SUM_TAP[itemsize] * instruction,
        upsample_macs=moved,
    )


GPU_COSTS: Mapping[torch.dtype, FusionCosts] = {
    dtype: _gpu_costs(dtype.itemsize, macs) for dtype, macs in _MACS.items()
}
GPU_TF32_COSTS = _gpu_costs(4, _TF32_MACS)
