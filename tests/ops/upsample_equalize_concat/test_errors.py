"""upsample_equalize_concat with bad input: every error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import images
from torch import Tensor

from fastfuse import upsample_equalize_concat

OP = "upsample_equalize_concat"


def _one() -> list[Tensor]:
    return images((2, 3, 4, 4), (2, 5, 2, 2))


BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no features": (
        lambda: upsample_equalize_concat([]),
        ValueError,
        r"features must have at least one level; got none",
    ),
    "one tensor": (
        lambda: upsample_equalize_concat(_one()[0]),
        TypeError,
        r"features must be a sequence of tensors, one per level; got Tensor",
    ),
    "differing N": (
        lambda: upsample_equalize_concat([_one()[0], _one()[1][:1]]),
        ValueError,
        r"share one batch size N; features\[0\] has 2, features\[1\] has 1",
    ),
    "differing device": (
        lambda: upsample_equalize_concat([_one()[0], _one()[1].to("meta")]),
        ValueError,
        r"features\[0\] is on cpu, features\[1\] is on meta",
    ),
    "differing dtype": (
        lambda: upsample_equalize_concat([_one()[0], _one()[1].double()]),
        ValueError,
        r"features\[0\] is float32, features\[1\] is float64",
    ),
    "complex": (
        lambda: upsample_equalize_concat([_one()[0].to(torch.complex64)]),
        ValueError,
        r"got complex64",
    ),
    "float8": (
        lambda: upsample_equalize_concat([_one()[0].to(torch.float8_e4m3fn)]),
        ValueError,
        r"must be float64, float32, bfloat16 or float16; got float8_e4m3fn",
    ),
    "no height": (
        lambda: upsample_equalize_concat([_one()[0][:, :, :0]], size=(4, 4)),
        ValueError,
        r"features\[0\] must be at least 1 pixel high and wide; got shape \(2, 3, 0, 4\)",
    ),
    "size of one": (
        lambda: upsample_equalize_concat(_one(), size=(4,)),
        ValueError,
        r"size must be two positive ints \(height, width\) below 2\^31; got \(4,\)",
    ),
    "size an int": (
        lambda: upsample_equalize_concat(_one(), size=4),
        ValueError,
        r"size must be two positive ints \(height, width\) below 2\^31; got 4",
    ),
    "size of floats": (
        lambda: upsample_equalize_concat(_one(), size=(4.0, 4)),
        ValueError,
        r"size must be two positive ints",
    ),
    "size zero": (
        lambda: upsample_equalize_concat(_one(), size=(4, 0)),
        ValueError,
        r"size must be two positive ints",
    ),
    "size too large": (
        lambda: upsample_equalize_concat(_one(), size=(2**31, 1)),
        ValueError,
        r"size must be two positive ints \(height, width\) below 2\^31; got \(2147483648, 1\)",
    ),
    "mean that learns": (
        lambda: upsample_equalize_concat(_one(), mean=torch.ones(2, requires_grad=True)),
        ValueError,
        r"mean must be constant; got a tensor that requires grad",
    ),
    "mean beyond float32": (
        lambda: upsample_equalize_concat(_one(), mean=[10**400, 0.0]),
        ValueError,
        r"mean\[0\] must be finite; got 1000",
    ),
    "std without an inverse": (
        lambda: upsample_equalize_concat(_one(), std=[1.0, 1e-39]),
        ValueError,
        r"std\[1\] must be positive \(at least 1.18e-38\) and finite; got 1e-39",
    ),
    "mean too long": (
        lambda: upsample_equalize_concat(_one(), mean=[0.0] * 3),
        ValueError,
        r"mean must have one value per level, 2; got 3",
    ),
    "mean of the wrong shape": (
        lambda: upsample_equalize_concat(_one(), mean=torch.zeros(2, 1)),
        ValueError,
        r"mean must have one value per level, shape \(2,\); got shape \(2, 1\)",
    ),
    "mean a float": (
        lambda: upsample_equalize_concat(_one(), mean=0.5),
        TypeError,
        r"mean must be a sequence of 2 floats, a tensor of shape \(2,\) or None; got float",
    ),
    "mean of words": (
        lambda: upsample_equalize_concat(_one(), mean=["a", "b"]),
        TypeError,
        r"mean\[0\] must be a float; got str",
    ),
    "mean of integers": (
        lambda: upsample_equalize_concat(_one(), mean=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"mean must be a floating-point tensor; got int64",
    ),
    "mean infinite": (
        lambda: upsample_equalize_concat(_one(), mean=[0.0, float("inf")]),
        ValueError,
        r"mean\[1\] must be finite; got inf",
    ),
    "mean elsewhere": (
        lambda: upsample_equalize_concat(_one(), mean=torch.zeros(2, device="meta")),
        ValueError,
        r"mean must be on the features' device cpu; got one on meta",
    ),
    "std zero": (
        lambda: upsample_equalize_concat(_one(), std=[1.0, 0.0]),
        ValueError,
        r"std\[1\] must be positive .* and finite; got 0.0",
    ),
    "std negative": (
        lambda: upsample_equalize_concat(_one(), std=[-1.0, 1.0]),
        ValueError,
        r"std\[0\] must be positive .* and finite; got -1.0",
    ),
    "std NaN": (
        lambda: upsample_equalize_concat(_one(), std=[1.0, float("nan")]),
        ValueError,
        r"std\[1\] must be positive .* and finite; got nan",
    ),
    "std that learns": (
        lambda: upsample_equalize_concat(_one(), std=torch.ones(2, requires_grad=True)),
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


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda f, m: ([], 8, 8, None, None, False, False), "requires a non-empty list"),
        (lambda f, m: (f, 2**31, 8, None, None, False, False), r"at most 2\^31 - 1"),
        (lambda f, m: (f, 8, 0, None, None, False, False), "at least 1"),
        (lambda f, m: ([f[0], f[1][:1]], 8, 8, None, None, False, False), "share N"),
        (lambda f, m: ([f[0], f[1].double()], 8, 8, None, None, False, False), "share a dtype"),
        (lambda f, m: ([f[0].int()], 8, 8, None, None, False, False), "got Int"),
        (lambda f, m: ([f[0][0]], 8, 8, None, None, False, False), "4 dimensions"),
        (lambda f, m: (f, 8, 8, m[:1], None, False, False), "1-D CPU tensor of 2 values"),
        (lambda f, m: (f, 8, 8, None, m.int(), False, False), "float32 or float64"),
    ],
)
def test_the_op_itself_guards_memory(args: Callable[..., Any], message: str) -> None:
    """Called past the public function, it refuses instead of reading beyond its inputs."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.upsample_equalize_concat(*args(_one(), torch.ones(2)))


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (([0, 3], [3], [4, 2], [4, 2]), "one entry per level"),
        (([0, 3], [3, 6], [4, 2], [4, 2]), "must have the levels' channels"),
        (([-1], [3], [4], [4]), "must have the levels' channels"),
        (([0], [3], [0], [4]), "at least 1"),
    ],
)
def test_the_backward_op_itself_guards_memory(shapes: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.upsample_equalize_concat_backward(
            torch.randn(2, 8, 4, 4), *shapes, None, False, False
        )
