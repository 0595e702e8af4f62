"""The op of attention in windows: its definition at sizes that blocks do not reach, the last bits,
values that are no numbers, PyTorch's machinery, and modules whose children are to be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cednets import assert_alike, randomized, results
from inputs import both_layouts, images
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastfuse
from fastfuse import backend
from fastfuse.backends import accumulation_dtype
from fastfuse.nn import StripeAttention, SwinBlock, WindowAttention
from fastfuse.ops.window_attention import window_attention
from fastfuse.tolerances import relative_error, tolerance

GRADIENTS = ("qkv", "qkv_bias", "bias", "local_weight", "local_bias")


def case(
    size: tuple[int, int], heads: int, head_size: int, windows: tuple[int, ...], *,
    batch: int = 2, qkv_bias: bool = False, centered: bool = False, bias: bool = False,
    local: bool = False, shift: int = 0, dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)
    channels, tokens = heads * head_size, windows[0] * windows[1]
    parameters = accumulation_dtype(dtype)
    return {
        "qkv": torch.randn(batch, *size, 3 * channels, dtype=dtype),
        "windows": windows,
        "heads": heads,
        "shift": shift,
        "centered": centered,
        "qkv_bias": torch.randn(3 * channels, dtype=parameters) if qkv_bias else None,
        "bias": torch.randn(heads, tokens, tokens, dtype=parameters) if bias else None,
        "local_weight": torch.randn(9, channels, dtype=parameters) if local else None,
        "local_bias": torch.randn(channels, dtype=parameters) if local else None,
    }


CASES: dict[str, dict[str, Any]] = {
    "of 49 tokens, shifted": {
        "size": (9, 17), "heads": 3, "head_size": 5, "windows": (7, 7), "qkv_bias": True,
        "bias": True, "shift": 3,
    },
    "shifted without a bias": {
        "size": (9, 10), "heads": 2, "head_size": 32, "windows": (4, 5), "qkv_bias": True,
        "shift": 2,
    },
    "smaller than a window": {
        "size": (2, 3), "heads": 1, "head_size": 40, "windows": (7, 7), "qkv_bias": True,
        "bias": True, "shift": 6,
    },
    "of one token": {"size": (3, 2), "heads": 2, "head_size": 1, "windows": (1, 1), "bias": True},
    "stripes": {
        "size": (11, 6), "heads": 4, "head_size": 8, "windows": (0, 2, 2, 0), "local": True,
        "centered": True,
    },
    "stripes of padding": {
        "size": (5, 5), "heads": 2, "head_size": 9, "windows": (0, 3, 3, 0), "local": True,
        "centered": True, "qkv_bias": True,
    },
    "of more tokens than a unit of work": {
        "size": (17, 16), "heads": 2, "head_size": 20, "windows": (0, 0), "local": True, "batch": 1,
    },
    "of many blocks": {
        "size": (17, 20), "heads": 1, "head_size": 33, "windows": (2, 3), "bias": True,
        "qkv_bias": True, "shift": 1,
    },
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def outputs(arguments: dict[str, Any], *, reference: bool = False) -> dict[str, Tensor]:
    leaves = {
        key: value.detach().requires_grad_() if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    with backend("reference" if reference else "auto"):
        output = window_attention(**leaves)
        torch.manual_seed(1)
        output.backward(torch.randn(output.shape).to(output.dtype))
    found = {"output": output.detach()}
    return found | {name: leaves[name].grad for name in GRADIENTS if arguments[name] is not None}


@pytest.mark.walks_memory
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_its_definition(name: str, dtype: torch.dtype) -> None:
    arguments = case(**CASES[name], dtype=dtype)
    exact = {
        key: value.double() if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    found, expected = outputs(arguments), outputs(exact, reference=True)
    for key, value in expected.items():
        error = relative_error(found[key], value)
        limit = 1e-12 if dtype == torch.float64 else tolerance(dtype, reduction=64, roundings=3)
        assert error < limit, (key, error)
        assert found[key].dtype == (
            dtype if key in ("output", "qkv") else accumulation_dtype(dtype)
        )


@every_case
def test_the_same_bits_for_any_number_of_threads(name: str) -> None:
    arguments = case(**CASES[name], dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(outputs(arguments))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_no_number_is_as_pytorch_has_it(value: float, place: int) -> None:
    arguments = case((4, 6), 2, 8, (2, 3), bias=True, dtype=torch.float32)
    arguments["qkv"][1, 2, 1, 16 * place + 3] = value
    found = window_attention(**arguments)
    with backend("reference"):
        expected = window_attention(**arguments)
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("value", [-1e29, -1e30, -1e31, -3.4e38, -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_masks(value: float, dtype: torch.dtype) -> None:
    """All of a row, and all but one key, which padding lanes must not join."""
    arguments = case((2, 3), 1, 8, (2, 3), bias=True, dtype=dtype)
    arguments["bias"][:, 1] = value
    arguments["bias"][:, 2, :5] = value
    found = outputs(arguments)
    expected = outputs(arguments, reference=True)
    torch.testing.assert_close(found["output"], expected["output"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["qkv"], expected["qkv"], rtol=1e-4, atol=1e-5)


def test_logits_far_apart() -> None:
    """Below e^-87 of the largest a weight is nothing."""
    arguments = case((2, 4), 1, 4, (2, 4), bias=True, dtype=torch.float32)
    arguments["bias"] *= 1000
    found = window_attention(**arguments)
    with backend("reference"):
        torch.testing.assert_close(found, window_attention(**arguments))


@pytest.mark.parametrize("name", ["of 49 tokens, shifted", "stripes"])
def test_pytorchs_checks_of_ops(name: str) -> None:
    arguments = case(**CASES[name], dtype=torch.float32)
    tensors = [arguments[key] for key in GRADIENTS]
    numbers = (arguments["heads"], list(arguments["windows"]), arguments["shift"],
               arguments["centered"])  # fmt: skip
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.fastfuse.window_attention.default, (*leaves, *numbers))


@pytest.mark.walks_memory
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 4, 6, 47)}, "heads must divide the channels"),
        ({"qkv": torch.zeros(2, 4, 6, 48).transpose(1, 2)}, "qkv must be a contiguous CPU tensor"),
        ({"qkv": torch.zeros(2, 4, 6, 48).int()}, "qkv must be float64"),
        ({"qkv": torch.zeros(2, 0, 6, 48)}, "qkv must be at least 1"),
        ({"bias": torch.zeros(2, 6, 5)}, "bias must be a contiguous CPU tensor of the right size"),
        ({"qkv_bias": torch.zeros(48).double()}, "qkv_bias must be a contiguous CPU tensor"),
        ({"local_weight": torch.zeros(16, 9).t()}, "local_weight must be a contiguous CPU tensor"),
        ({"local_bias": torch.zeros(16)}, "local_bias must come with a local_weight"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"heads": 3}, "heads must divide the channels"),
        ({"windows": [2]}, "windows must be pairs"),
        ({"windows": [2, -3]}, "windows must be at least 0"),
        ({"windows": [0, 2, 2, 0]}, "bias must come with windows of one shape"),
        ({"shift": 2}, "shift must be below 2"),
        ({"shift": -1}, "shift must be at least 0"),
        ({"shift": 1, "centered": True}, "shift must be 0 where padding is on all sides"),
        ({"windows": [2**30, 2**30]}, "windows must have at most"),
        ({"windows": [2**31, 1]}, "windows must be below"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_op_itself_refuses_what_it_would_read_past(
    change: dict[str, Any], message: str
) -> None:
    arguments = case((4, 6), 2, 8, (2, 3), bias=True, dtype=torch.float32) | change
    named = {key: arguments[key] for key in (*GRADIENTS, "heads", "windows", "shift", "centered")}
    named["windows"] = list(named["windows"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfuse.window_attention(**named)


def test_a_gradient_of_another_size_is_refused() -> None:
    grad, qkv = torch.zeros(1, 4, 4, 15), torch.zeros(1, 4, 4, 48)
    with pytest.raises(RuntimeError, match="grad must be a contiguous CPU tensor"):
        torch.ops.fastfuse.window_attention_backward(
            grad, qkv, None, None, None, 2, [2, 2], 0, False
        )


def test_second_derivatives_name_what_has_them() -> None:
    arguments = case((4, 4), 1, 4, (2, 2), dtype=torch.float32)
    qkv = arguments.pop("qkv").requires_grad_()
    (grad,) = torch.autograd.grad(window_attention(qkv, **arguments).sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="window_attention: expected first derivatives"):
        grad.sum().backward()


def test_flops_are_those_of_windows() -> None:
    arguments = case((4, 6), 2, 8, (0, 2, 2, 0), batch=3)
    with FlopCounterMode(display=False) as counter:
        window_attention(**arguments)
    assert counter.get_total_flops() == 4 * 3 * 24 * 8 * (4 * 2 + 2 * 6)


# ---- modules ------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """What an adapter is."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inside(x)


@both_layouts
@pytest.mark.parametrize("size", [(9, 14), (5, 3)], ids=str)
def test_children_of_another_kind_are_called(size: tuple[int, int], channels_last: bool) -> None:
    (x,) = images((2, 12, *size), dtype=torch.float64, channels_last=channels_last)
    windows = randomized(WindowAttention(12, 3, shift=3)).double()
    stripes = randomized(StripeAttention(12, 2, stripe=2)).double()
    doubled, tripled = (
        WindowAttention(12, 3, shift=3).double(),
        StripeAttention(12, 2, stripe=2).double(),
    )
    doubled.load_state_dict(windows.state_dict())
    tripled.load_state_dict(stripes.state_dict())
    windows.qkv = Doubled(windows.qkv)
    stripes.lepe[1] = Doubled(stripes.lepe[1])
    with torch.no_grad():
        for parameter in (*doubled.qkv.parameters(), *tripled.lepe[1].parameters()):
            parameter *= 2
    for wrapped, plain in ((windows, doubled), (stripes, tripled)):
        found, expected = results(wrapped, x), results(plain, x)
        for key in ("output 0", "relative_position_bias_table", "lepe.0.weight", "proj.weight"):
            if key in expected:
                assert relative_error(found[key], expected[key]) < 1e-12, key


@pytest.mark.parametrize("child", ["qkv", "proj", "lepe.0"])
def test_hooks_of_children_see_every_call(child: str) -> None:
    attention = randomized(StripeAttention(12, 2, stripe=2))
    x, calls = torch.randn(1, 12, 5, 7), []
    expected = attention(x)
    attention.get_submodule(child).register_forward_hook(lambda *_: calls.append(child))
    torch.testing.assert_close(attention(x), expected)
    assert calls == [child]
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        attention(x)
    finally:
        handle.remove()
    assert attention.lepe[1] in calls


def test_what_runs_is_explained() -> None:
    attention = StripeAttention(12, 2, stripe=2)
    assert fastfuse.explain(attention) == {"": None}
    attention.lepe[1] = Doubled(attention.lepe[1])
    (reason,) = fastfuse.explain(attention).values()
    assert reason is not None
    assert reason.startswith("lepe.1 is a ")
    windows = WindowAttention(12, 2)
    windows.qkv.register_forward_hook(lambda *_: None)
    assert fastfuse.explain(windows) == {"": "qkv has hooks"}


@pytest.mark.parametrize("attention", [WindowAttention, StripeAttention])
def test_without_biases(attention: Callable[..., Any]) -> None:
    m = randomized(attention(12, 2)).double()
    m.qkv = nn.Linear(12, 36, bias=False).double()
    for i, lepe in enumerate(getattr(m, "lepe", [])):
        m.lepe[i] = nn.Conv2d(*lepe.weight.shape[:1] * 2, 3, 1, 1, groups=6, bias=False).double()
    (x,) = images((2, 12, 9, 8), dtype=torch.float64, channels_last=True)
    found = results(m, x)
    with backend("reference"):
        assert_alike(found, results(m, x), 1e-12)


def test_a_table_of_one_window_is_swins() -> None:
    """Row (dy + w - 1) (2 w - 1) + dx + w - 1 of a query at (dy, dx) from its key."""
    w = 3
    attention = WindowAttention(4, 1, window=w)
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij"))
    index = (y[:, None] - y + w - 1) * (2 * w - 1) + x[:, None] - x + w - 1
    expected = attention.relative_position_bias_table[index, 0]
    assert torch.equal(attention._bias()[0], expected)


def test_heights_and_widths_of_an_exported_block_are_open() -> None:
    block = randomized(SwinBlock(64, shift=3)).eval()
    sizes = {2: torch.export.Dim("h", min=2, max=99), 3: torch.export.Dim("w", min=2, max=99)}
    program = torch.export.export(block, (torch.randn(2, 64, 9, 13),), dynamic_shapes=(sizes,))
    x = torch.randn(2, 64, 20, 7)
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    attention = randomized(WindowAttention(64, shift=3))
    x = torch.randn(1, 64, 9, 12)
    expected = attention(x)
    with torch.autocast("cpu", dtype):
        found = attention(x)
    assert found.dtype == dtype
    assert relative_error(found, expected) < tolerance(dtype, reduction=64, roundings=4)
    with torch.autocast("cpu", dtype), fastfuse.backend("reference"):
        assert relative_error(attention(x), expected) < tolerance(dtype, reduction=64, roundings=6)
