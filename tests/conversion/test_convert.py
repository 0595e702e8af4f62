"""convert: forwards replaced in place, and everything else as before."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfuse
from fastfuse.conversion.pattern import PATTERNS
from fastfuse.nn.composition import CONVERTED

DEPTHWISE = "torch.nn.modules.conv:Conv2d"


class Head(nn.Module):
    """Somebody's: a fusion written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        size = fine.shape[2:]
        up = nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        return self.conv(torch.cat([fine, up], dim=1))


class OwnHead(Head):
    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return 2 * super().forward(fine, coarse)


class RenamedHead(Head):
    """Its forward is Head's."""


@pytest.fixture
def known() -> Iterator[list[str]]:
    """Head is, and calls of its pattern are counted."""
    calls: list[str] = []
    before, converted = dict(PATTERNS), set(CONVERTED)

    @fastfuse.register_pattern(f"{Head.__module__}:Head")
    def head(self: Any, fine: Tensor, coarse: Tensor) -> Tensor:
        calls.append("ours")
        from fastfuse.conversion.parts import convolved

        return convolved(self.conv, [fine, coarse], fine.shape[2:])

    sys.modules[Head.__module__] = sys.modules[__name__]
    yield calls
    PATTERNS.clear()
    PATTERNS.update(before)
    CONVERTED.clear()
    CONVERTED.update(converted)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 16, 16), torch.randn(2, 8, 4, 4)


def test_results_keys_and_classes_stay(known: list[str]) -> None:
    model = nn.ModuleDict({"head": Head(), "other": nn.Linear(3, 3)})
    keys, head = list(model.state_dict()), model["head"]
    levels = inputs()
    expected = head(*levels)
    report = fastfuse.convert(model)
    assert report.converted == ["head", "head.conv"]
    assert known == []
    torch.testing.assert_close(head(*levels), expected)
    assert known == ["ours"]
    assert list(model.state_dict()) == keys
    assert type(head) is Head
    assert fastfuse.convert(model).converted == ["head", "head.conv"]
    assert fastfuse.revert(model) == ["head", "head.conv"]
    assert torch.equal(head(*levels), expected)
    assert known == ["ours"]
    assert "forward" not in head.__dict__
    assert fastfuse.revert(model) == []


def test_a_dry_run_changes_nothing(known: list[str]) -> None:
    model = Head()
    assert fastfuse.convert(model, dry_run=True).converted == ["", "conv"]
    assert "forward" not in model.__dict__


def test_what_is_left_has_a_reason(known: list[str]) -> None:
    own = Head()
    own.forward = lambda *levels: levels[0]  # type: ignore[method-assign]
    model = nn.ModuleDict({"sub": OwnHead(), "same": RenamedHead(), "own": own})
    report = fastfuse.convert(model)
    assert "same" in report.converted
    assert report.left["sub"] == "is a OwnHead, with a forward of its own"
    assert report.left["own"] == "has a forward of its own"
    text = str(report)
    assert "left" in text
    assert "is a OwnHead" in text


def test_unknown_models_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert "none of 2 modules is known: nothing was changed" in str(fastfuse.convert(model))
    for function in (fastfuse.convert, fastfuse.revert):
        with pytest.raises(TypeError, match=f"{function.__name__}: model must be an nn.Module"):
            function("a model")  # type: ignore[operator]
    with pytest.raises(ValueError, match="register_pattern: target must be"):
        fastfuse.register_pattern("my.models.Head")


def test_hooks_of_module_and_children(known: list[str]) -> None:
    head, seen = Head(), []
    fastfuse.convert(head)
    fine, coarse = inputs()
    expected = 2 * Head.forward(head, fine, coarse)
    head.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(head(fine, coarse), expected)
    head.conv.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    torch.testing.assert_close(head(fine, coarse), expected)
    assert seen == [(2, 16, 16, 16)]


def test_copies_are_converted_and_pickles_the_original(known: list[str]) -> None:
    head = Head()
    fastfuse.convert(head)
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.conv.weight.zero_()
        twin.conv.bias.zero_()
    assert not twin(*inputs()).any()
    assert known == ["ours"]
    again = pickle.loads(pickle.dumps(head))
    again(*inputs())
    assert known == ["ours"]
    assert fastfuse.convert(again).converted == ["", "conv"]


def test_a_saved_model_needs_no_fastfuse(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8))
    x = torch.randn(1, 8, 9, 9)
    expected = model(x)
    assert fastfuse.convert(model).converted == ["0"]
    torch.save((model, x, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['fastfuse'] = None\n"
        f"model, x, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("conv", "is_faster"),
    [
        (nn.Conv2d(8, 8, 7, padding=3, groups=8), True),
        (nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), True),
        (nn.Conv2d(8, 8, 3, padding=1), True),
        (nn.Conv2d(8, 8, 1), False),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1), False),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), False),
    ],
    ids=str,
)
def test_convolutions(conv: nn.Conv2d, is_faster: bool) -> None:
    x = torch.randn(2, 8, 12, 12)
    expected = conv(x)
    assert bool(fastfuse.convert(conv).converted) == is_faster
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


def test_graphs(known: list[str]) -> None:
    head = Head()
    expected = head(*(levels := inputs()))
    fastfuse.convert(head)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*levels), expected)
    exported = torch.export.export(head, levels)
    assert "fastfuse.fusion_conv2d" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*levels), expected)


def test_an_error_changes_nothing(known: list[str]) -> None:
    @fastfuse.register_pattern("torch.nn.modules.linear:Linear", check=lambda module: 1 / 0)
    def linear(self: Any, x: Tensor) -> Tensor:
        return x

    model = nn.ModuleDict({"head": Head(), "linear": nn.Linear(3, 3)})
    with pytest.raises(ZeroDivisionError):
        fastfuse.convert(model)
    assert "forward" not in model["head"].__dict__
