"""ced_block and lr_ced_block with bad input: every error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Block, both_blocks
from torch import Tensor

Change = Callable[[dict[str, Any]], dict[str, Any]]

# What is changed of good arguments, by name; the error; its message.
BAD_INPUT: dict[str, tuple[Change, type[Exception], str]] = {
    "x without height": (
        lambda a: {"x": a["x"][:, :, :0]},
        ValueError,
        r"x must be at least 1 pixel high and wide; got shape \(2, 6, 0, 4\)",
    ),
    "x without channels": (
        lambda a: {"x": a["x"][:, :0]},
        ValueError,
        r"x must have at least 1 channel; got shape \(2, 0, 5, 4\)",
    ),
    "x of other channels": (
        lambda a: {"x": a["x"][:, :5]},
        ValueError,
        r"fc1_weight must have shape \(hidden, C\) = \(at least 1, 5\); got shape \(24, 6\)",
    ),
    "dw_weight None": (
        lambda a: {"dw_weight": None},
        TypeError,
        r"dw_weight must be a tensor; got NoneType",
    ),
    "dw_weight of an even kernel": (
        lambda a: {"dw_weight": a["dw_weight"][..., :6, :6]},
        ValueError,
        r"dw_weight must have shape \(C, 1, k, k\) with k odd and C = 6; got \(6, 1, 6, 6\)",
    ),
    "dw_weight not square": (
        lambda a: {"dw_weight": a["dw_weight"][..., :5]},
        ValueError,
        r"dw_weight must have shape \(C, 1, k, k\) with k odd and C = 6; got \(6, 1, 7, 5\)",
    ),
    "dw_weight of other channels": (
        lambda a: {"dw_weight": a["dw_weight"][:5]},
        ValueError,
        r"dw_weight must have shape \(C, 1, k, k\) with k odd and C = 6; got \(5, 1, 7, 7\)",
    ),
    "dw_bias None": (
        lambda a: {"dw_bias": None},
        TypeError,
        r"dw_bias must be a tensor; got NoneType",
    ),
    "dw_bias too long": (
        lambda a: {"dw_bias": torch.zeros(7)},
        ValueError,
        r"dw_bias must have one value per channel, shape \(6,\); got shape \(7,\)",
    ),
    "norm_weight a float": (
        lambda a: {"norm_weight": 1.0},
        TypeError,
        r"norm_weight must be a tensor; got float",
    ),
    "norm_weight of rank 0": (
        lambda a: {"norm_weight": torch.ones(())},
        ValueError,
        r"norm_weight must have one value per channel, shape \(6,\); got shape \(\)",
    ),
    "fc1_weight a convolution's": (
        lambda a: {"fc1_weight": a["fc1_weight"][:, :, None, None]},
        ValueError,
        r"fc1_weight must have shape .* = \(at least 1, 6\); got shape \(24, 6, 1, 1\)",
    ),
    "fc1_weight transposed": (
        lambda a: {"fc1_weight": a["fc1_weight"].t()},
        ValueError,
        r"fc1_weight must have shape .* = \(at least 1, 6\); got shape \(6, 24\)",
    ),
    "fc1_weight of no rows": (
        lambda a: {"fc1_weight": a["fc1_weight"][:0]},
        ValueError,
        r"fc1_weight must have shape .* = \(at least 1, 6\); got shape \(0, 6\)",
    ),
    "fc1_bias of the channels": (
        lambda a: {"fc1_bias": torch.zeros(6)},
        ValueError,
        r"fc1_bias must have one value per row of fc1_weight, shape \(24,\); got shape \(6,\)",
    ),
    "fc2_weight not transposed": (
        lambda a: {"fc2_weight": a["fc1_weight"]},
        ValueError,
        r"fc2_weight must have shape \(C, hidden\) = \(6, 24\); got shape \(24, 6\)",
    ),
    "fc2_weight of another width": (
        lambda a: {"fc2_weight": a["fc2_weight"][:, :-1]},
        ValueError,
        r"fc2_weight must have shape \(C, hidden\) = \(6, 24\); got shape \(6, 23\)",
    ),
    "fc2_bias of the hidden width": (
        lambda a: {"fc2_bias": torch.zeros(24)},
        ValueError,
        r"fc2_bias must have one value per channel, shape \(6,\); got shape \(24,\)",
    ),
    "layer_scale a float": (
        lambda a: {"layer_scale": 1e-6},
        TypeError,
        r"layer_scale must be a tensor; got float",
    ),
    "layer_scale of rank 4": (
        lambda a: {"layer_scale": torch.ones(6, 1, 1, 1)},
        ValueError,
        r"layer_scale must have one value per channel, shape \(6,\); got shape \(6, 1, 1, 1\)",
    ),
    "keep a float": (lambda a: {"keep": 0.5}, TypeError, r"keep must be a tensor; got float"),
    "keep too short": (
        lambda a: {"keep": torch.ones(1)},
        ValueError,
        r"keep must have one value per sample, shape \(2,\); got shape \(1,\)",
    ),
    "keep of rank 4": (
        lambda a: {"keep": torch.ones(2, 1, 1, 1)},
        ValueError,
        r"keep must have one value per sample, shape \(2,\); got shape \(2, 1, 1, 1\)",
    ),
    "keep of bools": (
        lambda a: {"keep": torch.tensor([True, False])},
        ValueError,
        r"keep must be a floating-point tensor; got bool",
    ),
    "keep of integers": (
        lambda a: {"keep": torch.tensor([1, 0])},
        ValueError,
        r"keep must be a floating-point tensor; got int64",
    ),
    "keep that requires grad": (
        lambda a: {"keep": torch.ones(2, requires_grad=True)},
        ValueError,
        r"keep must be constant; got a tensor that requires grad \(use .detach\(\)\)",
    ),
    "keep elsewhere": (
        lambda a: {"keep": torch.ones(2, device="meta")},
        ValueError,
        r"keep must be on the input's device cpu; got one on meta",
    ),
    "eps zero": (lambda a: {"eps": 0}, ValueError, r"eps must be above 0 and finite; got 0"),
    "eps negative": (
        lambda a: {"eps": -1e-6},
        ValueError,
        r"eps must be above 0 and finite; got -1e-06",
    ),
    "eps infinite": (
        lambda a: {"eps": float("inf")},
        ValueError,
        r"eps must be above 0 and finite; got inf",
    ),
    "eps not a number": (
        lambda a: {"eps": float("nan")},
        ValueError,
        r"eps must be above 0 and finite; got nan",
    ),
    "eps a word": (lambda a: {"eps": "small"}, TypeError, r"eps must be a number; got str"),
    "eps a bool": (lambda a: {"eps": True}, TypeError, r"eps must be a number; got bool"),
    "eps a tensor": (
        lambda a: {"eps": torch.tensor(1e-6)},
        TypeError,
        r"eps must be a number; got Tensor",
    ),
}
LONG_RANGE_ONLY: dict[str, tuple[Change, type[Exception], str]] = {
    "dw2_weight None": (
        lambda a: {"dw2_weight": None},
        TypeError,
        r"dw2_weight must be a tensor; got NoneType",
    ),
    "dw2_weight of an even kernel": (
        lambda a: {"dw2_weight": a["dw2_weight"][..., :4, :4]},
        ValueError,
        r"dw2_weight must have shape \(C, 1, k, k\) with k odd and C = 6; got \(6, 1, 4, 4\)",
    ),
    "norm2_weight too short": (
        lambda a: {"norm2_weight": torch.ones(5)},
        ValueError,
        r"norm2_weight must have one value per channel, shape \(6,\); got shape \(5,\)",
    ),
    "dilation zero": (
        lambda a: {"dilation": 0},
        ValueError,
        r"dilation must be at least 1 and below 2\^15; got 0",
    ),
    "dilation a float": (
        lambda a: {"dilation": 3.0},
        TypeError,
        r"dilation must be an int; got float",
    ),
}


def arguments(block: Block, change: Change = lambda a: {}) -> dict[str, Any]:
    names = ["x", *(name.removesuffix("?") for name in block.parameters)]
    good: dict[str, Any] = dict(zip(names, block.inputs((2, 6, 5, 4), 24), strict=True))
    return {**good, **change(good)}


def check(block: Block, case: tuple[Change, type[Exception], str]) -> None:
    change, error, message = case
    with pytest.raises(error, match=message) as raised:
        block.call(**arguments(block, change))
    assert str(raised.value).startswith(f"{block.name}: ")


@both_blocks
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(any_backend: str, case: str, block: Block) -> None:
    check(block, BAD_INPUT[case])


@pytest.mark.parametrize("case", LONG_RANGE_ONLY)
def test_bad_input_of_the_second_step(any_backend: str, case: str) -> None:
    from blocks import BLOCKS

    check(BLOCKS["lr_ced_block"], LONG_RANGE_ONLY[case])


@both_blocks
def test_an_integer_norm_under_autocast(block: Block) -> None:
    """Autocast casts floating-point tensors, and hides no mistake."""
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="norm_weigh"):
        block.call(**arguments(block, lambda a: {"norm_weight": a["norm_weight"].int()}))


def changed(name: str, change: Callable[[Tensor], Any]) -> Change:
    return lambda a: {name: change(a[name])}


@pytest.mark.walks_memory
@both_blocks
@pytest.mark.parametrize("keeping", ["", "_keeping"])
@pytest.mark.parametrize(
    "change",
    [
        changed("x", lambda t: t[0]),
        changed("x", lambda t: t[:, :5]),
        changed("x", lambda t: t.int()),
        changed("dw_weight", lambda t: t[:5]),
        changed("dw_weight", lambda t: t[..., :6, :6]),
        changed("dw_bias", lambda t: t[:5]),
        changed("norm_weight", lambda t: t[:5]),
        changed("norm_bias", lambda t: t[:, None]),
        changed("fc1_weight", lambda t: t[:, :5]),
        changed("fc1_weight", lambda t: t.double()),
        changed("fc1_bias", lambda t: t[:23]),
        changed("fc2_weight", lambda t: t[:, :23]),
        changed("fc2_bias", lambda t: t[:5]),
        changed("layer_scale", lambda t: t[:5]),
        lambda a: {"keep": torch.ones(1)},
        lambda a: {"keep": torch.ones(2).double()},
    ],
)
def test_the_op_itself_guards_memory(change: Change, keeping: str, block: Block) -> None:
    """Called past the public function, it refuses instead of reading beyond its inputs."""
    given = arguments(block, change)
    keep = given.pop("keep", None)
    op = getattr(torch.ops.fastfuse, block.name + keeping)
    with pytest.raises((RuntimeError, IndexError)):
        op(*given.values(), keep, *block.option(), False)


@pytest.mark.walks_memory
@both_blocks
@pytest.mark.parametrize(
    "change",
    [
        lambda grad, kept: (grad[0], kept),
        lambda grad, kept: (grad[:, 1:], []),
        lambda grad, kept: (grad[..., 1:], kept),
        lambda grad, kept: (grad.double(), []),
        lambda grad, kept: (grad, kept[:-1]),
        lambda grad, kept: (grad, [kept[0][:1], *kept[1:]]),
        lambda grad, kept: (grad, [kept[0].double(), *kept[1:]]),
        lambda grad, kept: (grad, [*kept[:-1], kept[-1][:1]]),
        lambda grad, kept: (grad, [*kept[:-1], kept[-1].contiguous()]),
    ],
)
def test_the_backward_op_itself_guards_memory(
    change: Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]], block: Block
) -> None:
    x, *parameters = arguments(block).values()
    op = getattr(torch.ops.fastfuse, f"{block.name}_keeping")
    output, *kept = op(x, *parameters, None, *block.option(), False)
    grad, kept = change(torch.randn_like(output), kept)
    backward = getattr(torch.ops.fastfuse, f"{block.name}_backward")
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        backward(grad, x, *parameters, kept, None, *block.option(), True, True, False)
