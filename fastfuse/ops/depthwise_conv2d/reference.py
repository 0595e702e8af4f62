"""The definition of depthwise_conv2d, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.ops.layout import defined_memory_format, is_channels_last

__all__ = ["reference"]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Every channel convolved with its own k x k kernel, stride 1, zero padding to the same size.

    ``out[n, c, p] = bias[c] + sum_t weight[c, 0, t] x[n, c, p + (t - r) d]`` over the kernel's
    positions t, with r = k // 2 and d the dilation; what lies outside the image is 0.
    """
    padding = dilation * (weight.shape[2] // 2)
    dtype, channels_last = x.dtype, is_channels_last([x])
    if dtype == torch.float16 and x.device.type == "cpu":  # PyTorch's gradient sums in float16
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    output = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])
    return defined_memory_format(output.to(dtype), channels_last)
