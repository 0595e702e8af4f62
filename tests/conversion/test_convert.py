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
    with pytest.raises(ValueError, match="register_pattern: target must be"):
        fastfuse.register_pattern(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="register_pattern: expected a forward to decorate; got 3"):
        fastfuse.register_pattern("my.models:Head")(3)  # type: ignore[arg-type]


def test_another_version_of_a_library_is_left(known: list[str]) -> None:
    @fastfuse.register_pattern(f"{Head.__module__}:Head")
    def head(self: Any, fine: Tensor, coarse: Tensor, mask: Tensor | None = None) -> Tensor:
        raise AssertionError

    report = fastfuse.convert(Head())
    assert report.left[""] == "takes (fine, coarse), where the pattern is of (fine, coarse, mask)"


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
    def linear(self: Any, input: Tensor) -> Tensor:
        return input

    model = nn.ModuleDict({"head": Head(), "linear": nn.Linear(3, 3)})
    with pytest.raises(ZeroDivisionError):
        fastfuse.convert(model)
    assert "forward" not in model["head"].__dict__


def test_a_replaced_class_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)

    def twice(self: nn.Conv2d, input: Tensor) -> Tensor:
        return 2 * self._conv_forward(input, self.weight, self.bias)

    monkeypatch.setattr(nn.Conv2d, "forward", twice)
    report = fastfuse.convert(conv)
    assert report.converted == []
    assert "whose forward was replaced by" in report.left[""]


def test_the_nearest_class_counts(known: list[str]) -> None:
    @fastfuse.register_pattern(f"{Head.__module__}:OwnHead")
    def own_head(self: Any, fine: Tensor, coarse: Tensor) -> Tensor:
        known.append("own")
        return type(self).forward(self, fine, coarse)

    head = OwnHead()
    assert fastfuse.convert(head).left == {}
    head(*inputs())
    assert known == ["own"]


def test_our_own_are_not_mentioned() -> None:
    report = fastfuse.convert(fastfuse.heads.FCNHead(16, channels=8, num_classes=3))
    assert report.converted == list(report.left) == []


def test_shared_modules_are_named_once(known: list[str]) -> None:
    head = Head()
    report = fastfuse.convert(nn.ModuleDict({"one": head, "two": head}))
    assert report.converted == ["one", "one.conv"]
    assert report.found[0].other_names == ["two"]
    assert "one = two" in str(report)


def test_converted_before_is_said(known: list[str]) -> None:
    head = Head()
    first, second = fastfuse.convert(head), fastfuse.convert(head)
    assert "converted before" not in str(first)
    assert "converted before" in str(second)
    assert second.converted == first.converted


@pytest.mark.parametrize("dry_run", [False, True])
def test_flops_of_original_and_converted(known: list[str], dry_run: bool) -> None:
    levels = torch.randn(2, 8, 64, 64), torch.randn(2, 8, 8, 8)
    head = Head()
    norm = nn.BatchNorm2d(8)
    model = nn.ModuleDict({"head": head, "norm": norm})
    model.forward = lambda *levels: norm(head(*levels))  # type: ignore[method-assign]
    for _ in range(2):
        report = fastfuse.convert(model, dry_run=dry_run, inputs=levels)
        whole = 2 * 2 * 64**2 * 8 * 16 * 9
        assert report.flops is not None
        assert report.flops[0] == whole
        assert 0 < report.flops[1] < whole
        assert f"{whole / 1e9:.2f} -> {report.flops[1] / 1e9:.2f} GFLOP a call" in str(report)
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    assert ("forward" in head.__dict__) != dry_run


def test_wrong_inputs_change_nothing(known: list[str]) -> None:
    head = Head()
    with pytest.raises(ValueError, match="convert: inputs must be what the model takes; got"):
        fastfuse.convert(head, inputs=torch.randn(1, 8, 4, 4))
    with pytest.raises(ValueError, match="convert: inputs must be what the model takes; got"):
        fastfuse.convert(head, inputs={"fine": torch.randn(1, 8, 4, 4), "wide": 3})
    assert "forward" not in head.__dict__
    fastfuse.convert(head)
    with pytest.raises(ValueError, match="convert: inputs"):
        fastfuse.convert(head, inputs=())
    assert fastfuse.revert(head) == ["", "conv"]


def test_what_was_compiled_before(known: list[str]) -> None:
    head, levels = Head(), inputs()
    compiled = torch.compile(head, backend="aot_eager")
    expected = compiled(*levels)
    assert "_orig_mod" in fastfuse.convert(compiled).converted
    torch.testing.assert_close(compiled(*levels), expected)
    assert known == ["ours"]
    fastfuse.revert(compiled)
    torch.testing.assert_close(compiled(*levels), expected)
    assert known == ["ours"]


def _sums_to_one(conv: nn.Conv2d) -> None:
    class Normalized(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / weight.sum()

    nn.utils.parametrize.register_parametrization(conv, "weight", Normalized())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, _sums_to_one])
def test_parametrized_convolutions(known: list[str], change: Any, when: str) -> None:
    head, levels = Head(), inputs()
    if when == "before":
        change(head.conv)
    fastfuse.convert(head)
    if when == "after":
        change(head.conv)
    plain = copy.deepcopy(head)
    fastfuse.revert(plain)
    torch.testing.assert_close(head(*levels), plain(*levels), rtol=1e-4, atol=1e-5)


def test_autocast_and_layouts(known: list[str]) -> None:
    head = Head()
    plain = copy.deepcopy(head)
    fastfuse.convert(head)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        levels = [level.to(memory_format=memory_format) for level in inputs()]
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = head(*levels), plain(*levels)
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def _step(rank: int, file: str, results: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    gradients = []
    for converts in (False, True):
        torch.manual_seed(0)
        head = Head()
        if converts:
            from fastfuse.conversion.parts import convolved

            fastfuse.register_pattern(f"{Head.__module__}:Head")(
                lambda self, fine, coarse: convolved(self.conv, [fine, coarse], fine.shape[2:])
            )
            sys.modules[Head.__module__] = sys.modules[__name__]
            assert fastfuse.convert(head).converted == ["", "conv"]
        model = nn.parallel.DistributedDataParallel(head)
        torch.manual_seed(rank)
        model(*inputs()).square().mean().backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
    results[rank] = gradients
    dist.destroy_process_group()


def test_distributed_gradients(tmp_path: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_step, (str(tmp_path / "store"), results), nprocs=2)
        for rank in (0, 1):
            plain, converted = results[rank]
            for expected, gradient in zip(plain, converted, strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        for mine, others in zip(results[0][1], results[1][1], strict=True):
            assert torch.equal(mine, others)
