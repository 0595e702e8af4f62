"""upsample_add with bad input: every error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfuse import upsample_add

OP = "upsample_add"


def _x(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 3, 4, 4))


BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rank 3": (
        lambda: upsample_add(_x(3, 4, 4), _x()),
        ValueError,
        r"x must have 4 dimensions \(N, C, H, W\); got shape \(3, 4, 4\)",
    ),
    "rank 5": (
        lambda: upsample_add(_x(), _x(1, 2, 3, 4, 4)),
        ValueError,
        r"skip must have 4 dimensions",
    ),
    "differing C": (
        lambda: upsample_add(_x(), _x(2, 5, 8, 8)),
        ValueError,
        r"skip must have the input's batch size and channels, N, C = 2, 3; got 2, 5",
    ),
    "differing N": (
        lambda: upsample_add(_x(), _x(1, 3, 8, 8)),
        ValueError,
        r"N, C = 2, 3; got 1, 3",
    ),
    "no width": (
        lambda: upsample_add(_x(), _x(2, 3, 8, 0)),
        ValueError,
        r"skip must be at least 1 pixel high and wide; got shape \(2, 3, 8, 0\)",
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
    ("x", "skip", "message"),
    [
        (_x(), _x(2, 5, 8, 8), "share N, C"),
        (_x(), _x().double(), "share a dtype"),
        (_x().int(), _x().int(), "got Int"),
        (_x(3, 4, 4), _x(), "4 dimensions"),
        (_x(2, 3, 0, 4), _x(), "at least 1"),
        (_x(), _x(2, 3, 4, 0), "at least 1"),
    ],
)
def test_the_op_itself_guards_memory(x: Tensor, skip: Tensor, message: str) -> None:
    """Called past the public function, it refuses instead of reading beyond its inputs."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.upsample_add(x, skip, False, False)
