"""A residual block of convolutions and batch norms, as CEDNet has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastfuse.backends import (
    accumulation_dtype,
    is_differentiated_otherwise,
    requested_backend,
    wants_gradients,
)
from fastfuse.nn.batch_norm import activated, state_of, uses_batch, with_norm
from fastfuse.nn.ced_block import depthwise
from fastfuse.nn.composition import Composition, Part, leaf
from fastfuse.nn.conv2d import Conv2d, convolve_with, dense_padding, depthwise_dilation
from fastfuse.nn.depthwise_conv2d import DepthwiseConv2d
from fastfuse.nn.stochastic_depth import check_drop_path, drawn_keep
from fastfuse.ops.autocast import autocasts, cast_for_autocast
from fastfuse.ops.batch_norm import normalized_relu, normalized_relu_conv
from fastfuse.ops.checks import check_feature_map, check_ints
from fastfuse.ops.layout import is_channels_last, prefer_memory_format, to_memory_format
from fastfuse.ops.pointwise.relu_mlp import relu_mlp
from fastfuse.ops.policy import policy_of

__all__ = ["ResNetBlock"]

_EXPANSION = 4
_CONVOLUTIONS = (Conv2d, DepthwiseConv2d, nn.Conv2d)
_BATCH_NORM = Part(
    (nn.BatchNorm2d,),
    ("weight", "bias", "running_mean", "running_var"),
    maybe=("weight", "bias", "running_mean", "running_var"),
    conditions={
        "an eps above 0, and both running statistics or none": (
            lambda bn, weight, bias, mean, variance: (
                bn.eps > 0 and (mean is None) == (variance is None)
            )
        )
    },
)


def _dense(kernel_size: int) -> Part:
    def keeps_size(conv: nn.Conv2d, weight: Tensor) -> bool:
        k = kernel_size
        return weight.shape[2] == k and dense_padding(conv, weight) == k // 2 and conv.bias is None

    expected = f"a dense {kernel_size}x{kernel_size} convolution without bias that keeps the size"
    return Part(_CONVOLUTIONS, ("weight",), conditions={expected: keeps_size})


class ResNetBlock(Composition):
    """ReLU(x + keep * BN(Conv1x1(ReLU(BN(Conv1x1(ReLU(BN(Conv3x3(x)))))))), 4 C channels wide in
    between; convolutions without biases.

    17 C^2 + 12 C parameters; keys ``convI.*`` and ``bnI.*``, I from 1 to 3. With ``long_range``,
    CEDNet's for the lowest resolution, there are 52 C more, ``dw.*`` and ``bn_dw.*``: with y = x +
    what the second convolution took, y + ReLU(BN(DW 7x7(y))), dilated, goes there.

    On CPUs, where no derivative is wanted, batch norms are folded into convolutions and the 1x1
    convolutions run a chunk of pixels at a time.

    Args:
        channels: C.
        long_range: see above.
        dilation: of the depthwise convolution.
        drop_path: the rate of stochastic depth in training, in [0, 1), drawn for each sample.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        TypeError: a number that is no int.
        ValueError: channels or dilation below 1, or drop_path outside [0, 1).

    Source: CEDNet, table 5.

    >>> import torch, fastfuse
    >>> fastfuse.nn.ResNetBlock(8, long_range=True)(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 8, 9, 9])
    """

    parts: ClassVar = {
        "conv1": _dense(3),
        "bn1": _BATCH_NORM,
        "dw": Part(
            _CONVOLUTIONS,
            ("weight", "bias"),
            optional=True,
            conditions={
                "one kernel a channel that keeps the size": (
                    lambda dw, weight, bias: depthwise_dilation(dw, weight) is not None
                )
            },
        ),
        "bn_dw": replace(_BATCH_NORM, optional=True),
        "conv2": _dense(1),
        "bn2": _BATCH_NORM,
        "conv3": _dense(1),
        "bn3": _BATCH_NORM,
        "relu": Part((nn.ReLU,), ()),
    }

    def __init__(
        self,
        channels: int,
        *,
        long_range: bool = False,
        dilation: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_ints("ResNetBlock", 1, channels=channels, dilation=dilation)
        check_drop_path("ResNetBlock", drop_path)
        wide = _EXPANSION * channels
        self.conv1 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dw = depthwise("ResNetBlock", channels, dilation) if long_range else None
        self.bn_dw = nn.BatchNorm2d(channels) if long_range else None
        self.conv2 = Conv2d(channels, wide, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = Conv2d(wide, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.channels = channels
        self.drop_path = drop_path

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("ResNetBlock", "x", x, channels=self.channels)
        tensors = self.read_parts()
        if not isinstance(tensors, str) and _runs_kernels(x, tensors):
            norms = [n for n in (self.bn1, self.bn_dw, self.bn2, self.bn3) if n is not None]
            drops = self.training and self.drop_path > 0
            if drops or wants_gradients([x, *tensors]) or any(map(uses_batch, norms)):
                # Of one value a channel there is PyTorch's error; narrow dtypes are by layers.
                if x.numel() > self.channels and accumulation_dtype(x.dtype) == x.dtype:
                    return self._chained(x)
            elif _folds(x):
                return self._folded(x, tensors)
        (x,) = cast_for_autocast([x])
        y = activated(self.bn1, self.relu, self.bn1(self.conv1(x)))
        if self.dw is not None and self.bn_dw is not None:
            y = x + y
            y = y + activated(self.bn_dw, self.relu, self.bn_dw(self.dw(y)))
        branch = self.bn3(self.conv3(activated(self.bn2, self.relu, self.bn2(self.conv2(y)))))
        keep = drawn_keep(x, self.drop_path, self.training)
        if keep is not None:
            branch = branch * keep.to(branch.dtype)[:, None, None, None]
        return self.relu(x + branch)

    def _chained(self, x: Tensor) -> Tensor:
        """With derivatives, or of the batch's statistics."""
        channels_last = is_channels_last([x])
        y, norm = self.conv1(x), None
        first = state_of(self.bn1, y)
        if self.dw is not None and self.bn_dw is not None:
            y = x + normalized_relu(y, first)
            z = self.dw(y)
            y = y + normalized_relu(z, state_of(self.bn_dw, z))
        else:
            norm = first
        y, moments = normalized_relu_conv(y, norm, self.conv2.weight, measured=uses_batch(self.bn2))
        norm = state_of(self.bn2, y, moments)
        y, moments = normalized_relu_conv(y, norm, self.conv3.weight, measured=uses_batch(self.bn3))
        keep = drawn_keep(x, self.drop_path, self.training)
        keep = None if keep is None else keep.to(x.dtype)
        out = normalized_relu(y, state_of(self.bn3, y, moments), x, keep)
        return out if channels_last else prefer_memory_format(out, channels_last)

    def _folded(self, x: Tensor, tensors: list[Any]) -> Tensor:
        conv1, dw, conv2, conv3 = tensors[:5], tensors[5:11], tensors[11:16], tensors[16:]
        first = with_norm(conv1[0], None, conv1[1:], self.bn1.eps)
        y = convolve_with(self.conv1, x, *first).relu_()
        if self.dw is not None and self.bn_dw is not None:
            y = x + y
            folded = with_norm(dw[0], dw[1], dw[2:], self.bn_dw.eps)
            y = y + convolve_with(self.dw, y, *folded).relu_()
        fc1 = with_norm(conv2[0], None, conv2[1:], self.bn2.eps)
        out = relu_mlp(x, y, *fc1, *with_norm(conv3[0], None, conv3[1:], self.bn3.eps))
        return to_memory_format(out, is_channels_last([x]))

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}"


def _runs_kernels(x: Tensor, tensors: list[Any]) -> bool:
    """Whether kernels of CPUs have the block's results, to rounding."""
    if x.device.type != "cpu" or x.dtype not in policy_of("cpu").native:
        return False
    if autocasts("cpu") or is_differentiated_otherwise() or requested_backend() == "reference":
        return False
    if not torch.compiler.is_compiling() and (type(x) is not Tensor or torch.jit.is_tracing()):
        return False  # what stands for other tensors, which may want derivatives
    if tensors[16].shape[0] != x.shape[1]:  # of conv3
        return False
    return not any(t is not None and t.dtype != x.dtype for t in tensors)


def _folds(x: Tensor) -> bool:
    """Whether folding pays: it reads and writes 17 C^2 weights, and saves that of 6 C values a
    pixel."""
    batch, channels, height, width = x.shape
    return torch.compiler.is_compiling() or batch * height * width >= 3 * channels
