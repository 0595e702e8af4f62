"""nn.Conv2d, on this package's kernels where they are faster."""

from __future__ import annotations

from torch import Tensor, nn

from fastfuse.ops.depthwise_conv2d import depthwise_conv2d
from fastfuse.ops.fusion_conv2d import convolves_single, fusion_conv2d

__all__ = ["Conv2d"]


class Conv2d(nn.Conv2d):
    """An ``nn.Conv2d`` in all but speed: the same arguments, initialization, keys and results.

    A static rule, by what is convolved, chooses what runs:

    - depthwise with an odd kernel, stride 1 and "same" zero padding:
      :func:`fastfuse.depthwise_conv2d`;
    - dense 3x3, stride 1: :func:`fastfuse.fusion_conv2d` with one level where that has something
      faster than PyTorch: Winograd's algorithm, in float32 on CPUs;
    - anything else: PyTorch's convolution.

    >>> import torch, fastfuse
    >>> fastfuse.nn.Conv2d(64, 64, 3, padding=1)(torch.randn(1, 64, 16, 16)).shape
    torch.Size([1, 64, 16, 16])
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._is_plain and x.dim() == 4 and x.shape[1] == self.in_channels:
            if self.groups == 1 and self.dilation == (1, 1):
                padding = self._padding
                if convolves_single(x, self.weight, padding):
                    return fusion_conv2d([x], self.weight, self.bias, padding=padding)
            elif self._is_depthwise and self._padding == self._reach:
                return depthwise_conv2d(x, self.weight, self.bias, dilation=self.dilation[0])
        return super().forward(x)

    @property
    def _is_plain(self) -> bool:
        """Square, odd, stride 1, zero padding: what the package's ops are defined for."""
        (k, k_x), (d, d_x) = self.kernel_size, self.dilation
        return (
            k == k_x
            and k % 2 == 1
            and d == d_x
            and self.stride == (1, 1)
            and self.padding_mode == "zeros"
            and (isinstance(self.padding, str) or self.padding[0] == self.padding[1])
        )

    @property
    def _is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    @property
    def _reach(self) -> int:
        return self.dilation[0] * (self.kernel_size[0] // 2)

    @property
    def _padding(self) -> int:
        if isinstance(self.padding, str):
            return self._reach if self.padding == "same" else 0
        return self.padding[0]
