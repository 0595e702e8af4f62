"""lr_ced_block and its gradients, composed as ced_block is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.ops.define import steps_of
from fastfuse.ops.layout import as_matrix
from fastfuse.ops.memory import empty
from fastfuse.ops.pointwise import mlp as pointwise
from fastfuse.ops.pointwise.parameters import Mlp, Norm, convolution_bias

__all__ = ["backward", "forward", "kept_shapes"]


def kept_shapes(x: Tensor, parameters: Sequence[Any]) -> list[tuple[int, ...]]:
    """Results of both convolutions, the images after them, the hidden tensor before its bias."""
    batch, _, height, width = x.shape
    hidden = parameters[8].shape[0]
    return [*[tuple(x.shape)] * 4, (batch, hidden, height, width)]


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    *,
    addend: Tensor | None = None,
    flip: bool = False,
) -> Tensor:
    return steps_of(x.device.type).depthwise_conv2d(x, weight, bias, addend, dilation, flip, True)


class _Step:
    """``x + GELU(LN(DW(x)))``, the first or the second of the block."""

    def __init__(self, parameters: Sequence[Any], dilation: int, eps: float) -> None:
        self.weight, self.bias, norm_weight, norm_bias = parameters
        self.dilation = dilation
        self.norm = Norm.of(norm_weight, norm_bias, eps)

    def forward(self, x: Tensor, keeping: bool) -> tuple[Tensor, Tensor]:
        """The convolution's result, if it is kept, and the step's."""
        bias = convolution_bias(self.bias, x)
        convolved = _convolve(x, self.weight, bias, self.dilation)
        # Each pixel is read before it is written: fresh memory is slow.
        out = empty(x.shape, x, torch.channels_last) if keeping else convolved
        steps_of(x.device.type).layer_norm_into(
            as_matrix(out), as_matrix(convolved), self.norm.weight, self.norm.bias, self.norm.eps,
            as_matrix(x), True,
        )  # fmt: skip
        return convolved, out

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        convolved: Tensor,
        kept: bool,
        wants_x: bool,
        wants_parameters: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of x and of the four parameters; overwrites ``convolved`` unless kept."""
        norm_sums = [self.norm.weight.new_zeros(x.shape[1]) for _ in range(2)]
        grad_convolved = empty(x.shape, x, torch.channels_last) if kept else convolved
        steps_of(x.device.type).layer_norm_backward_into(
            as_matrix(grad_convolved), *norm_sums, as_matrix(grad), as_matrix(convolved),
            self.norm.weight, self.norm.bias, self.norm.eps, True,
        )  # fmt: skip
        grad_x = None
        if wants_x:
            grad_x = _convolve(
                grad_convolved, self.weight, None, self.dilation, addend=grad, flip=True
            )
        if not wants_parameters:
            return grad_x, [None] * 4
        of_convolution = steps_of(x.device.type).depthwise_conv2d_backward_weight(
            grad_convolved, x, self.weight.shape[2], self.dilation
        )
        return grad_x, [*of_convolution, *norm_sums]


def _steps(parameters: Sequence[Any], dilation: int, eps: float) -> tuple[_Step, _Step]:
    return _Step(parameters[:4], 1, eps), _Step(parameters[4:8], dilation, eps)


def forward(
    x: Tensor,
    parameters: Sequence[Any],
    keep: Tensor | None,
    option: Sequence[Any],
    keeping: bool,
) -> tuple[Tensor, list[Tensor]]:
    first, second = _steps(parameters, *option)
    convolved, y = first.forward(x, keeping)
    convolved2, z = second.forward(y, keeping)
    kept, out = [], z
    if keeping:
        hidden = empty(kept_shapes(x, parameters)[4], x, torch.channels_last)
        kept = [convolved, y, convolved2, z, hidden]
        out = empty(x.shape, x, torch.channels_last)
    mlp = Mlp.of(x, parameters[8:], keep)
    hidden_rows = as_matrix(kept[4]) if keeping else None
    pointwise.forward(as_matrix(out), as_matrix(x), as_matrix(z), mlp, hidden_rows)
    return out, kept


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Any],
    keep: Tensor | None,
    option: Sequence[Any],
    kept: Sequence[Tensor],
    wants_x: bool,
    wants_parameters: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    first, second = _steps(parameters, *option)
    if kept:
        convolved, y, convolved2, z, hidden = kept
    else:
        convolved, y = first.forward(x, True)
        (convolved2, z), hidden = second.forward(y, True), None
    # Each pixel is read before it is written, and what is kept is not ours to write.
    grad_z = empty(x.shape, x, torch.channels_last) if kept else z
    g = pointwise.backward(
        as_matrix(grad_z),
        as_matrix(grad),
        as_matrix(z),
        Mlp.of(x, parameters[8:], keep),
        None if hidden is None else as_matrix(hidden),
        of_parameters=wants_parameters,
    )
    grad_y, of_second = second.backward(grad_z, y, convolved2, bool(kept), True, wants_parameters)
    assert grad_y is not None
    grad_x, of_first = first.backward(grad_y, x, convolved, bool(kept), wants_x, wants_parameters)
    if grad_x is not None:
        grad_x = grad_x.add_(grad)
    of_mlp = [None] * 5 if g is None else g[2:]
    return grad_x, [*of_first, *of_second, *of_mlp]
