"""tap_sum with bad input: every error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfuse import tap_sum

OP = "tap_sum"


def _taps(**options: Any) -> Tensor:
    return torch.randn(2, 18, 4, 4, **options)


def _call(taps: Any = None, size: Any = (8, 8), **options: Any) -> Tensor:
    return tap_sum(_taps() if taps is None else taps, size, **{"kernel_size": 3, **options})


BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rank 3": (
        lambda: _call(_taps()[0]),
        ValueError,
        r"taps must have 4 dimensions \(N, C, H, W\); got shape \(18, 4, 4\)",
    ),
    "no width": (
        lambda: _call(_taps()[..., :0]),
        ValueError,
        r"taps must be at least 1 pixel high and wide; got shape \(2, 18, 4, 0\)",
    ),
    "channels that are not taps": (
        lambda: _call(torch.randn(1, 17, 4, 4)),
        ValueError,
        r"taps must have k \* k \* C = 9 \* C channels, tap-major; got 17",
    ),
    "channels of another kernel": (
        lambda: _call(kernel_size=5),
        ValueError,
        r"taps must have k \* k \* C = 25 \* C channels, tap-major; got 18",
    ),
    "kernel_size even": (
        lambda: _call(kernel_size=2),
        ValueError,
        r"kernel_size must be odd and positive; got 2",
    ),
    "kernel_size negative": (
        lambda: _call(kernel_size=-1),
        ValueError,
        r"kernel_size must be odd and positive; got -1",
    ),
    "kernel_size a float": (
        lambda: _call(kernel_size=3.0),
        TypeError,
        r"kernel_size must be an int; got float",
    ),
    "kernel_size a bool": (
        lambda: _call(kernel_size=True),
        TypeError,
        r"kernel_size must be an int; got bool",
    ),
    "kernel_size a pair": (
        lambda: _call(kernel_size=(3, 3)),
        TypeError,
        r"kernel_size must be an int; got tuple",
    ),
    "padding negative": (
        lambda: _call(padding=-1),
        ValueError,
        r"padding must be at least 0 and below 2\^30; got -1",
    ),
    "padding too large": (
        lambda: _call(padding=2**30),
        ValueError,
        r"padding must be at least 0 and below 2\^30; got 1073741824",
    ),
    "padding a word": (
        lambda: _call(padding="same"),
        TypeError,
        r"padding must be an int; got str",
    ),
    "size None": (
        lambda: _call(size=None),
        ValueError,
        r"size must be two positive ints \(height, width\) below 2\^31; got None",
    ),
    "size an int": (
        lambda: _call(size=8),
        ValueError,
        r"size must be two positive ints \(height, width\) below 2\^31; got 8",
    ),
    "size of three": (
        lambda: _call(size=(8, 8, 8)),
        ValueError,
        r"size must be two positive ints .*; got \(8, 8, 8\)",
    ),
    "size zero": (
        lambda: _call(size=(0, 8)),
        ValueError,
        r"size must be two positive ints .*; got \(0, 8\)",
    ),
    "size too large": (
        lambda: _call(size=(2**31, 8)),
        ValueError,
        r"size must be two positive ints .*; got \(2147483648, 8\)",
    ),
    "size that leaves no pixel": (
        lambda: _call(size=(8, 2), padding=0),
        ValueError,
        r"size and padding must leave at least 1 pixel for a kernel of 3; "
        r"got size \(8, 2\) and padding 0",
    ),
    "offsets too short": (
        lambda: _call(offsets=torch.zeros(2)),
        ValueError,
        r"offsets must have one value per channel of taps, shape \(18,\); got shape \(2,\)",
    ),
    "offsets of rank 2": (
        lambda: _call(offsets=torch.zeros(9, 2)),
        ValueError,
        r"offsets must have one value per channel of taps, shape \(18,\); got shape \(9, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(any_backend: str, case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith(f"{OP}: ")


HOW = (8, 8, 3, 1, False, False)


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda t: (t[0], None, *HOW), "4 dimensions"),
        (lambda t: (t.int(), None, *HOW), "got Int"),
        (lambda t: (t[:, :17], None, *HOW), r"k \* k \* C channels; got 17"),
        (lambda t: (t[:, :, :0], None, *HOW), "at least 1"),
        (lambda t: (t, torch.zeros(17), *HOW), "1-D CPU tensor of 18 values"),
        (lambda t: (t, None, 2**31, 8, 3, 1, False, False), r"at most 2\^31 - 1"),
        (lambda t: (t, None, 8, 0, 3, 1, False, False), "at least 1"),
        (lambda t: (t, None, 8, 8, 2, 1, False, False), "kernel_size must be odd; got 2"),
        (lambda t: (t, None, 8, 8, -1, 1, False, False), "kernel_size must be odd"),
        (lambda t: (t, None, 8, 8, 3, -1, False, False), "padding must be at least 0; got -1"),
        (lambda t: (t, None, 8, 2, 3, 0, False, False), "at least 1"),
    ],
)
def test_the_op_itself_guards_memory(args: Callable[..., Any], message: str) -> None:
    """Called past the public function, it refuses instead of reading beyond its inputs."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.tap_sum(*args(_taps()))


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda g: (g[0], 4, 4, *HOW), "4 dimensions"),
        (lambda g: (g, 0, 4, *HOW), "at least 1"),
        (lambda g: (g, 4, 4, 8, 9, 3, 1, False, False), "of the size that size"),
        (lambda g: (g, 4, 4, 8, 8, 4, 1, False, False), "kernel_size must be odd"),
    ],
)
def test_the_backward_op_itself_guards_memory(args: Callable[..., Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.tap_sum_backward(*args(torch.randn(2, 2, 8, 8)))


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda o, t: (o[..., :7], [t], None, None, None, False, *HOW), "out must be of the size"),
        (lambda o, t: (o[:, :1], [t], None, None, None, False, *HOW), r"k \* k times its channels"),
        (
            lambda o, t: (o, [t, t[:1]], None, None, None, False, *HOW),
            "taps must have the output's N",
        ),
        (lambda o, t: (o, [t.double()], None, None, None, False, *HOW), "must share a dtype"),
        (lambda o, t: (o.mT, [t], None, None, None, False, *HOW), "unit stride along its layout"),
        (
            lambda o, t: (o, [t], o[0, 0, 0, :1], None, None, False, *HOW),
            "scales must be .* 2 values",
        ),
        (
            lambda o, t: (o, [t], None, o[0, 0, 0], None, False, *HOW),
            "offsets must be .* 18 values",
        ),
        (lambda o, t: (o, [t], None, None, o[0, 0, 0], False, *HOW), "bias must be .* 2 values"),
        (
            lambda o, t: (o, [], o[0, 0, 0, :1].double(), None, None, True, *HOW),
            "scales must be float",
        ),
    ],
)
def test_writing_guards_memory(args: Callable[..., Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.tap_sum_into(*args(torch.zeros(2, 2, 8, 8), _taps()))


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda t, g: (t[:, :9], g, None, *HOW), r"k \* k times its channels"),
        (lambda t, g: (t.double(), g, None, *HOW), "must share a dtype"),
        (lambda t, g: (t, g[:, :, 1:], None, *HOW), "grad_output must be of the size"),
        (lambda t, g: (t, g, g[0, 0, 0], *HOW), "scale must be a 1-D CPU tensor of 1 values"),
        (lambda t, g: (t.mT, g, None, *HOW), "grad_taps must have unit stride"),
    ],
)
def test_writing_gradients_guards_memory(args: Callable[..., Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.tap_sum_backward_into(*args(_taps(), torch.zeros(2, 2, 8, 8)))
