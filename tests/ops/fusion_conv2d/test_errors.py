"""fusion_conv2d with bad input: every error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import images
from torch import Tensor

from fastfuse import fusion_conv2d

OP = "fusion_conv2d"


def _levels() -> list[Tensor]:
    return images((2, 3, 4, 4), (2, 5, 2, 2))


def _weight(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 8, 3, 3)))


def _call(features: Any = None, weight: Any = None, bias: Any = None, **options: Any) -> Tensor:
    features = _levels() if features is None else features
    return fusion_conv2d(features, _weight() if weight is None else weight, bias, **options)


BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no features": (
        lambda: _call([]),
        ValueError,
        r"features must have at least one level; got none",
    ),
    "one tensor": (
        lambda: _call(_levels()[0]),
        TypeError,
        r"features must be a sequence of tensors, one per level; got Tensor",
    ),
    "no output channels": (
        lambda: _call(weight=_weight(0, 8, 3, 3)),
        ValueError,
        r"weight must have at least 1 output channel; got shape \(0, 8, 3, 3\)",
    ),
    "differing N": (
        lambda: _call([_levels()[0], _levels()[1][:1]]),
        ValueError,
        r"share one batch size N; features\[0\] has 2, features\[1\] has 1",
    ),
    "differing device": (
        lambda: _call([_levels()[0], _levels()[1].to("meta")]),
        ValueError,
        r"features\[0\] is on cpu, features\[1\] is on meta",
    ),
    "differing dtype": (
        lambda: _call([_levels()[0], _levels()[1].double()]),
        ValueError,
        r"features\[0\] is float32, features\[1\] is float64",
    ),
    "no height": (
        lambda: _call([_levels()[0], _levels()[1][:, :, :0]]),
        ValueError,
        r"features\[1\] must be at least 1 pixel high and wide; got shape \(2, 5, 0, 2\)",
    ),
    "weight None": (
        lambda: fusion_conv2d(_levels(), None),
        TypeError,
        r"weight must be a tensor; got NoneType",
    ),
    "weight of rank 3": (
        lambda: _call(weight=_weight(6, 8, 3)),
        ValueError,
        r"weight must have 4 dimensions \(C_out, sum C_i, k, k\); got shape \(6, 8, 3\)",
    ),
    "kernel even": (
        lambda: _call(weight=_weight(6, 8, 2, 2)),
        ValueError,
        r"weight must have a square kernel of odd size; got shape \(6, 8, 2, 2\)",
    ),
    "kernel not square": (
        lambda: _call(weight=_weight(6, 8, 1, 3)),
        ValueError,
        r"weight must have a square kernel of odd size; got shape \(6, 8, 1, 3\)",
    ),
    "kernel of no size": (
        lambda: _call(weight=_weight(6, 8, 0, 0)),
        ValueError,
        r"weight must have a square kernel of odd size; got shape \(6, 8, 0, 0\)",
    ),
    "channels": (
        lambda: _call(weight=_weight(6, 9, 3, 3)),
        ValueError,
        r"weight must have as many input channels as the levels have together, 8 \(3 \+ 5\); got 9",
    ),
    "bias a float": (
        lambda: _call(bias=0.5),
        TypeError,
        r"bias must be a tensor; got float",
    ),
    "bias too short": (
        lambda: _call(bias=torch.zeros(5)),
        ValueError,
        r"bias must have one value per output channel, shape \(6,\); got shape \(5,\)",
    ),
    "bias of rank 2": (
        lambda: _call(bias=torch.zeros(6, 1)),
        ValueError,
        r"bias must have one value per output channel, shape \(6,\); got shape \(6, 1\)",
    ),
    "padding negative": (
        lambda: _call(padding=-1),
        ValueError,
        r"padding must be at least 0 and below 2\^30; got -1",
    ),
    "padding a pair": (
        lambda: _call(padding=(1, 1)),
        TypeError,
        r"padding must be an int; got tuple",
    ),
    "padding a bool": (
        lambda: _call(padding=True),
        TypeError,
        r"padding must be an int; got bool",
    ),
    "no pixel left": (
        lambda: _call(size=(2, 9), padding=0),
        ValueError,
        r"size and padding must leave at least 1 pixel for a kernel of 3; "
        r"got size \(2, 9\) and padding 0",
    ),
    "size an int": (
        lambda: _call(size=4),
        ValueError,
        r"size must be two positive ints \(height, width\) below 2\^31; got 4",
    ),
    "size of floats": (
        lambda: _call(size=(4.0, 4)),
        ValueError,
        r"size must be two positive ints",
    ),
    "size zero": (
        lambda: _call(size=(4, 0)),
        ValueError,
        r"size must be two positive ints .*; got \(4, 0\)",
    ),
    "size too large": (
        lambda: _call(size=(2**31, 1)),
        ValueError,
        r"size must be two positive ints .*; got \(2147483648, 1\)",
    ),
    "mean that learns": (
        lambda: _call(mean=torch.ones(2, requires_grad=True)),
        ValueError,
        r"mean must be constant; got a tensor that requires grad",
    ),
    "mean too long": (
        lambda: _call(mean=[0.0] * 3),
        ValueError,
        r"mean must have one value per level, 2; got 3",
    ),
    "mean of the wrong shape": (
        lambda: _call(mean=torch.zeros(2, 1)),
        ValueError,
        r"mean must have one value per level, shape \(2,\); got shape \(2, 1\)",
    ),
    "mean a float": (
        lambda: _call(mean=0.5),
        TypeError,
        r"mean must be a sequence of 2 floats, a tensor of shape \(2,\) or None; got float",
    ),
    "mean of words": (
        lambda: _call(mean=["a", "b"]),
        TypeError,
        r"mean\[0\] must be a float; got str",
    ),
    "mean of integers": (
        lambda: _call(mean=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"mean must be a floating-point tensor; got int64",
    ),
    "mean infinite": (
        lambda: _call(mean=[0.0, float("inf")]),
        ValueError,
        r"mean\[1\] must be finite; got inf",
    ),
    "mean elsewhere": (
        lambda: _call(mean=torch.zeros(2, device="meta")),
        ValueError,
        r"mean must be on the features' device cpu; got one on meta",
    ),
    "std zero": (
        lambda: _call(std=[1.0, 0.0]),
        ValueError,
        r"std\[1\] must be positive .* and finite; got 0.0",
    ),
    "std NaN": (
        lambda: _call(std=[1.0, float("nan")]),
        ValueError,
        r"std\[1\] must be positive .* and finite; got nan",
    ),
    "std without an inverse": (
        lambda: _call(std=[1.0, 1e-39]),
        ValueError,
        r"std\[1\] must be positive \(at least 1.18e-38\) and finite; got 1e-39",
    ),
    "std that learns": (
        lambda: _call(std=torch.ones(2, requires_grad=True)),
        ValueError,
        r"std must be constant; got a tensor that requires grad",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(any_backend: str, case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith(f"{OP}: ")


@pytest.mark.parametrize("case", [name for name in BAD_INPUT if "dtype" not in name])
def test_bad_input_under_autocast(case: str) -> None:
    """Casting comes after the checks of types, and the others name what they got all the same."""
    call, error, _ = BAD_INPUT[case]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(f"{OP}: ")


def test_a_bias_that_is_too_wide(any_backend: str) -> None:
    """float32 beside narrow features is right, and the same as under autocast."""
    features, weight = [f.bfloat16() for f in _levels()], _weight().bfloat16()
    expected = r"^fusion_conv2d: bias must have the input's dtype bfloat16 or float32; got float64"
    with pytest.raises(ValueError, match=expected):
        _call(features, weight, torch.zeros(6).double())
    bias = torch.randn(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _call(_levels(), weight, bias)
    assert found.dtype == _call(features, weight, bias).dtype == torch.bfloat16


def test_mixed_dtypes_are_fine_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = _call(weight=_weight().half(), bias=torch.zeros(6).bfloat16())
    assert output.dtype == torch.bfloat16
