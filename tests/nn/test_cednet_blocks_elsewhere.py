"""Swin's, CSwin's and ResNet's blocks where modules are seldom taken: frozen norms, forward mode,
second derivatives, empty batches, adapters, hooks that keep what they see, tracing, plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cednets import randomized
from inputs import both_layouts
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Interpreter, Node, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import fastfuse
from fastfuse import backend, models
from fastfuse.nn import (
    CSwinBlock,
    MLPBlock,
    ResNetBlock,
    StripeAttention,
    SwinBlock,
    WindowAttention,
)
from fastfuse.ops.layout import is_channels_last, to_memory_format

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNetBlock(12),
    "resnet, long range": lambda: ResNetBlock(12, long_range=True),
    "swin": lambda: SwinBlock(12, 3, window=4, shift=1),
    "cswin": lambda: CSwinBlock(12, 2, stripe=2),
    "mlp": lambda: MLPBlock(12),
}
all_blocks = pytest.mark.parametrize("name", BLOCKS)


def block(name: str) -> nn.Module:
    return randomized(BLOCKS[name]()).double().eval().requires_grad_(False)


def freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def test_stochastic_depth_with_frozen_norms_and_no_gradients() -> None:
    m = randomized(ResNetBlock(8, drop_path=0.5)).train()
    freeze_norms(m)
    x = torch.randn(64, 8, 8, 8)
    torch.manual_seed(1)
    expected = m(x.requires_grad_()).detach()
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(m(x), expected)
        assert not torch.equal(m(x), m.eval()(x))


@all_blocks
@both_layouts
def test_forward_mode(name: str, channels_last: bool) -> None:
    m = block(name)
    x, v = (to_memory_format(torch.randn(2, 12, 9, 7).double(), channels_last) for _ in range(2))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(m(forward_ad.make_dual(x, v))).tangent
    assert tangent is not None
    h = 1e-5
    expected = (m(x + h * v) - m(x - h * v)) / (2 * h)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)


@all_blocks
@both_layouts
def test_vmap(name: str, channels_last: bool) -> None:
    m = block(name)
    images = [to_memory_format(torch.randn(2, 12, 5, 7).double(), channels_last) for _ in range(3)]
    expected = torch.stack([m(x) for x in images])
    torch.testing.assert_close(torch.func.vmap(m)(torch.stack(images)), expected)


@all_blocks
def test_second_derivatives_of_the_reference(name: str) -> None:
    m = block(name)
    with backend("reference"):
        x = torch.randn(1, 12, 4, 5).double().requires_grad_()
        assert torch.autograd.gradgradcheck(m, x, fast_mode=True)


@all_blocks
def test_empty_batch(name: str) -> None:
    m = block(name)
    x = torch.zeros(0, 12, 5, 6).double().requires_grad_()
    m(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("attention", [WindowAttention, StripeAttention])
def test_a_projection_that_is_an_adapter(attention: Callable[..., nn.Module]) -> None:
    m, x = attention(12, 2), torch.randn(1, 12, 7, 7)
    expected = m(x)
    m.proj = nn.Sequential(m.proj, nn.Dropout(0.0))
    torch.testing.assert_close(m(x), expected)
    with pytest.raises(ValueError, match="channels"):
        m(torch.randn(1, 10, 7, 7))


def test_what_a_hook_of_a_norm_keeps_stays() -> None:
    m, x = randomized(ResNetBlock(8, long_range=True)).train(), torch.randn(2, 8, 5, 6)
    seen: list[tuple[Tensor, Tensor]] = []
    for norm in (m.bn1, m.bn_dw, m.bn2):
        norm.register_forward_hook(lambda _, __, y: seen.append((y, y.clone())))
    m(x)
    assert len(seen) == 3
    for kept, before in seen:
        assert torch.equal(kept, before)
    assert any((before < 0).any() for _, before in seen)


def stem() -> nn.Sequential:
    """Whose norms give less than zero."""
    model = models.CEDNet(block="resnet", channels=(64,) * 4, depths=(1, 1, 1, 1), stages=1)
    return randomized(model).eval().stem


def converted() -> nn.Sequential:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    fastfuse.convert(model)
    return model


@pytest.mark.parametrize("make", [stem, converted])
@pytest.mark.parametrize("way", ["class", "mode", "fx"])
def test_what_somebody_keeps_of_a_norm_stays(
    make: Callable[[], nn.Sequential], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a patched class, a mode, or a graph that gives it out."""
    model, x = make(), torch.randn(2, 3, 16, 16)
    held: list[Tensor] = []
    expected = model[1](model[0](x))
    if way == "class":
        forward = nn.BatchNorm2d.forward

        def patched(self: nn.BatchNorm2d, y: Tensor) -> Tensor:
            held.append(forward(self, y))
            return held[-1]

        monkeypatch.setattr(nn.BatchNorm2d, "forward", patched)
        model(x)
    elif way == "mode":
        model[1].train()  # or it is folded
        model[1].track_running_stats = False
        expected = model[1](model[0](x))

        class Keeping(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                result = function(*args, **(kwargs or {}))
                if function is F.batch_norm:
                    held.append(result)
                return result

        with Keeping():
            model(x)
    else:
        graph = symbolic_trace(model)

        class Recording(Interpreter):
            def run_node(self, node: Node) -> object:
                result = super().run_node(node)
                if node.target == "1":
                    held.append(result)
                return result

        Recording(graph).run(x)
        assert {"1", "2"} <= {node.target for node in graph.graph.nodes}
    assert held[0].min() < 0
    torch.testing.assert_close(held[0], expected)


@pytest.mark.parametrize("name", ["bn1", "bn_dw", "bn2", "relu"])
def test_a_backward_hook_runs(name: str) -> None:
    m, calls = ResNetBlock(8, long_range=True).train(), []
    m.get_submodule(name).register_full_backward_hook(lambda *_: calls.append(name))
    m(torch.randn(2, 8, 5, 6)).sum().backward()
    assert set(calls) == {name}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_an_evaluating_block_is_differentiable() -> None:
    m = randomized(ResNetBlock(8)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(m, torch.randn(1, 8, 9, 9))
    x = torch.randn(2, 8, 20, 7, requires_grad=True)
    torch.testing.assert_close(traced(x), m(x))
    traced(x).sum().backward()
    assert x.grad is not None


def test_a_graph_of_fake_tensors() -> None:
    m = randomized(ResNetBlock(8)).eval().requires_grad_(False)
    x = torch.randn(1, 8, 9, 9)
    graph = make_fx(m, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(graph(x), m(x))


@both_layouts
def test_memory_format_is_kept_without_gradients(channels_last: bool) -> None:
    x = to_memory_format(torch.randn(2, 12, 9, 7).double(), channels_last)
    for name in BLOCKS:
        assert is_channels_last([block(name)(x)]) is channels_last, name


@pytest.mark.parametrize("kind", ["next", "resnet", "swin", "cswin"])
def test_plain_and_convert_of_a_whole_cednet(kind: str) -> None:
    model = models.CEDNet(block=kind, channels=(64, 64, 64, 64), depths=(1, 2, 2, 1), stages=1)
    model, x = randomized(model).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        plain = fastfuse.plain(model, x)
        for a, b in zip(plain(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        fastfuse.convert(model)
        for a, b in zip(model(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_empty_sequence_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(), nn.Sequential(nn.Conv2d(3, 3, 1)))
    x = torch.randn(1, 3, 4, 4)
    expected = model(x)
    fastfuse.convert(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ResNetBlock(8, dilation=0), ValueError, "ResNetBlock: dilation must be at least"),
        (lambda: SwinBlock(64, dilation=-3), ValueError, "SwinBlock: dilation must be at least 1"),
        (lambda: MLPBlock(8, drop_path="a"), TypeError, "MLPBlock: drop_path must be a number"),
        (lambda: MLPBlock(8, drop_path=0.1)([1]), TypeError, "MLPBlock: x must be a tensor"),
        (lambda: MLPBlock(12)(torch.zeros(1, 10, 4, 4)), ValueError, "MLPBlock: x must"),
    ],
)
def test_bad_input(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
