"""Swin's, CSwin's and ResNet's blocks: definitions pixel by pixel, PyTorch's machinery, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cednets import assert_alike, count, randomized, results
from inputs import both_layouts, images
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastfuse
from fastfuse import backend
from fastfuse.nn import (
    CEDBlock,
    CSwinBlock,
    MLPBlock,
    ResNetBlock,
    StripeAttention,
    SwinBlock,
    WindowAttention,
)
from fastfuse.ops.mlp_block import mlp_block
from fastfuse.ops.mlp_block.reference import reference
from fastfuse.ops.mlp_block.samples import samples
from fastfuse.tolerances import relative_error, tolerance

C = 12
# Each pads in one direction, in both or in none; some maps are smaller than a window.
SIZES = [(9, 14), (14, 8), (5, 3), (14, 14)]

# ---- definitions: attention of all pixels with all, of which those of a window are let through --


def norm(x: Tensor, module: nn.Module) -> Tensor:
    return F.layer_norm(x.movedim(1, 3), (x.shape[1],), module.weight, module.bias, 1e-6).movedim(
        3, 1
    )


def linear(x: Tensor, module: nn.Module) -> Tensor:
    return F.conv2d(x, module.weight[:, :, None, None], module.bias)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Of (N, heads, d, H, W); bias (heads, pixels, pixels) or (pixels, pixels)."""
    q, k, v = (t.flatten(3) for t in (q, k, v))
    logits = q.mT @ k / q.shape[2] ** 0.5 + bias
    return (logits.softmax(3) @ v.mT).mT


def coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return y.flatten(), x.flatten()


def alike(*values: Tensor) -> Tensor:
    """Pairs of pixels that agree in all of these."""
    return torch.stack([v[:, None] == v for v in values]).all(0)


def forbidden(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


def windows(m: WindowAttention, x: Tensor) -> Tensor:
    (batch, channels, height, width), w, s = x.shape, m.window, m.shift
    x = F.pad(x, (0, -width % w, 0, -height % w))
    size = x.shape[2:]
    rows, columns = coordinates(*size)
    tiles = [(p - s) % extent // w for p, extent in zip((rows, columns), size, strict=True)]
    allowed = alike(*tiles, rows < s, columns < s)
    table = m.relative_position_bias_table.view(2 * w - 1, 2 * w - 1, -1)
    apart = [(p[:, None] - p).clamp(1 - w, w - 1) + w - 1 for p in (rows, columns)]
    bias = table[apart[0], apart[1]].movedim(2, 0) + forbidden(allowed)
    q, k, v = linear(x, m.qkv).unflatten(1, (3, m.heads, -1)).unbind(1)
    mixed = attention(q, k, v, bias).reshape(batch, channels, *size)
    return linear(mixed[:, :, :height, :width], m.proj)


def stripes(m: StripeAttention, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    branches = len(m.lepe)
    parts = linear(x, m.qkv).unflatten(1, (3, branches, -1)).unbind(2)
    found = []
    for i, (qkv, lepe) in enumerate(zip(parts, m.lepe, strict=True)):
        tall, wide = [(height, m.stripe), (m.stripe, width)][i] if m.stripe else (height, width)
        down, right = -height % tall, -width % wide
        top, left = down // 2, right // 2
        qkv = F.pad(qkv, (left, right - left, top, down - top))
        size = qkv.shape[3:]
        rows, columns = coordinates(*size)
        tile = rows // tall * size[1] + columns // wide
        q, k, v = qkv.unflatten(2, (m.heads // branches, -1)).unbind(1)
        mixed = attention(q, k, v, forbidden(alike(tile))).reshape(qkv[:, 0].shape)
        image, tiles = qkv[:, 2], tile.view(size)
        mixed = mixed + lepe.bias[:, None, None]
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                moved, near = (
                    F.pad(t, (1, 1, 1, 1), value=e) for t, e in ((image, 0), (tiles, -1))
                )
                ys, xs = slice(1 + dy, 1 + dy + size[0]), slice(1 + dx, 1 + dx + size[1])
                inside = near[ys, xs] == tiles
                tap = lepe.weight[:, 0, 1 + dy, 1 + dx, None, None]
                mixed = mixed + tap * moved[:, :, ys, xs] * inside
        found.append(mixed[:, :, top : top + height, left : left + width])
    return linear(torch.cat(found, 1), m.proj)


def mlp(m: MLPBlock, x: Tensor) -> Tensor:
    return x + linear(F.gelu(linear(norm(x, m.norm), m.fc1)), m.fc2)


def dilated(dw: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, dw.weight, dw.bias, padding=9, dilation=3, groups=x.shape[1])


def swin(m: SwinBlock, x: Tensor) -> Tensor:
    z = norm(x, m.norm)
    if m.long_range:
        z = z + F.gelu(norm(windows(m.attention, z), m.attention_norm))
        z = z + F.gelu(norm(dilated(m.dw2, z), m.norm2))
    else:
        z = windows(m.attention, z)
    return mlp(m.mlp, x + z)


def cswin(m: CSwinBlock, x: Tensor) -> Tensor:
    return mlp(m.mlp, x + stripes(m.attention, norm(x, m.norm)))


def batch_norm(m: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, var = m.running_mean, m.running_var
    if m.training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    x = (x - mean[:, None, None]) / (var[:, None, None] + m.eps).sqrt()
    return x * m.weight[:, None, None] + m.bias[:, None, None]


def resnet(m: ResNetBlock, x: Tensor) -> Tensor:
    y = batch_norm(m.bn1, F.conv2d(x, m.conv1.weight, padding=1)).relu()
    if m.dw is not None:
        y = x + y
        y = y + batch_norm(m.bn_dw, dilated(m.dw, y)).relu()
    y = batch_norm(m.bn2, F.conv2d(y, m.conv2.weight)).relu()
    return (x + batch_norm(m.bn3, F.conv2d(y, m.conv3.weight))).relu()


class Definition(nn.Module):
    """Of a block: its parameters, another forward."""

    def __init__(self, block: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.definition = block, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.definition(self.block, x)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "swin": (lambda: SwinBlock(C, 3), swin),
    "swin, shifted": (lambda: SwinBlock(C, 3, shift=3), swin),
    "swin, long range": (lambda: SwinBlock(C, 2, window=4, shift=2, long_range=True), swin),
    "cswin, 1": (lambda: CSwinBlock(C, 4, stripe=1), cswin),
    "cswin, 3": (lambda: CSwinBlock(C, 2, stripe=3), cswin),
    "cswin, 7": (lambda: CSwinBlock(C, 4, stripe=7), cswin),
    "cswin, global": (lambda: CSwinBlock(C, 3, stripe=None), cswin),
    "resnet": (lambda: ResNetBlock(C), resnet),
    "resnet, long range": (lambda: ResNetBlock(C, long_range=True), resnet),
    "mlp": (lambda: MLPBlock(C), mlp),
    "mlp, kept": (lambda: MLPBlock(C, recompute=False), mlp),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def made(name: str) -> Any:
    """With statistics of batch norms, and a bias table that matter."""
    torch.manual_seed(0)
    block = randomized(BLOCKS[name][0]())
    for key, tensor in (*block.named_buffers(), *block.named_parameters()):
        if key.endswith(("running_mean", "bias_table")):
            tensor.detach().normal_()
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return block


def uncounted(block: nn.Module, *found: dict[str, Tensor]) -> None:
    """Takes out what a batch norm's mean takes out: a bias before it has no gradient."""
    if isinstance(block, ResNetBlock) and block.dw is not None:
        for gradients in found:
            assert gradients.pop("dw.bias").abs().max() < 1e-5 * gradients["dw.weight"].norm()


@every_block
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_its_definition(name: str, size: tuple[int, int], training: bool) -> None:
    block = made(name).double().train(training)
    (x,) = images((2, C, *size), dtype=torch.float64, channels_last=True)
    expected = results(Definition(block, BLOCKS[name][1]), x)
    expected = {key.removeprefix("block."): value for key, value in expected.items()}
    found = results(block, x)
    if training:
        uncounted(block, found, expected)
    assert_alike(found, expected, 1e-12)
    with torch.no_grad():
        assert relative_error(block(x), expected["output 0"]) < 1e-12


@every_block
@both_layouts
def test_float32_and_reference(name: str, channels_last: bool) -> None:
    block = made(name)
    (x,) = images((2, C, 9, 14), channels_last=channels_last)
    found = results(block, x)
    with backend("reference"):
        expected = results(block, x)
    uncounted(block, found, expected)
    assert_alike(found, expected, 1e-5)


def test_parameters() -> None:
    """As the counts of CEDNet's variants have them."""
    heads, c = 3, 96
    table = 169 * heads
    assert count(SwinBlock(c)) == 12 * c * c + 13 * c + table
    assert count(SwinBlock(c, long_range=True)) == 12 * c * c + 67 * c + table
    assert count(CSwinBlock(64)) == count(CSwinBlock(64, stripe=None)) == 12 * 64**2 + 23 * 64
    assert count(ResNetBlock(c)) == 17 * c * c + 12 * c
    assert count(ResNetBlock(c, long_range=True)) == 17 * c * c + 64 * c


# ---- stochastic depth ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SwinBlock, CSwinBlock, ResNetBlock, MLPBlock])
def test_stochastic_depth(make: Callable[..., Any]) -> None:
    """Branches are dropped whole, of each image, and others scaled; in training alone."""
    block = make(64, drop_path=0.5)
    x = torch.randn(64, 64, 3, 3).abs()
    torch.manual_seed(1)
    with torch.no_grad():
        found, expected = block(x), block.eval()(x)
        assert torch.equal(block(x), expected)
    same = [bool(torch.equal(a, b)) for a, b in zip(found, x, strict=True)]
    assert 0 < sum(same) < len(same)
    assert "drop_path=0.5" in repr(block)
    if make is MLPBlock:
        i = same.index(False)
        assert relative_error(found[i] - x[i], 2 * (expected[i] - x[i])) < 1e-5


# ---- the MLP's op -------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mlps_op(dtype: torch.dtype, channels_last: bool) -> None:
    for sample in samples(device="cpu", dtype=dtype, channels_last=channels_last):
        leaves = [t.requires_grad_() for t in sample.inputs]
        output = sample.call(*leaves)
        cotangent = torch.randn(output.shape).to(dtype)
        found = [output, *torch.autograd.grad(output, leaves, cotangent)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        expected = sample.exact(*exact)
        gradients = torch.autograd.grad(expected, exact, cotangent.double())
        reductions = (sample.output_reduction, *sample.reduction)
        for a, b, n in zip(found, [expected, *gradients], reductions, strict=True):
            assert relative_error(a, b) < tolerance(dtype, reduction=n, roundings=sample.roundings)


@both_layouts
@pytest.mark.parametrize("recompute", [True, False])
def test_the_mlps_derivatives(recompute: bool, channels_last: bool) -> None:
    (sample,) = samples(device="cpu", dtype=torch.float64, channels_last=channels_last, small=True)
    leaves = tuple(t.requires_grad_() for t in sample.inputs)

    def call(*tensors: Tensor) -> Tensor:
        return sample.call(*tensors, recompute=recompute)

    assert torch.autograd.gradcheck(call, leaves)
    name = "mlp_block" if recompute else "mlp_block_keeping"
    op = getattr(torch.ops.fastfuse, name)
    torch.library.opcheck(op.default, (*leaves, None, 1e-6, channels_last))


def test_the_mlp_counts_its_products() -> None:
    block, x = MLPBlock(8), torch.randn(2, 8, 3, 5)
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 8 * 32 * 30


def test_the_mlp_keeps_its_input_alone() -> None:
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    block, x = MLPBlock(8), torch.randn(2, 8, 13, 15, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    own = {p.data_ptr() for p in block.parameters()}
    assert {t.data_ptr() for t in kept} - own == {x.data_ptr()}


def test_explain_and_hooks() -> None:
    block, (x,) = SwinBlock(C, 3), images((1, C, 7, 7))
    assert fastfuse.explain(block) == {"attention": None, "mlp": None}
    expected = block(x)
    seen: list[Tensor] = []
    block.mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert relative_error(block(x), expected) < 1e-5
    assert seen[0].shape[-1] == 4 * C
    assert fastfuse.explain(block) == {"attention": None, "mlp": "fc1 has hooks"}


def test_the_reference_is_the_mlp() -> None:
    (sample,) = samples(device="cpu", dtype=torch.float64, channels_last=False, small=True)
    with backend("reference"):
        assert torch.equal(mlp_block(*sample.inputs), reference(*sample.inputs))


# ---- PyTorch's machinery ------------------------------------------------------------------------


@every_block
def test_compile(name: str) -> None:
    block, (x,) = made(name), images((2, C, 9, 14))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled.eval()(x), block.eval()(x)) < 1e-5
    block.train()
    found = {k.removeprefix("_orig_mod."): v for k, v in results(compiled, x).items()}
    expected = results(block, x)
    uncounted(block, found, expected)
    assert_alike(found, expected, 1e-4)


@every_block
def test_export(name: str) -> None:
    """Of any batch."""
    block = made(name).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    with torch.no_grad():
        program = torch.export.export(
            block, tuple(images((2, C, 9, 14))), dynamic_shapes=({0: batch},)
        )
        (x,) = images((3, C, 9, 14))
        assert relative_error(program.module()(x), block(x)) < 1e-5


@every_block
def test_autocast(name: str) -> None:
    block, (x,) = made(name), images((2, C, 9, 14))
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 0.05
    output.float().sum().backward()
    for parameter in block.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@every_block
def test_symbolic_trace(name: str) -> None:
    block, (x,) = made(name).eval(), images((1, C, 9, 14))
    traced = torch.fx.symbolic_trace(nn.Sequential(block))
    assert torch.equal(traced(x), block(x))


@pytest.mark.parametrize("attention", [WindowAttention, StripeAttention])
def test_as_a_token_mixer(attention: Callable[[int], nn.Module]) -> None:
    block = CEDBlock(64, token_mixer=attention)
    (x,) = images((1, 64, 9, 8))
    assert all(torch.isfinite(value).all() for value in results(block, x).values())


# ---- bad input ----------------------------------------------------------------------------------


def _called(block: nn.Module, *shape: int) -> Callable[[], Any]:
    return lambda: block(torch.zeros(shape))


BAD: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: WindowAttention(12, 5),
        "WindowAttention: channels must be a multiple of heads; got 12 channels and 5 heads",
    ),
    (lambda: SwinBlock(48), "channels must be a multiple of 32 where heads are not given; got 48"),
    (lambda: CSwinBlock(96), "channels must be a multiple of 64 where heads are not given; got 96"),
    (
        lambda: StripeAttention(12, 3),
        "StripeAttention: channels must be a multiple of heads, and heads of 2; "
        "got 12 channels and 3 heads",
    ),
    (lambda: WindowAttention(0), "WindowAttention: channels must be at least 1; got 0"),
    (lambda: WindowAttention(12, 0), "WindowAttention: heads must be at least 1; got 0"),
    (lambda: SwinBlock(64, window=0), "WindowAttention: window must be at least 1; got 0"),
    (lambda: SwinBlock(64, window=7.0), "WindowAttention: window must be an int; got float"),
    (lambda: SwinBlock(64, shift=-1), "WindowAttention: shift must be at least 0; got -1"),
    (lambda: SwinBlock(64, shift=7), "WindowAttention: shift must be below the window, 7; got 7"),
    (lambda: CSwinBlock(64, stripe=0), "StripeAttention: stripe must be at least 1; got 0"),
    (lambda: SwinBlock(64, drop_path=1.0), "SwinBlock: drop_path must be in [0, 1); got 1.0"),
    (lambda: CSwinBlock(64, drop_path=-0.5), "CSwinBlock: drop_path must be in [0, 1); got -0.5"),
    (lambda: ResNetBlock(8, drop_path=1.0), "ResNetBlock: drop_path must be in [0, 1); got 1.0"),
    (lambda: MLPBlock(8, drop_path=1.0), "MLPBlock: drop_path must be in [0, 1); got 1.0"),
    (lambda: ResNetBlock(0), "ResNetBlock: channels must be at least 1; got 0"),
    (lambda: MLPBlock(0), "MLPBlock: channels must be at least 1; got 0"),
    (
        lambda: ResNetBlock(8, long_range=True, dilation=0),
        "ResNetBlock: dilation must be at least 1; got 0",
    ),
    (
        lambda: SwinBlock(64, long_range=True, dilation=0),
        "SwinBlock: dilation must be at least 1; got 0",
    ),
    (_called(SwinBlock(64), 64, 7, 7), "SwinBlock: x must have 4 dimensions"),
    (_called(ResNetBlock(8), 8, 7, 7), "ResNetBlock: x must have 4 dimensions"),
    (_called(SwinBlock(64), 1, 32, 7, 7), "x must be (N, C, H, W) with C = 64"),
    (_called(WindowAttention(64), 1, 32, 7, 7), "WindowAttention: x must have 64 channels"),
    (_called(StripeAttention(64), 1, 32, 7, 7), "StripeAttention: x must have 64 channels"),
    (_called(ResNetBlock(8), 1, 4, 7, 7), "ResNetBlock: x must have 8 channels"),
    (_called(MLPBlock(8), 1, 4, 7, 7), "MLPBlock: x must have 8 channels"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()
