"""A residual block of convolutions and batch norms, as CEDNet has it."""

from __future__ import annotations

from torch import Tensor, nn

from fastfuse.nn.ced_block import depthwise
from fastfuse.nn.composition import leaf
from fastfuse.nn.conv_unit import ConvUnit
from fastfuse.nn.stochastic_depth import check_drop_path, drawn_keep
from fastfuse.ops.autocast import cast_for_autocast
from fastfuse.ops.checks import check_feature_map, check_ints

__all__ = ["ResNetBlock"]

_EXPANSION = 4


class ResNetBlock(nn.Module):
    """ReLU(x + keep * BN(Conv1x1(ReLU(BN(Conv1x1(ReLU(BN(Conv3x3(x)))))))), 4 C channels wide in
    between; convolutions without biases.

    17 C^2 + 12 C parameters; keys ``unit1.*``, ``unit2.*``, ``unit3.*``, each with ``conv`` and
    ``bn``. With ``long_range``, CEDNet's for the lowest resolution, there are 52 C more, ``dw2.*``
    and ``bn2.*``: with y = x + the first unit, y + ReLU(BN(DW 7x7(y))), dilated, goes on to the
    second.

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

    def __init__(
        self,
        channels: int,
        *,
        long_range: bool = False,
        dilation: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_ints("ResNetBlock", 1, channels=channels)
        check_drop_path("ResNetBlock", drop_path)
        wide = _EXPANSION * channels
        self.unit1 = ConvUnit(channels, channels, 3)
        self.dw2 = self.bn2 = None
        if long_range:
            self.dw2 = depthwise("ResNetBlock", channels, dilation)
            self.bn2 = nn.BatchNorm2d(channels)
        self.unit2 = ConvUnit(channels, wide, 1)
        self.unit3 = ConvUnit(wide, channels, 1, activation=nn.Identity)
        self.drop_path = drop_path

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("ResNetBlock", "x", x, channels=self.unit3.conv.out_channels)
        (x,) = cast_for_autocast([x])
        y = self.unit1(x)
        if self.dw2 is not None and self.bn2 is not None:
            y = x + y
            y = y + self.bn2(self.dw2(y)).relu()
        branch = self.unit3(self.unit2(y))
        keep = drawn_keep(x, self.drop_path, self.training)
        if keep is not None:
            branch = branch * keep.to(branch.dtype)[:, None, None, None]
        return (x + branch).relu()

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}"
