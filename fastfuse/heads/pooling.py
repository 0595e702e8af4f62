"""Average pooling to a few sizes, each followed by a 1x1 convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse.nn import ConvUnit
from fastfuse.ops.checks import check_ints

__all__ = ["PooledUnit", "PyramidPooling"]


class PooledUnit(nn.Sequential):
    """Adaptive average pooling to ``scale`` x ``scale``, then a 1x1 ConvUnit; keys ``1.*``."""

    def __init__(
        self, scale: int, in_channels: int, channels: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(scale), ConvUnit(in_channels, channels, 1, norm=norm))


class PyramidPooling(nn.ModuleList):
    """A :class:`PooledUnit` per scale, at the pooled sizes: a fusion upsamples them.

    Source: *Pyramid Scene Parsing Network*, section 3.2.
    """

    def __init__(
        self,
        name: str,
        scales: Sequence[int],
        in_channels: int,
        channels: int,
        norm: Callable[[int], nn.Module],
    ) -> None:
        if not isinstance(scales, Sequence) or len(scales) == 0:
            raise ValueError(f"{name}: pool_scales must be a sequence of ints; got {scales!r}")
        for scale in scales:
            check_ints(name, 1, pool_scales=scale)
        super().__init__(PooledUnit(scale, in_channels, channels, norm) for scale in scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [unit(x) for unit in self]
