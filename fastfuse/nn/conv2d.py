"""nn.Conv2d, on this package's kernels where they are faster."""

from __future__ import annotations

from torch import Tensor, nn

from fastfuse.backends import DTYPES, requested_backend
from fastfuse.ops.autocast import cast_dtype, without_autocast
from fastfuse.ops.depthwise_conv2d import depthwise_conv2d
from fastfuse.ops.fusion_conv2d import convolves_single, fusion_conv2d
from fastfuse.ops.policy import policy_of

__all__ = ["Conv2d"]


class Conv2d(nn.Conv2d):
    """An ``nn.Conv2d`` in all but speed: the same arguments, initialization, keys and results.

    A static rule, by what is convolved, chooses what runs:

    - depthwise with an odd kernel, stride 1 and "same" zero padding:
      :func:`fastfuse.depthwise_conv2d`;
    - dense 3x3, stride 1: :func:`fastfuse.fusion_conv2d` with one level where that has something
      faster than PyTorch: Winograd's algorithm, on CPUs, for channels and pixels enough;
    - anything else: PyTorch's convolution, in float32 where the processor has no instructions for
      products of the dtype, and rounded once.

    Winograd's algorithm rounds differently, and an infinity among the inputs makes NaNs where a
    direct convolution has infinities.

    >>> import torch, fastfuse
    >>> fastfuse.nn.Conv2d(64, 64, 3, padding=1)(torch.randn(1, 64, 16, 16)).shape
    torch.Size([1, 64, 16, 16])
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_image(x):
            return super().forward(x)
        weight, bias = self.weight, self.bias  # once: parametrizations compute them
        dilation, padding = self._dilation_and_padding()
        same = padding == dilation * (_pair(self.kernel_size)[0] // 2)
        if padding is not None:
            if self.groups == 1 and dilation == 1:
                if convolves_single(x, weight, padding):
                    return fusion_conv2d([x], weight, bias, padding=padding)
            elif self.groups == self.in_channels == self.out_channels and same:
                return depthwise_conv2d(x, weight, bias, dilation=dilation)
        dtype = cast_dtype(x)
        wide = policy_of(x.device.type).multiplies(dtype)
        if wide == dtype or requested_backend() == "reference":
            return self._conv_forward(x, weight, bias)
        if any(cast_dtype(t) != dtype for t in (weight, bias) if t is not None):
            return self._conv_forward(x, weight, bias)  # PyTorch's error
        with without_autocast(x.device.type):
            bias = None if bias is None else bias.to(dtype).to(wide)
            weight = weight.to(dtype).to(wide)
            return self._conv_forward(x.to(dtype).to(wide), weight, bias).to(dtype)

    def _is_image(self, x: Tensor) -> bool:
        """What the package's ops take, and not what only traces a graph (torch.fx)."""
        return (
            isinstance(x, Tensor)
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and x.dtype in DTYPES
            and type(self)._conv_forward is nn.Conv2d._conv_forward
        )

    def _dilation_and_padding(self) -> tuple[int, int | None]:
        """Of both axes; no padding where this is no convolution of the package's kind: square and
        odd, with stride 1 and one number of zeros all around."""
        k, k_x = _pair(self.kernel_size)
        stride, dilation = _pair(self.stride), _pair(self.dilation)
        if (
            k != k_x
            or k % 2 == 0
            or stride != (1, 1)
            or dilation[0] != dilation[1]
            or self.padding_mode != "zeros"
        ):
            return 1, None
        if isinstance(self.padding, str):
            reach = dilation[0] * (k // 2)
            return dilation[0], reach if self.padding == "same" else 0
        padding = _pair(self.padding)
        return dilation[0], padding[0] if padding[0] == padding[1] else None


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """Attributes of a convolution are pairs, but may be overwritten by ints or single values."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
