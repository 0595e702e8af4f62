"""The heads against the same in plain PyTorch: keys, values, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counts import count_work
from plain_heads import PLAIN
from torch import Tensor, nn

import fastfuse
from fastfuse import heads
from fastfuse.tolerances import relative_error

# name: constructor's arguments, features (C, H, W) finest first
SMALL: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[tuple[int, int, int]]]] = {
    "UPerHead": (([6, 8, 10, 12], 8, 5), {}, [(6, 24, 20), (8, 12, 10), (10, 6, 5), (12, 7, 6)]),
    "PSPHead": ((12, 8, 5), {}, [(3, 2, 2), (12, 9, 13)]),
    "ASPPHead": ((12, 8, 5), {"dilations": (1, 2, 5, 9)}, [(12, 9, 13)]),
    "SepASPPHead": (
        (12, 8, 5),
        {"dilations": (1, 2, 5, 9), "c1_in_channels": 6, "c1_channels": 4},
        [(6, 18, 22), (3, 2, 2), (12, 9, 11)],
    ),
    "FCNHead": ((12, 8, 5), {}, [(12, 9, 13)]),
    "SegformerHead": (
        ([6, 8, 10, 12], 8, 5),
        {},
        [(6, 24, 20), (8, 12, 10), (10, 6, 5), (12, 7, 6)],
    ),
}
every_head = pytest.mark.parametrize("name", SMALL)


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module, list[tuple[int, int, int]]]:
    """A head and its plain composition with the same weights, statistics and equalizers."""
    arguments, keywords, shapes = SMALL[name]
    keywords = {"dropout": 0.0, **keywords, **options}
    head = getattr(heads, name)(*arguments, **keywords)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, fastfuse.nn.ScaleEqualizer):
            levels = module.num_levels
            module.set_statistics(torch.randn(levels), torch.rand(levels) + 0.5)
    plain = PLAIN[name](*arguments, **keywords)
    plain.load_state_dict(head.state_dict())
    return head, plain, shapes


def features(shapes: list[tuple[int, int, int]], **options: Any) -> list[Tensor]:
    return [torch.randn(2, *shape, **options) for shape in shapes]


def results(head: nn.Module, levels: list[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of every level that is read and every parameter."""
    levels = [level.detach().requires_grad_() for level in levels]
    output = head(levels)
    torch.manual_seed(1)
    head.zero_grad()
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(output))
    found = {"output": output.detach()}
    found |= {f"features[{i}]": x.grad for i, x in enumerate(levels) if x.grad is not None}
    return found | {key: p.grad for key, p in head.named_parameters() if p.grad is not None}


@every_head
@pytest.mark.parametrize("equalized", [False, True], ids=["plain", "equalized"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_values_and_gradients(name: str, equalized: bool, training: bool) -> None:
    head, plain, shapes = pair(name, scale_equalizer=equalized)
    head, plain = head.double().train(training), plain.double().train(training)
    for channels_last in (False, True):
        levels = features(shapes, dtype=torch.float64)
        if channels_last:
            levels = [x.contiguous(memory_format=torch.channels_last) for x in levels]
        ours, theirs = results(head, levels), results(plain, levels)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert relative_error(ours[key], value) < 1e-11, key
        assert ours["output"].is_contiguous() != channels_last
    for (key, a), b in zip(head.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)  # running statistics moved alike


@every_head
def test_float32_and_autocast(name: str) -> None:
    head, plain, shapes = pair(name, scale_equalizer=True)
    head.eval(), plain.eval()
    levels = features(shapes)
    ours, theirs = results(head, levels), results(plain.double(), [x.double() for x in levels])
    for key, value in theirs.items():
        assert relative_error(ours[key], value) < 1e-5, key
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(head(levels), theirs["output"]) < 0.05


@every_head
@pytest.mark.parametrize("align_corners", [False, True])
def test_align_corners_and_dropout(name: str, align_corners: bool) -> None:
    head, plain, shapes = pair(name, align_corners=align_corners, dropout=0.5)
    levels = features(shapes)
    with torch.no_grad():
        assert relative_error(head.eval()(levels), plain.eval()(levels)) < 1e-5
        head.train()
        torch.manual_seed(0)
        first = head(levels)
        torch.manual_seed(1)
        assert not torch.equal(first, head(levels))


# The papers' settings: 512 channels and 150 classes, on ResNet-101 (stride 8) or ConvNeXt-T.
PARAMETERS = {
    "UPerHead": ([96, 192, 384, 768], 31_497_366),
    "PSPHead": (2048, 23_150_742),
    "ASPPHead": (2048, 42_288_278),
    "SepASPPHead": (2048, 17_765_126),
    "FCNHead": (2048, 23_672_982),
    "SegformerHead": ([64, 128, 320, 512], 565_398),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_at_the_papers_settings(name: str) -> None:
    """Exact numbers, computed from the plain compositions; keys and shapes equal theirs."""
    in_channels, expected = PARAMETERS[name]
    with torch.device("meta"):
        head, plain = getattr(heads, name)(in_channels), PLAIN[name](in_channels)
        equalized = getattr(heads, name)(in_channels, scale_equalizer=True)
    assert sum(p.numel() for p in plain.parameters()) == expected
    shapes = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == shapes
    extra = equalized.state_dict().keys() - shapes.keys()
    assert extra
    assert all(".equalizer." in key for key in extra)


def test_parameters_of_cednet_tinys_head() -> None:
    """What the published count of CEDNet-T's UPerNet leaves for the head: 60,976,812 in all, of
    which 30,718,336 are the backbone's and 481,430 the auxiliary head's."""
    with torch.device("meta"):
        head = heads.UPerHead([96, 192, 352, 512])
    assert sum(p.numel() for p in head.parameters()) == 60_976_812 - 30_718_336 - 481_430


def test_work_of_segformers_head() -> None:
    """At 512 x 512 for B2 to B5, whose heads have 768 channels: every level of the fusion at its
    own resolution (0.15 GMAC are the sums), against the convolution of the concatenation."""
    channels = [64, 128, 320, 512]
    macs = []
    for head in (heads.SegformerHead, PLAIN["SegformerHead"]):
        module = head(channels, 768).eval()

        def call(module: nn.Module = module) -> Tensor:
            sizes = (128, 64, 32, 16)
            return module([torch.empty(1, c, n, n) for c, n in zip(channels, sizes, strict=True)])

        with torch.no_grad():
            flops, _ = count_work(lambda call=call: call)
        macs.append(round(flops / 2e9, 1))
    assert macs == [16.4, 42.1]


def test_auxiliary_head() -> None:
    options = {"num_convs": 1, "concat_input": False}
    with torch.device("meta"):
        head = heads.FCNHead(1024, 256, 150, **options)
    assert {key.rpartition(".")[0] for key in head.state_dict()} == {
        "convs.0.conv",
        "convs.0.bn",
        "conv_seg",
    }
    assert sum(p.numel() for p in head.parameters()) == 9 * 1024 * 256 + 512 + 257 * 150
    x = torch.randn(2, 4, 3, 3)
    bare = heads.FCNHead(4, 4, 2, num_convs=0, concat_input=False).eval()
    assert torch.equal(bare([x]), bare.conv_seg(x))


def test_other_norms() -> None:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(2, channels)

    for name, (arguments, keywords, _) in SMALL.items():
        head = getattr(heads, name)(*arguments, **keywords, norm=norm)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in head.modules())


@every_head
def test_compiled_and_exported(name: str) -> None:
    head, _, shapes = pair(name, scale_equalizer=True)
    head.eval()
    levels = features(shapes)
    with torch.no_grad():
        expected = head(levels)
        exported = torch.export.export(head, (levels,)).module()
        assert relative_error(exported(levels), expected) < 1e-5
        torch._dynamo.reset()
        compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(levels), expected) < 1e-5


def test_levels_by_any_index() -> None:
    class Head(heads.DecodeHead):
        def fuse(self, levels: list[Tensor]) -> Tensor:
            return levels[0]

    levels = [torch.randn(1, c, 4, 4) for c in (2, 3, 4, 5)]
    for index, channels in ((2, 4), (-2, 4), (0, 2), (-1, 5)):
        head = Head({index: channels}, channels, 6, 0.0, False)
        assert head(levels).shape == (1, 6, 4, 4)
    with pytest.raises(ValueError, match="Head: expected at least 4 levels"):
        Head({1: 3, 3: 5}, 3, 6, 0.0, False)(levels[:2])


def test_transforms() -> None:
    head, _, shapes = pair("PSPHead")
    head.double().eval()
    levels = features(shapes, dtype=torch.float64)
    with torch.no_grad():
        batched = torch.func.vmap(lambda x: head([x[None]])[0])(levels[-1])
        assert relative_error(batched, head(levels)) < 1e-11
    with fastfuse.backend("reference"):
        x = levels[-1].requires_grad_()
        upstream = torch.eye(5, dtype=torch.float64).reshape(5, 1, 5, 1, 1).expand(5, 2, 5, 9, 13)
        (batch,) = torch.autograd.grad(head([x]), x, upstream, is_grads_batched=True)
        (one,) = torch.autograd.grad(head([x]), x, upstream[1])
    assert relative_error(batch[1], one) < 1e-11


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: heads.UPerHead([8]), r"UPerHead: in_channels must have .* at least two; got \[8\]"),
    (lambda: heads.SegformerHead([8]), r"SegformerHead: in_channels must .* two; got \[8\]"),
    (lambda: heads.UPerHead([8, 0]), "UPerHead: in_channels must be at least 1; got 0"),
    (lambda: heads.PSPHead(8, num_classes=0), "PSPHead: num_classes must be at least 1; got 0"),
    (lambda: heads.PSPHead(8, 0), "PSPHead: channels must be at least 1; got 0"),
    (lambda: heads.PSPHead(8, pool_scales=()), r"PSPHead: pool_scales must be .*; got \(\)"),
    (lambda: heads.PSPHead(8, pool_scales=(0,)), "PSPHead: pool_scales must be .* got 0"),
    (lambda: heads.ASPPHead(8, dilations=(1, 0)), "ASPPHead: dilations must be .* got 0"),
    (lambda: heads.ASPPHead(8, dropout=1.0), r"ASPPHead: dropout must be in \[0, 1\); got 1.0"),
    (lambda: heads.SepASPPHead(8, c1_channels=0), "SepASPPHead: c1_channels must be .* got 0"),
    (lambda: heads.FCNHead(8, num_convs=-1), "FCNHead: num_convs must be at least 0; got -1"),
    (lambda: heads.FCNHead(8, 4, num_convs=0), "FCNHead: channels must be in_channels = 8"),
    (lambda: heads.FCNHead(8, 4, kernel_size=2), "kernel_size must be odd and positive; got 2"),
    (
        lambda: heads.FCNHead(8, 4, concat_input=False, scale_equalizer=True),
        "FCNHead: scale_equalizer needs the fusion",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every_head
def test_bad_features(name: str) -> None:
    head, _, shapes = pair(name)
    head.eval()
    exact = name in ("UPerHead", "SegformerHead")
    count = {"UPerHead": 4, "SegformerHead": 4, "SepASPPHead": 2}.get(name, 1)
    with pytest.raises(ValueError, match=f"{name}: .* at least one level; got none"):
        head([])
    if count > 1:
        at_least = "" if exact else "at least "
        with pytest.raises(ValueError, match=f"{name}: expected {at_least}{count} levels"):
            head(features(shapes)[-1:])
    if exact:
        with pytest.raises(ValueError, match=f"{name}: expected 4 levels, finest first; got 5"):
            head(features([*shapes, shapes[0]]))
    with pytest.raises(TypeError, match=f"{name}: features must be a sequence"):
        head(features(shapes)[0])
    last = len(shapes) - 1 if exact else -1
    wrong = features([*shapes[:-1], (11, 9, 13)])
    with pytest.raises(
        ValueError, match=rf"{name}: features\[{last}\] must have 12 channels; got shape \(2, 11"
    ):
        head(wrong)
    with pytest.raises(ValueError, match="at least 1 pixel high and wide"):
        head(features([*shapes[:-1], (12, 0, 3)]))
