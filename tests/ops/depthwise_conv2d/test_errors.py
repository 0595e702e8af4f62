"""depthwise_conv2d with bad input: every error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfuse import depthwise_conv2d

OP = "depthwise_conv2d"


def _x(**options: Any) -> Tensor:
    return torch.randn(2, 6, 5, 4, **options)


def _weight(*shape: int) -> Tensor:
    return torch.randn(shape or (6, 1, 3, 3))


def _call(x: Any = None, weight: Any = None, bias: Any = None, **options: Any) -> Tensor:
    x, weight = _x() if x is None else x, _weight() if weight is None else weight
    return depthwise_conv2d(x, weight, bias, **options)


WEIGHT = r"weight must have shape \(C, 1, k, k\) with k odd and C = 6; got "

BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rank 3": (
        lambda: _call(_x()[0]),
        ValueError,
        r"x must have 4 dimensions \(N, C, H, W\); got shape \(6, 5, 4\)",
    ),
    "no height": (
        lambda: _call(_x()[:, :, :0]),
        ValueError,
        r"x must be at least 1 pixel high and wide; got shape \(2, 6, 0, 4\)",
    ),
    "weight of rank 3": (
        lambda: _call(weight=_weight(6, 3, 3)),
        ValueError,
        WEIGHT + r"\(6, 3, 3\)",
    ),
    "weight of other channels": (
        lambda: _call(weight=_weight(5, 1, 3, 3)),
        ValueError,
        WEIGHT + r"\(5, 1, 3, 3\)",
    ),
    "weight of a full convolution": (
        lambda: _call(weight=_weight(6, 6, 3, 3)),
        ValueError,
        WEIGHT + r"\(6, 6, 3, 3\)",
    ),
    "kernel even": (
        lambda: _call(weight=_weight(6, 1, 4, 4)),
        ValueError,
        WEIGHT + r"\(6, 1, 4, 4\)",
    ),
    "kernel of nothing": (
        lambda: _call(weight=_weight(6, 1, 0, 0)),
        ValueError,
        WEIGHT + r"\(6, 1, 0, 0\)",
    ),
    "kernel not square": (
        lambda: _call(weight=_weight(6, 1, 3, 5)),
        ValueError,
        WEIGHT + r"\(6, 1, 3, 5\)",
    ),
    "bias a float": (lambda: _call(bias=0.0), TypeError, r"bias must be a tensor; got float"),
    "bias too short": (
        lambda: _call(bias=torch.zeros(5)),
        ValueError,
        r"bias must have one value per channel, shape \(6,\); got shape \(5,\)",
    ),
    "bias of rank 2": (
        lambda: _call(bias=torch.zeros(6, 1)),
        ValueError,
        r"bias must have one value per channel, shape \(6,\); got shape \(6, 1\)",
    ),
    "dilation zero": (
        lambda: _call(dilation=0),
        ValueError,
        r"dilation must be at least 1 and below 2\^15; got 0",
    ),
    "dilation too large": (
        lambda: _call(dilation=2**15),
        ValueError,
        r"dilation must be at least 1 and below 2\^15; got 32768",
    ),
    "dilation a float": (
        lambda: _call(dilation=2.0),
        TypeError,
        r"dilation must be an int; got float",
    ),
    "dilation a bool": (
        lambda: _call(dilation=True),
        TypeError,
        r"dilation must be an int; got bool",
    ),
    "dilation a pair": (
        lambda: _call(dilation=(2, 2)),
        TypeError,
        r"dilation must be an int; got tuple",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(any_backend: str, case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith(f"{OP}: ")


HOW = (None, 1, False, False)


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda x, w, b: (x[0], w, b, *HOW), "x must have 4 dimensions"),
        (lambda x, w, b: (x.int(), w.int(), None, *HOW), "got Int"),
        (lambda x, w, b: (x[:, :, :0], w, b, None, 0, False, False), "dilation must be at least 1"),
        (lambda x, w, b: (x, w[0], b, *HOW), "weight must have 4 dimensions"),
        (lambda x, w, b: (x, w[:5], b, *HOW), r"weight must have shape \(C, 1, k, k\)"),
        (lambda x, w, b: (x, w.expand(-1, 2, -1, -1), b, *HOW), "weight must have shape"),
        (lambda x, w, b: (x, w[..., :2], b, *HOW), "weight must have shape"),
        (lambda x, w, b: (x, w[:, :, :2, :2], b, *HOW), "kernel_size must be odd; got 2"),
        (lambda x, w, b: (x, w[:, :, :0, :0], b, *HOW), "kernel_size must be odd; got 0"),
        (lambda x, w, b: (x, w.double(), b, *HOW), "x's dtype"),
        (lambda x, w, b: (x, w, b[:5], *HOW), r"bias must have shape \(C,\)"),
        (lambda x, w, b: (x, w, b[None], *HOW), r"bias must have shape \(C,\)"),
        (lambda x, w, b: (x, w, b.double(), *HOW), "bias must have .* x's dtype"),
        (lambda x, w, b: (x, w, b, x[:1], 1, False, False), "addend must have x's shape"),
        (lambda x, w, b: (x, w, b, x.double(), 1, False, False), "addend must have x's .* dtype"),
        (lambda x, w, b: (x, w, b, x[0], 1, False, False), "addend must have 4 dimensions"),
        (lambda x, w, b: (x, w, b, None, 0, False, False), "dilation must be at least 1; got 0"),
        (lambda x, w, b: (x, w, b, None, -3, False, False), "dilation must be at least 1; got -3"),
        (lambda x, w, b: (x, w, b, None, 2**40, False, False), "dilation must be"),
    ],
)
def test_the_op_itself_guards_memory(args: Callable[..., Any], message: str) -> None:
    """Called past the public function, it refuses instead of reading beyond its inputs."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.depthwise_conv2d(*args(_x(), _weight(), torch.zeros(6)))


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda g, x: (g[0], x, 3, 1), "grad_output must have 4 dimensions"),
        (lambda g, x: (g, x[0], 3, 1), "x must have 4 dimensions"),
        (lambda g, x: (g[:1], x, 3, 1), "grad_output must have x's shape"),
        (lambda g, x: (g[:, :5], x, 3, 1), "grad_output must have x's shape"),
        (lambda g, x: (g[..., 1:], x, 3, 1), "grad_output must have x's shape"),
        (lambda g, x: (g.double(), x, 3, 1), "grad_output must have x's .* dtype"),
        (lambda g, x: (g.int(), x.int(), 3, 1), "got Int"),
        (lambda g, x: (g, x, 2, 1), "kernel_size must be odd; got 2"),
        (lambda g, x: (g, x, -1, 1), "kernel_size must be odd; got -1"),
        (lambda g, x: (g, x, 2**40 + 1, 1), "kernel_size must be odd"),
        (lambda g, x: (g, x, 3, 0), "dilation must be at least 1; got 0"),
    ],
)
def test_the_backward_op_itself_guards_memory(args: Callable[..., Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.depthwise_conv2d_backward_weight(*args(_x(), _x()))
