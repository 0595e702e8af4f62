"""convert and plain: what people do to models, before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfuse


def unit(**options: Any) -> nn.Sequential:
    norm = nn.BatchNorm2d(8, **options)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU())


class Fusion(nn.Module):
    """Its chain of operations is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        up = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")
        return self.conv(torch.cat([fine, up], dim=1))


class UsesFusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit, self.fusion = unit(), Fusion()

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(x)
        return self.fusion(x, F.avg_pool2d(x, 2))


def image() -> Tensor:
    return torch.randn(2, 8, 12, 12)


@pytest.mark.parametrize("dry_run", [True, False])
def test_no_weight_is_computed_by_converting(dry_run: bool) -> None:
    """Reading one of spectral_norm in training changes its vectors."""
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
    before = copy.deepcopy(conv.state_dict())
    assert fastfuse.convert(conv, dry_run=dry_run).converted == [""]
    for name, tensor in conv.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_convolutions_without_a_weight() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    conv.weight = None
    assert fastfuse.convert(conv).converted == [""]
    lazy = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d())
    fastfuse.convert(lazy)
    lazy(image())
    assert fastfuse.convert(lazy).converted == ["", "0"]


def test_torchscript() -> None:
    """Children of TorchScript are left; a converted module is scripted as what it was."""
    x, plain = image(), unit().eval()
    for scripted in (torch.jit.script(plain), torch.jit.trace(plain, x)):
        model = nn.Sequential(copy.deepcopy(plain), scripted)
        expected = model(x)
        assert fastfuse.convert(model).converted == ["0", "0.0"]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model = copy.deepcopy(plain)
    fastfuse.convert(model)
    scripted = torch.jit.script(model)
    assert "fastfuse" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_class_that_is_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = image(), unit().eval()
    fastfuse.convert(model)
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 3 * original(self, x))
    expected = F.relu(model[1](3 * original(model[0], x)))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[0](x), 3 * original(model[0], x))


@pytest.mark.parametrize("training", [True, False])
def test_torch_fx(training: bool) -> None:
    model, x = UsesFusion().train(training), image()
    expected = model(x)
    graph = torch.fx.symbolic_trace(model).graph
    assert fastfuse.convert(model).converted == ["unit", "unit.0", "fusion", "fusion.conv"]
    recorded = torch.fx.symbolic_trace(model)
    assert [node.target for node in recorded.graph.nodes] == [n.target for n in graph.nodes]
    torch.testing.assert_close(recorded(x), expected, rtol=1e-4, atol=1e-5)


def test_single_images_are_refused_as_before() -> None:
    model = unit().eval()
    fastfuse.convert(model)
    with pytest.raises(ValueError, match="expected 4D input"):
        model(image()[0])


class Scaled(Fusion):
    """Reads its child's attribute."""

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        up = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")
        return self.conv(torch.cat([fine, up], dim=1)) * self.conv.gain


def test_attributes_of_children() -> None:
    model, levels = Scaled(), (image(), image()[..., ::2, ::2])
    model.conv.gain = 1.0
    assert fastfuse.convert(model).converted == ["", "conv"]
    twin = copy.deepcopy(model)
    twin.conv.gain = 3.0
    torch.testing.assert_close(twin(*levels), 3 * model(*levels))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.seen = nn.Conv2d(8, 8, 3, padding=1), None, []

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        self.seen.append(x)
        return F.dropout(self.last) + torch.randn(1)


def test_counting_flops_leaves_nothing() -> None:
    model, x = Remembers(), image()
    random = torch.get_rng_state()
    fastfuse.convert(model, inputs=x)
    assert model.last is None
    assert model.seen == []
    assert torch.equal(torch.get_rng_state(), random)
    model(x)
    assert type(model.seen[0]) is Tensor


def _torchvision(depth: float) -> tuple[nn.Module, str, str, str, str]:
    from torchvision.models.convnext import CNBlock

    return CNBlock(8, 1.0, depth), "block.3", "block.4", "block.2", "stochastic_depth"


def _timm(depth: float) -> tuple[nn.Module, str, str, str, str]:
    from timm.models.convnext import ConvNeXtBlock

    block = ConvNeXtBlock(8, drop_path=depth, ls_init_value=1.0)
    return block, "mlp.fc1", "mlp.act", "norm", "drop_path"


def _transformers(depth: float) -> tuple[nn.Module, str, str, str, str]:
    from transformers import ConvNextConfig
    from transformers.models.convnext.modeling_convnext import ConvNextLayer

    block = ConvNextLayer(ConvNextConfig(layer_scale_init_value=1.0), 8, drop_path=depth)
    return block, "pwconv1", "act", "layernorm", "drop_path"


def _tripled(kind: type[nn.Module]) -> type[nn.Module]:
    """Of the same name, and another forward."""
    forward = lambda self, *args: 3 * kind.forward(self, *args)  # noqa: E731
    return type(kind.__name__, (kind,), {"forward": forward})


def _triple(module: nn.Module) -> None:
    module.__class__ = _tripled(type(module))


@pytest.mark.parametrize("library", [_torchvision, _timm, _transformers])
@pytest.mark.parametrize(
    "change", ["nothing", "hook", "activation", "norm", "dropout", "dropout2d", "scale"]
)
def test_children_of_convnext(library: Callable[[float], Any], change: str) -> None:
    """Results, and random numbers, of children that are others than those the op assumes."""
    pytest.importorskip(library.__name__.lstrip("_"))
    block, fc1, activation, norm, drop_path = library(0.5)
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "nothing": lambda m: None,
        "hook": lambda m: m.get_submodule(fc1).register_forward_hook(lambda *args: None),
        "activation": lambda m: _triple(m.get_submodule(activation)),
        "norm": lambda m: _triple(m.get_submodule(norm)),
        "dropout": lambda m: setattr(m, drop_path, nn.Dropout(0.5)),
        "dropout2d": lambda m: setattr(m, drop_path, nn.Dropout2d(0.5)),
        "scale": lambda m: [
            setattr(m, name, nn.Parameter(scale.detach().float()))
            for name, scale in list(m.named_parameters(recurse=False))
        ],
    }
    plain, x = block.double(), torch.randn(4, 8, 9, 9, dtype=torch.float64)
    converted = copy.deepcopy(plain)
    assert "" in fastfuse.convert(converted).converted
    results = []
    for model in (plain, converted):
        changes[change](model)
        torch.manual_seed(0)
        results.append((model(x), torch.get_rng_state()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-10)
    assert torch.equal(results[1][1], results[0][1])


def test_plain_of_an_unused_fusion() -> None:
    x = image()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion = Fusion()

        def forward(self, x: Tensor) -> Tensor:
            self.fusion(x, F.avg_pool2d(x, 2))
            return 2 * x

    assert torch.equal(fastfuse.plain(Model(), x)(x), 2 * x)


def test_plain_of_what_is_not_copied() -> None:
    model = UsesFusion()
    model.cached = 2 * model.fusion.conv.weight
    with pytest.raises(ValueError, match=r"plain: copy\.deepcopy does not take the model: Only"):
        fastfuse.plain(model, image())
