"""DepthwiseConv2d, LayerNorm2d, CEDBlock and LRCEDBlock."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import both_layouts, images
from torch import Tensor, nn

import fastfuse
from fastfuse import backend
from fastfuse.nn import CONVNEXT_KEYS, CEDBlock, DepthwiseConv2d, LayerNorm2d, LRCEDBlock

BLOCKS = [CEDBlock, LRCEDBlock]
both_blocks = pytest.mark.parametrize("kind", BLOCKS)

STEP = {"dw.weight", "dw.bias", "norm.weight", "norm.bias"}
MLP = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


def of(kind: type[nn.Module], channels: int = 8, **options: Any) -> Any:
    """A block whose branch counts, and whose norms and biases do something."""
    block = kind(channels, **{"layer_scale": 0.7, **options})
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def plain(block: Any, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The block of PyTorch's modules."""
    y = x
    for dw, norm in (("dw", "norm"), ("dw2", "norm2")):
        if not hasattr(block, dw):
            continue
        c, n = getattr(block, dw), getattr(block, norm)
        z = F.conv2d(y, c.weight, c.bias, 1, c.padding, c.dilation, groups=c.groups)
        z = F.layer_norm(z.permute(0, 2, 3, 1), n.weight.shape, n.weight, n.bias, n.eps)
        z = z.permute(0, 3, 1, 2)
        y = z if isinstance(block, CEDBlock) else y + F.gelu(z)
    branch = block.fc2(F.gelu(block.fc1(y.permute(0, 2, 3, 1))))
    if block.layer_scale is not None:
        branch = branch * block.layer_scale
    if keep is not None:
        branch = branch * keep[:, None, None, None]
    return x + branch.permute(0, 3, 1, 2)


def compare(ours: Any, theirs: Any, x: Tensor, parameters: list[Tensor]) -> None:
    """Output and gradients of two functions of x and some parameters."""
    cotangent, results = torch.randn_like(x), []
    for function in (ours, theirs):
        leaf = x.detach().requires_grad_()
        output = function(leaf)
        results.append([output, *torch.autograd.grad(output, [leaf, *parameters], cotangent)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


# ---- DepthwiseConv2d ----------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "dilation"), [(7, 1), (7, 3), (3, 2), (9, 1)])
def test_depthwise_is_pytorchs(k: int, dilation: int, bias: bool, channels_last: bool) -> None:
    """The same initial values from the same seed, the same keys, the same function."""
    torch.manual_seed(3)
    ours = DepthwiseConv2d(6, k, dilation=dilation, bias=bias)
    torch.manual_seed(3)
    theirs = nn.Conv2d(
        6, 6, k, padding=k // 2 * dilation, dilation=dilation, groups=6, bias=bias
    )  # fmt: skip
    assert isinstance(ours, nn.Conv2d)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    (x,) = images((2, 6, 9, 8), dtype=torch.float64, channels_last=channels_last)
    compare(ours.double(), theirs.double(), x, [])
    compare(ours, lambda x: F.conv2d(x, ours.weight, ours.bias, 1, ours.padding, dilation, 6), x,
            list(ours.parameters()))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be at least 1; got 0"),
        ({"channels": 4, "kernel_size": 4}, "kernel_size must be odd and positive; got 4"),
        ({"channels": 4, "kernel_size": -3}, "kernel_size must be odd and positive; got -3"),
        ({"channels": 4, "dilation": 0}, "dilation must be at least 1; got 0"),
    ],
)
def test_depthwise_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"DepthwiseConv2d: {message}"):
        DepthwiseConv2d(**arguments)


def test_depthwise_names_what_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"expected input\[1, 5, 8, 8\] to have 4 channels"):
        DepthwiseConv2d(4)(torch.randn(1, 5, 8, 8))


# ---- LayerNorm2d --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@both_layouts
def test_layer_norm_is_pytorchs_over_channels(
    channels_last: bool, eps: float, dtype: torch.dtype
) -> None:
    ours, theirs = LayerNorm2d(6, eps).to(dtype), nn.LayerNorm(6, eps).to(dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    (x,) = images((2, 6, 5, 4), dtype=dtype, channels_last=channels_last)
    result = ours(x)
    assert result.stride() == x.stride()
    assert torch.equal(result, theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_layer_norm_starts_as_it_should() -> None:
    norm = LayerNorm2d(3)
    assert norm.weight.tolist() == [1.0] * 3
    assert norm.bias.tolist() == [0.0] * 3
    assert repr(norm) == "LayerNorm2d(3, eps=1e-06)"


def test_layer_norm_refuses() -> None:
    with pytest.raises(ValueError, match="LayerNorm2d: channels must be at least 1; got 0"):
        LayerNorm2d(0)
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="LayerNorm2d: eps must be above 0; got"):
            LayerNorm2d(3, eps)
    for shape in ((3, 4, 4), (1, 4, 3, 3)):
        with pytest.raises(ValueError, match=r"LayerNorm2d: x must be \(N, C, H, W\) with C = 3;"):
            LayerNorm2d(3)(torch.zeros(shape))


# ---- CEDBlock, LRCEDBlock -----------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 96])
def test_parameters_and_keys(channels: int) -> None:
    """8 C^2 + 58 C and 8 C^2 + 110 C."""
    c = channels
    for kind, more, keys in (
        (CEDBlock, 58 * c, STEP),
        (LRCEDBlock, 110 * c, STEP | {key.replace(".", "2.") for key in STEP}),
    ):
        block = kind(channels)
        assert sum(p.numel() for p in block.parameters()) == 8 * c * c + more
        assert set(block.state_dict()) == keys | MLP | {"layer_scale"}
        assert torch.equal(block.layer_scale, torch.full((c,), 1e-6))
        without = kind(channels, layer_scale=None)
        assert sum(p.numel() for p in without.parameters()) == 8 * c * c + more - c
        assert set(without.state_dict()) == keys | MLP
        assert set(dict(block.named_parameters())) == set(block.state_dict())


@both_blocks
@both_layouts
@pytest.mark.parametrize("layer_scale", [0.7, None])
def test_block_is_its_parts(
    any_backend: str, kind: type[nn.Module], layer_scale: float | None, channels_last: bool
) -> None:
    block = of(kind, layer_scale=layer_scale).double()
    (x,) = images((2, 8, 5, 6), dtype=torch.float64, channels_last=channels_last)
    compare(block, lambda x: plain(block, x), x, list(block.parameters()))
    assert block(x).stride() == x.stride()


def test_dilation_of_the_second_convolution() -> None:
    x = torch.randn(1, 8, 12, 12, dtype=torch.float64)
    assert LRCEDBlock(8).dw2.dilation == (3, 3)
    results = []
    for dilation in (1, 2, 3):
        torch.manual_seed(0)
        block = of(LRCEDBlock, dilation=dilation).double()
        assert block.dw.dilation == (1, 1)
        compare(block, lambda x, block=block: plain(block, x), x, [])
        results.append(block(x))
    assert not any(torch.allclose(r, results[0]) for r in results[1:])


@both_blocks
def test_blocks_refuse(kind: type[nn.Module]) -> None:
    name = kind.__name__
    with pytest.raises(ValueError, match=f"{name}: channels must be at least 1; got 0"):
        kind(0)
    for rate in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"{name}: drop_path must be in \[0, 1\); got {rate}"):
            kind(4, drop_path=rate)
    with pytest.raises(ValueError, match=r"_block: .* got shape"):
        kind(4)(torch.randn(1, 5, 6, 6))
    if kind is LRCEDBlock:
        with pytest.raises(ValueError, match="dilation must be at least 1; got 0"):
            kind(4, dilation=0)


# ---- stochastic depth ---------------------------------------------------------------------------


@both_blocks
def test_drop_path_drops_samples_and_keeps_the_expectation(kind: type[nn.Module]) -> None:
    """About the rate of branches is missing; those that are there are larger by as much."""
    rate, count = 0.3, 4000
    block, x = of(kind, 2, drop_path=rate), torch.randn(count, 2, 1, 2)
    assert "drop_path=0.3" in repr(block)
    with torch.no_grad():
        whole, trained = block.eval()(x) - x, block.train()(x) - x
    dropped = (trained == 0).flatten(1).all(1)
    spread = (rate * (1 - rate) / count) ** 0.5
    assert abs(dropped.float().mean() - rate) < 4 * spread
    torch.testing.assert_close(trained[~dropped], whole[~dropped] / (1 - rate), atol=1e-5, rtol=0)


@both_blocks
def test_drop_path_is_of_training_only(kind: type[nn.Module]) -> None:
    block, x = of(kind, drop_path=0.5), torch.randn(5, 8, 4, 4)
    state = torch.get_rng_state()
    assert torch.equal(block.eval()(x), block(x))
    block.drop_path = 0.0
    assert torch.equal(block.train()(x), block.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)  # where nothing is dropped, nothing is drawn
    block.drop_path = 0.5
    first, second = block.train()(x), block(x)
    assert not torch.equal(first, second)  # each call draws anew
    torch.set_rng_state(state)
    assert torch.equal(block(x), first)


@both_blocks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backward_drops_what_forward_dropped(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """What is computed once more has the same factors, whatever was drawn in the meantime."""
    block, x = of(kind, drop_path=0.5).to(dtype).train(), torch.randn(7, 8, 4, 5).to(dtype)
    cotangent, parameters = torch.randn_like(x), list(block.parameters())
    results = []
    for name in ("cpu", "reference"):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        with backend(name):
            output = block(leaf)
        torch.manual_seed(99)
        results.append([output, *torch.autograd.grad(output, [leaf, *parameters], cotangent)])
    dropped = (results[0][0] == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 7
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# ---- ConvNeXt's weights -------------------------------------------------------------------------

# What the keys of a block are in each library; timm has 1x1 convolutions in some models.
SOURCES = {
    "original": "dwconv norm pwconv1 pwconv2 gamma",
    "timm": "conv_dw norm mlp.fc1 mlp.fc2 gamma",
    "transformers": "dwconv layernorm pwconv1 pwconv2 layer_scale_parameter",
}


def convnext(source: str, channels: int = 4, *, convolutions: bool = False) -> dict[str, Tensor]:
    dw, norm, fc1, fc2, scale = SOURCES[source].split()
    one = (1, 1) if convolutions else ()
    shapes = {
        f"{dw}.weight": (channels, 1, 7, 7),
        f"{dw}.bias": (channels,),
        f"{norm}.weight": (channels,),
        f"{norm}.bias": (channels,),
        f"{fc1}.weight": (4 * channels, channels, *one),
        f"{fc1}.bias": (4 * channels,),
        f"{fc2}.weight": (channels, 4 * channels, *one),
        f"{fc2}.bias": (channels,),
        scale: (channels,),
    }
    return {key: torch.randn(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("source", "convolutions"),
    [("original", False), ("timm", False), ("timm", True), ("transformers", False)],
)
def test_load_convnext(source: str, convolutions: bool) -> None:
    state, block = convnext(source, convolutions=convolutions), CEDBlock(4)
    block.load_convnext(state, source)
    dw, norm, fc1, fc2, scale = SOURCES[source].split()
    x = torch.randn(2, 4, 8, 9)
    y = F.conv2d(x, state[f"{dw}.weight"], state[f"{dw}.bias"], padding=3, groups=4)
    y = F.layer_norm(
        y.permute(0, 2, 3, 1), (4,), state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-6
    )
    y = F.gelu(F.linear(y, state[f"{fc1}.weight"].flatten(1), state[f"{fc1}.bias"]))
    y = state[scale] * F.linear(y, state[f"{fc2}.weight"].flatten(1), state[f"{fc2}.bias"])
    expected = x + y.permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_load_convnext_is_of_the_original_by_default() -> None:
    state, block = convnext("original"), CEDBlock(4)
    block.load_convnext(state)
    assert torch.equal(block.layer_scale, state["gamma"])
    assert set(CONVNEXT_KEYS) == set(SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_load_convnext_refuses(source: str) -> None:
    """Nothing is taken for granted: what is missing, left over or of another shape is named."""
    dw, _, fc1, _, scale = SOURCES[source].split()
    whole, block = convnext(source), CEDBlock(4)

    def refuses(state: dict[str, Tensor], message: str, of_block: CEDBlock = block) -> None:
        with pytest.raises(RuntimeError, match=message):
            of_block.load_convnext(state, source)

    missing = {f"{dw}.bias": "dw.bias", f"{fc1}.weight": "fc1.weight", scale: "layer_scale"}
    for theirs, ours in missing.items():
        rest = {key: value for key, value in whole.items() if key != theirs}
        refuses(rest, rf'Missing key\(s\) in state_dict: "{ours}"')
    refuses({**whole, "head.weight": torch.zeros(4)}, r'Unexpected key\(s\).*"head.weight"')
    refuses({**whole, f"{dw}.scale": torch.zeros(4)}, r'Unexpected key\(s\).*"dw.scale"')
    refuses({**whole, scale: torch.zeros(5)}, "size mismatch for layer_scale")
    refuses(convnext(source, 8), "size mismatch for dw.weight")
    refuses(whole, r'Unexpected key\(s\).*"layer_scale"', CEDBlock(4, layer_scale=None))
    refuses({f"stages.0.0.{key}": value for key, value in whole.items()}, "Missing key")
    with pytest.raises(ValueError, match=r"CEDBlock: source must be one of original, timm, transf"):
        block.load_convnext(whole, "torchvision")


def test_load_convnext_wants_the_right_source() -> None:
    for state_of in SOURCES:
        for source in SOURCES:
            if source != state_of:
                with pytest.raises(RuntimeError, match="Missing key"):
                    CEDBlock(4).load_convnext(convnext(state_of), source)


# ---- machinery ----------------------------------------------------------------------------------

MODULES: dict[str, Any] = {
    "DepthwiseConv2d": lambda: DepthwiseConv2d(8, 5, dilation=2),
    "LayerNorm2d": lambda: LayerNorm2d(8),
    "CEDBlock": lambda: of(CEDBlock, drop_path=0.5),
    "LRCEDBlock": lambda: of(LRCEDBlock, drop_path=0.5, dilation=2),
}
every_module = pytest.mark.parametrize("name", MODULES)


@every_module
def test_copies(name: str) -> None:
    """Deep ones, pickled ones, and those that load the state are the same."""
    module, x = MODULES[name]().train(), torch.randn(6, 8, 5, 5)
    torch.manual_seed(2)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = MODULES[name]()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert repr(twin) == repr(module)
        torch.manual_seed(2)
        assert torch.equal(twin(x), expected)


@every_module
def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    module, x = MODULES[name]().eval(), torch.randn(2, 8, 6, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    compiled.train()(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@every_module
def test_built_without_memory(name: str) -> None:
    """On meta, and given its values later."""
    with torch.device("meta"):
        empty = MODULES[name]()
    real, x = MODULES[name]().eval(), torch.randn(2, 8, 6, 5)
    empty.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(empty.eval()(x), real(x))


@both_blocks
def test_autocast(kind: type[nn.Module]) -> None:
    block, x = of(kind, drop_path=0.5).train(), torch.randn(4, 8, 6, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    for tensor in (x, *block.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32


@both_blocks
def test_training_goes_as_in_pytorch(kind: type[nn.Module]) -> None:
    """A few steps of an optimizer, fused and by the reference."""
    losses = []
    for name in ("cpu", "reference"):
        torch.manual_seed(0)
        block = nn.Sequential(of(kind, drop_path=0.2), of(kind, drop_path=0.2))
        optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
        x, target = torch.randn(2, 4, 8, 6, 6)
        with fastfuse.backend(name):
            for _ in range(4):
                optimizer.zero_grad()
                loss = (block(x) - target).square().mean()
                loss.backward()
                optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_layer_scale_may_be_an_int() -> None:
    scale = CEDBlock(4, layer_scale=1).layer_scale
    assert scale is not None
    assert scale.dtype == torch.get_default_dtype()
    assert torch.equal(scale, torch.ones(4))


def test_a_token_mixer_makes_a_module() -> None:
    with pytest.raises(TypeError, match=r"CEDBlock: token_mixer must make a module .* it gave int"):
        CEDBlock(4, token_mixer=nn.Identity())
