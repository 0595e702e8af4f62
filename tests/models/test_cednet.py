"""CEDNet: the paper's sizes, values and gradients, options, PyTorch's machinery, training."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cednets import SMALL, assert_alike, cednet, count, every_style, plain_cednet, results
from inputs import both_layouts, images
from small_models import camvid
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import backend, heads, models
from fastfuse.calibration.images import ImageFolder
from fastfuse.models import CEDNet, CEDNetClassifier, StageOutput
from fastfuse.models.cednet_upernet import CEDNetSegmentor
from fastfuse.nn import CEDBlock, DepthwiseConv2d, LRCEDBlock, conv3x3
from fastfuse.tolerances import relative_error

either_decoder = pytest.mark.parametrize("last_decoder", [False, True], ids=["raw", "decoded"])
STRIDES = (4, 8, 16, 32)
SHALLOW: dict[str, Any] = {"depths": (0, 2, 2, 1)}  # as little to trace as every style has

# ---- the paper's sizes --------------------------------------------------------------------------

VARIANTS = ("tiny", "small", "base")
# the model, then the parameters of its tiny, small and base
PARAMETERS: dict[str, tuple[Callable[[str], nn.Module], tuple[int, int, int]]] = {
    "backbone": (CEDNet, (30_718_336, 53_067_008, 91_114_496)),
    "backbone, decoded": (
        partial(CEDNet, last_decoder=True),
        (30_967_776, 53_316_448, 91_546_688),
    ),
    "classifier": (
        partial(CEDNetClassifier, auxiliary_heads=False),
        (33_826_152, 56_174_824, 94_615_528),
    ),
    "RetinaNet": (
        lambda variant: getattr(models, f"cednet_retinanet_{variant}")(),
        (38_635_380, 60_984_052, 99_121_652),
    ),
    "UPerNet": (
        lambda variant: getattr(models, f"cednet_upernet_{variant}")(),
        (60_976_812, 83_325_484, 122_896_684),
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    make, expected = PARAMETERS[name]
    with torch.device("meta"):
        assert tuple(count(make(variant)) for variant in VARIANTS) == expected


def test_parameters_of_styles() -> None:
    """RetinaNets of the paper's tables 3 and 8; the hourglass has channels of its own."""
    with torch.device("meta"):
        unet = models.cednet_retinanet_tiny(style="unet")
        hourglass = models.cednet_retinanet_tiny(style="hourglass")
        without_lr = models.cednet_retinanet_tiny(lr_blocks=False)
        widths = [CEDNet(variant, "hourglass").channels for variant in VARIANTS]
    assert count(unet) == 38_884_820
    assert count(hourglass) == 38_880_724
    assert round(count(without_lr) / 1e6, 3) == 38.476
    assert widths == [(96, 160, 320, 512), (96, 192, 352, 512), (128, 256, 448, 704)]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("retinanet_tiny", (800, 1280), 254.5),
        ("retinanet_small", (800, 1280), 335.4),
        ("upernet_tiny", (512, 2048), 962.4),
        ("upernet_small", (512, 2048), 1045.2),
        ("upernet_base", (512, 2048), 1184.3),
    ],
)
def test_flops(name: str, size: tuple[int, int], expected: float) -> None:
    """Billions of multiplications with additions. The paper counts the elements of BN, ReLU and
    pooling, too, which are less than a thousandth."""
    with torch.device("meta"):
        model, x = getattr(models, f"cednet_{name}")().eval(), torch.empty(1, 3, *size)
    with torch.no_grad(), backend("reference"), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-3)


# ---- values and gradients -----------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """CEDNets of plain PyTorch, of the small size."""
    stem_depth, *depths = SMALL["depths"]
    monkeypatch.setitem(plain_cednet.CHANNELS, "nano", SMALL["channels"])
    monkeypatch.setitem(plain_cednet.DEPTHS, "nano", (stem_depth, depths, SMALL["stages"]))
    return partial(plain_cednet.CEDNet, "nano")


@every_style
@either_decoder
@pytest.mark.parametrize("lr_blocks", [True, False], ids=["lr", "ced"])
def test_equals_its_plain_composition(
    style: str, last_decoder: bool, lr_blocks: bool, plain: Callable[..., nn.Module]
) -> None:
    options = {"last_decoder": last_decoder, "lr_blocks": lr_blocks}
    ours, theirs = cednet(style, **options).double(), plain(style, **options).double()
    theirs.load_state_dict(ours.state_dict())
    (x,) = images((2, 3, 64, 96), dtype=torch.float64)
    assert_alike(results(ours, x), results(theirs, x), 1e-10)


@every_style
@both_layouts
def test_fused_equals_the_reference(style: str, channels_last: bool) -> None:
    model = cednet(style)
    (x,) = images((2, 3, 64, 96), channels_last=channels_last)
    fused = results(model, x)
    with backend("reference"):
        assert_alike(fused, results(model, x), 1e-5)


@every_style
@either_decoder
def test_maps_of_stages(style: str, last_decoder: bool) -> None:
    model = cednet(style, last_decoder=last_decoder, stages=3)
    (x,) = images((2, 3, 64, 96))
    outputs = model.forward_stages(x)
    assert len(outputs) == 3
    for i, output in enumerate(outputs):
        maps = {name: m for name, m in output._asdict().items() if m is not None}
        expected = {
            f"c{i}": (c, s) for i, c, s in zip((2, 3, 4, 5), model.channels, STRIDES, strict=True)
        }
        if i > 0:
            del expected["c2"]
        if i < 2 or last_decoder:
            expected |= {f"decoded_{name}": expected[name] for name in ("c3", "c4")}
        assert {name: tuple(m.shape) for name, m in maps.items()} == {
            name: (2, c, 64 // s, 96 // s) for name, (c, s) in expected.items()
        }
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps.values())
    last = outputs[-1]
    chosen = (last.decoded_c3, last.decoded_c4) if last_decoder else (last.c3, last.c4)
    expected_maps = (outputs[0].c2, *chosen, last.c5)
    assert all(a is b for a, b in zip(model.last_maps(outputs), expected_maps, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected_maps, strict=True))


def test_a_stage_reads_the_finest_map_of_the_one_before() -> None:
    model = cednet()
    first, second = model.forward_stages(images((1, 3, 32, 32))[0])
    assert isinstance(first, StageOutput)
    assert torch.equal(model.stages[1](first.decoded_c3).c5, second.c5)


# ---- options ------------------------------------------------------------------------------------


@every_style
@either_decoder
def test_stochastic_depth(style: str, last_decoder: bool) -> None:
    """Rates rise from the first block to the last, whether a last decoder is there or not."""
    model = cednet(style, drop_path=0.3, last_decoder=last_decoder)
    rates = {
        n: m.drop_path for n, m in model.named_modules() if isinstance(m, (CEDBlock, LRCEDBlock))
    }
    lateral = {name: rates.pop(name) for name in list(rates) if ".lateral." in name}
    decoders = 1 + last_decoder
    assert list(lateral.values()) == [0.0] * (2 * decoders if style == "hourglass" else 0)
    total = 1 + 2 * (2 + 3 + 2)
    left_out = 0 if style == "fpn" or last_decoder else 3  # the last decoder's blocks
    expected = torch.linspace(0, 0.3, total, dtype=torch.float64)[: total - left_out]
    assert list(rates.values()) == pytest.approx(expected.tolist())
    places = [re.sub(r"\.\d+$", "", name) for name in rates]
    assert list(dict.fromkeys(places)) == [
        "blocks",
        *(f"stages.{i}.{part}" for i in range(2) for part in _parts(style, i < decoders)),
    ]


def _parts(style: str, decodes: bool) -> list[str]:
    """At 1/8, 1/16, 1/32, and then of a decoder at 1/16, 1/8."""
    decoder = [f"decoder.blocks.{i}" for i in range(2)]
    return [f"encoder.{i}" for i in range(3)] + (decoder if decodes and style != "fpn" else [])


def test_stochastic_depth_is_for_training() -> None:
    model, (x,) = cednet(drop_path=0.9), images((2, 3, 32, 32))
    with torch.no_grad():
        assert not torch.equal(model(x)[-1], model(x)[-1])
        model.eval()
        assert torch.equal(model(x)[-1], model(x)[-1])


def test_without_layer_scale() -> None:
    with_scale, without = cednet(layer_scale=1.0), cednet(layer_scale=None)
    scales = {key for key in with_scale.state_dict() if key.endswith("layer_scale")}
    assert scales == with_scale.state_dict().keys() - without.state_dict().keys()
    with torch.no_grad():
        for key in scales:
            with_scale.get_parameter(key).fill_(1)
    with_scale.load_state_dict(without.state_dict(), strict=False)
    (x,) = images((1, 3, 32, 64))
    for a, b in zip(without(x), with_scale(x), strict=True):
        assert relative_error(a, b) < 1e-5


@every_style
def test_depths_of_every_stage(style: str) -> None:
    model = cednet(style, depths=(0, [(2, 2, 1), (2, 4, 3), (3, 2, 1)]), stages=None)
    assert len(model.blocks) == 0
    kept = [[len(blocks) for blocks in stage.encoder] for stage in model.stages]
    expected = [[2, 2, 1], [2, 4, 3], [3, 2, 1]]
    assert kept == ([*expected] if style == "fpn" else [[1, 1, 1], [1, 2, 3], [1, 1, 1]])
    if style != "fpn":
        moved = [[len(blocks) for blocks in stage.decoder.blocks] for stage in model.stages]
        assert moved == [[1, 1], [2, 1], [1, 2]]
    assert model(images((1, 3, 32, 32))[0])[-1].shape == (1, 20, 1, 1)


@every_style
def test_activation_checkpointing(style: str) -> None:
    """The same gradients, of the same draws of stochastic depth, from fewer kept maps."""
    model, (x,) = cednet(style, drop_path=0.5), images((2, 3, 64, 64))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, kept = [], []
    for model.checkpoint in (False, True):
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(3)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(results(model, x))
        kept.append(sum(saved.values()))
    assert_alike(found[1], found[0], 0.0)
    assert kept[1] < kept[0] / 3


class WindowAttention(nn.Module):
    """Self-attention with one head inside of windows of 4 x 4 pixels; pads for itself."""

    def __init__(self, channels: int, window: int = 4) -> None:
        super().__init__()
        self.window = window
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), w = x.shape[2:], self.window
        rows = F.pad(x, (0, -width % w, 0, -height % w)).permute(0, 2, 3, 1)
        tiles = rows.unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3)
        tokens = tiles.flatten(3, 4)
        mixed = F.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, -1))
        mixed = mixed.unflatten(3, (w, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return mixed.permute(0, 3, 1, 2)[:, :, :height, :width]


@every_style
@pytest.mark.parametrize("mixer", [conv3x3, WindowAttention])
def test_token_mixers(style: str, mixer: Callable[[int], nn.Module]) -> None:
    """Instead of every 7x7 convolution but the dilated ones, whose block is in plain PyTorch."""
    model, usual = cednet(style, token_mixer=mixer), cednet(style)
    kept = {key for key in usual.state_dict() if ".dw." not in key}
    blocks = {key.partition(".dw.")[0] for key in usual.state_dict() if ".dw." in key}
    parts = {"weight", "bias"} if mixer is conv3x3 else {"qkv.weight", "qkv.bias"}
    added = {f"{block}.mixer.{part}" for block in blocks for part in parts}
    assert model.state_dict().keys() == kept | added
    (x,) = images((1, 3, 64, 96))
    found = results(model, x)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found.keys() >= added
    if mixer is conv3x3:
        widths = [
            module.mixer.in_channels for module in model.modules() if hasattr(module, "mixer")
        ]
        assert count(model) - count(usual) == sum(9 * c * c - 49 * c for c in widths)


@every_style
def test_the_usual_mixer_as_another_one(style: str) -> None:
    model, usual = cednet(style, token_mixer=DepthwiseConv2d).double(), cednet(style).double()
    state = {key.replace(".dw.", ".mixer."): value for key, value in usual.state_dict().items()}
    model.load_state_dict(state)
    (x,) = images((2, 3, 64, 64), dtype=torch.float64)
    found = {key.replace(".mixer.", ".dw."): value for key, value in results(model, x).items()}
    assert_alike(found, results(usual, x), 1e-10)


# ---- PyTorch's machinery ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "checkpoint"),
    [
        pytest.param("fpn", False, marks=pytest.mark.slow),
        pytest.param("unet", False, marks=pytest.mark.slow),
        ("hourglass", True),  # has what the others have, and more
    ],
)
def test_compile(style: str, checkpoint: bool) -> None:
    """One graph in evaluation, one in training, and its backward."""
    model, (x,) = cednet(style, **SHALLOW, checkpoint=checkpoint), images((2, 3, 32, 64))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled.eval()(x), model.eval()(x), strict=True):
            assert relative_error(a, b) < 1e-5
    model.train()
    found = {k.removeprefix("_orig_mod."): v for k, v in results(compiled, x).items()}
    assert_alike(found, results(model, x), 1e-5)


@every_style
def test_export(style: str) -> None:
    model = cednet(style, **SHALLOW).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    with torch.no_grad():
        program = torch.export.export(
            model, tuple(images((2, 3, 64, 32))), dynamic_shapes=({0: batch},)
        )  # fmt: skip
        (x,) = images((3, 3, 64, 32))
        for a, b in zip(program.module()(x), model(x), strict=True):
            assert relative_error(a, b) < 1e-5


@every_style
def test_autocast(style: str) -> None:
    model, (x,) = cednet(style), images((2, 3, 64, 64))
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
    for a, b in zip(outputs, expected, strict=True):
        assert relative_error(a, b) < 0.05
    sum(output.float().sum() for output in outputs).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


# ---- training -----------------------------------------------------------------------------------


@every_style
def test_training_on_street_scenes(style: str) -> None:
    folder = camvid()
    from PIL import Image

    size = (96, 128)
    (x,) = islice(ImageFolder(folder, 2, size=size), 1)
    files = sorted((folder.parent / "trainannot").iterdir())[:2]
    labels = [Image.open(file).resize(size[::-1], Image.Resampling.NEAREST) for file in files]
    targets = torch.stack(
        [torch.tensor(list(label.tobytes())).reshape(size) for label in labels]
    ).long()
    assert targets.max() <= 11  # void
    backbone = cednet(style)
    model = CEDNetSegmentor(
        backbone,
        heads.UPerHead(backbone.channels, 16, 11, dropout=0.0),
        heads.FCNHead(backbone.channels[1], 8, 11, num_convs=1, concat_input=False, dropout=0.0),
        ignore_index=11,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(3):
        loss = model.loss(x, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]


# ---- bad input ----------------------------------------------------------------------------------


def _run(*shape: int) -> Callable[[], Any]:
    return lambda: cednet()(torch.zeros(shape))


class Halving(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2]


DEPTHS = r"CEDNet: depths must be \(n0, n1, n2, n3\), or \(n0, \[\(n1, n2, n3\), \.\.\.\]\)"
BAD: list[tuple[Callable[[], Any], str]] = [
    (
        _run(1, 3, 33, 64),
        r"multiples of 32 high and wide; got 33 x 64. The next ones are 64 x 64: "
        r"torch.nn.functional.pad\(images, \(0, 0, 0, 31\)\)",
    ),
    (_run(1, 3, 64, 100), r"got 64 x 100. The next ones are 64 x 128: .*\(0, 28, 0, 0\)\)"),
    (_run(1, 4, 32, 32), r"CEDNet: images must have 3 channels; got shape \(1, 4, 32, 32\)"),
    (_run(3, 32, 32), "CEDNet: images must have 4 dimensions"),
    (lambda: CEDNet("huge"), "variant must be one of tiny, small, base; got 'huge'"),
    (lambda: CEDNet(style="pan"), "style must be one of fpn, unet, hourglass; got 'pan'"),
    (lambda: CEDNet(channels=(8, 8, 8)), r"channels must be 4 ints of at least 1.*\(8, 8, 8\)"),
    (lambda: CEDNet(channels=(8, 8, 8, 0)), "channels must be 4 ints of at least 1"),
    (lambda: CEDNet(channels=(8, 8, 8, True)), "channels must be 4 ints of at least 1"),
    (lambda: CEDNet(stages=0), "stages must be at least 1; got 0"),
    (lambda: CEDNet(stages=True), "stages must be an int; got bool"),
    (lambda: CEDNet(drop_path=1.0), r"drop_path must be in \[0, 1\); got 1.0"),
    (lambda: CEDNet(drop_path=-0.1), r"drop_path must be in \[0, 1\); got -0.1"),
    (lambda: CEDNet(depths=(1, 1, 1)), rf"{DEPTHS} with .*; got \(1, 1, 1\)"),
    (lambda: CEDNet(depths=(True, 1, 1, 1)), DEPTHS),
    (lambda: CEDNet(depths=(1, [(1, 1)])), DEPTHS),
    (lambda: CEDNet(depths=(1, [])), DEPTHS),
    (lambda: CEDNet(depths=(1, [(1, 1, False)])), DEPTHS),
    (
        lambda: CEDNet(depths=(1, [(1, 1, 1)]), stages=2),
        r"depths must have one \(n1, n2, n3\) for each of 2 stages; got 1",
    ),
    (lambda: CEDNet(depths=(-1, 1, 1, 1)), "depths must have n0 of at least 0; got -1"),
    (
        lambda: CEDNet(depths=(1, [(1, 1, 1), (1, 0, 1)])),
        r"depths of style fpn must be at least \(1, 1, 1\); got \(1, 0, 1\) in stage 1",
    ),
    (
        lambda: CEDNet(style="unet", depths=(1, 2, 1, 1)),
        r"depths of style unet must be at least \(2, 2, 1\), shared .*; got \(2, 1, 1\) in stage 0",
    ),
    (
        lambda: cednet(token_mixer=Halving)(torch.zeros(1, 3, 32, 32)),
        r"CEDBlock: token_mixer must keep the shape \(1, 8, 8, 8\); it gave \(1, 8, 4, 8\)",
    ),
    (
        lambda: models.cednet_upernet_tiny(stages=1),
        "cednet_upernet_tiny: stages must be at least 2, .*; got 1",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()
