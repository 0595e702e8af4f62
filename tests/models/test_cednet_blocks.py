"""CEDNet with the blocks of the paper's table 5: sizes, values, wiring, PyTorch's machinery."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cednets import assert_alike, count, plain_cednet, randomized, results
from inputs import images
from torch import nn

from fastfuse import models
from fastfuse.models import CEDNet, load_published_cednet
from fastfuse.nn import CSwinBlock, LayerNorm2d, ResNetBlock, SwinBlock, conv3x3
from fastfuse.tolerances import relative_error

# block: its backbone's parameters, its RetinaNet's, those of UPerNet with an auxiliary head
PARAMETERS = {
    "resnet": (31_541_376, 39_384_692, 60_702_124),
    "swin": (29_267_625, 37_135_517, 58_764_245),
    "cswin": (25_739_200, 33_566_132, 54_473_964),
}
KINDS = {"resnet": ResNetBlock, "swin": SwinBlock, "cswin": CSwinBlock}
every_block = pytest.mark.parametrize("block", PARAMETERS)
every_style = pytest.mark.parametrize("style", ["fpn", "hourglass"])

CHANNELS, DEPTHS = (64, 64, 64, 64), (2, 2, 2, 2)


def cednet(block: str, style: str = "fpn", **options: Any) -> Any:
    torch.manual_seed(0)
    small = {"channels": CHANNELS, "depths": DEPTHS, "stages": 2}
    return randomized(CEDNet("tiny", style, block=block, **{**small, **options}))


@every_block
def test_parameters(block: str) -> None:
    with torch.device("meta"):
        made = (
            CEDNet(block=block),
            models.cednet_retinanet_tiny(block=block),
            models.cednet_upernet_tiny(block=block),
        )
    assert tuple(map(count, made)) == PARAMETERS[block]


@every_block
@every_style
@pytest.mark.parametrize("lr_blocks", [True, False])
def test_equals_its_plain_composition(
    block: str, style: str, lr_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block == "cswin" and not lr_blocks:
        monkeypatch.setattr(plain_cednet, "STRIPES", (1, 2, 7, 7))
    monkeypatch.setitem(plain_cednet.CHANNELS, block, CHANNELS)
    monkeypatch.setitem(plain_cednet.DEPTHS, block, (DEPTHS[0], DEPTHS[1:], 2))
    ours = cednet(block, style, lr_blocks=lr_blocks).double().eval()
    theirs = plain_cednet.CEDNet(style=style, block=block, lr_blocks=lr_blocks).double().eval()
    theirs.load_state_dict(ours.state_dict())
    (x,) = images((2, 3, 64, 96), dtype=torch.float64)
    assert_alike(results(ours, x), results(theirs, x), 1e-10)


@every_block
def test_structure(block: str) -> None:
    """Every second Swin block is shifted, c5's blocks are long-range ones, norms are of a kind."""
    model = cednet(block, "hourglass", drop_path=0.3)
    kind, norm = KINDS[block], nn.BatchNorm2d if block == "resnet" else LayerNorm2d
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, kind)}
    assert len(blocks) == 2 + 2 * (2 + 2 + 2) + 2 * 2  # and the laterals
    rates = [m.drop_path for name, m in blocks.items() if ".lateral." not in name]
    assert rates == pytest.approx(torch.linspace(0, 0.3, 14).tolist())
    for name, m in blocks.items():
        lowest, odd = ".encoder.2." in name, name.endswith(".1") and ".lateral." not in name
        if block == "swin":
            assert (m.attention.shift, m.attention.window) == (3 * odd, 7)
        if block == "cswin":
            stripes = {".encoder.0.": 2, ".blocks.1.": 2, ".lateral.1": 2, ".encoder.2.": None}
            expected = next((s for part, s in stripes.items() if part in name), 7)
            assert m.attention.stripe == (1 if name.startswith("blocks.") else expected)
        else:
            assert (m.dw is not None if block == "resnet" else m.long_range) == lowest
    between = [model.stem[1], model.stem[4], model.downsample.norm]
    for stage in model.stages:
        between += [d.norm for d in stage.downsample] + [*stage.decoder.norm]
    assert {type(m) for m in between} == {norm}
    with torch.device("meta"):
        levels = models.cednet_retinanet_tiny(block=block).backbone
    assert {type(part.norm) for part in levels.reduce} == {norm}
    assert {type(part.norm) for part in levels.extra} == {LayerNorm2d}


@every_block
def test_stages_and_layouts(block: str) -> None:
    model = cednet(block).eval()
    outputs = model(images((1, 3, 64, 96))[0], stages=True)
    assert len(outputs) == 2
    for output in outputs:
        for m in output:
            assert m is None or m.is_contiguous(memory_format=torch.channels_last)


@every_block
def test_compile(block: str) -> None:
    """One graph in training, and its backward."""
    model, (x,) = cednet(block, depths=(0, 2, 1, 1), stages=1), images((2, 3, 32, 64))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), model(x), strict=True):
        assert relative_error(a, b) < 1e-4
    sum(c.square().mean() for c in compiled(x)).backward()
    assert all(p.grad is not None for p in model.parameters())


@every_block
def test_export(block: str) -> None:
    model = cednet(block, depths=(0, 2, 1, 1), stages=1).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    with torch.no_grad():
        program = torch.export.export(
            model, tuple(images((2, 3, 64, 32))), dynamic_shapes=({0: batch},)
        )
        (x,) = images((3, 3, 64, 32))
        for a, b in zip(program.module()(x), model(x), strict=True):
            assert relative_error(a, b) < 1e-5


@every_block
def test_activation_checkpointing(block: str) -> None:
    model, (x,) = cednet(block), images((2, 3, 32, 64))
    found = []
    for model.checkpoint in (False, True):
        found.append(results(model, x))
    assert_alike(found[1], found[0], 1e-5)


@every_block
def test_classifier_and_segmentor(block: str) -> None:
    small = {"block": block, "channels": CHANNELS, "depths": (0, 1, 1, 1), "stages": 2}
    (x,) = images((2, 3, 32, 64))
    loss = models.CEDNetClassifier("tiny", 5, **small)(x, torch.tensor([0, 3]))
    loss = loss + models.cednet_upernet_tiny(3, **small)(x, torch.randint(3, (2, 32, 64)))
    assert torch.isfinite(loss)


# ---- bad input ----------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: CEDNet(block="vit"),
        "CEDNet: block must be one of next, resnet, swin, cswin; got 'vit'",
    ),
    (
        lambda: CEDNet("small", block="swin"),
        "CEDNet: variant of block swin must be one of tiny; got 'small'",
    ),
    (
        lambda: CEDNet(block="cswin", token_mixer=conv3x3),
        "CEDNet: token_mixer is for block next; got block cswin",
    ),
    (
        lambda: CEDNet(block="swin", channels=(96, 160, 288, 400)),
        "WindowAttention: channels must be a multiple of 32 where heads are not given; got 400",
    ),
    (
        lambda: CEDNet(block="cswin", channels=(64, 96, 256, 320)),
        "StripeAttention: channels must be a multiple of 64 where heads are not given; got 96",
    ),
    (
        lambda: cednet("swin")(torch.zeros(1, 3, 33, 64)),
        "CEDNet: images must be multiples of 32 high and wide; got 33 x 64",
    ),
    (
        lambda: load_published_cednet(cednet("resnet"), {}),
        "load_published_cednet: model must have block next, whose names are known; "
        "got block resnet",
    ),
    (
        lambda: load_published_cednet(models.cednet_retinanet_tiny(block="cswin"), {}),
        "got block cswin",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
