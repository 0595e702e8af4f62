"""Whether a converted module does what it did before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastfuse
from fastfuse.conversion import ConversionReport

__all__ = ["Made", "assert_same_results", "randomized"]

Made = Callable[[torch.dtype], Any]  # the arguments' tensors, in nested lists or alone

# By dtype, of the largest value among results, or among gradients. Float32 is the users'; float64
# shows that the function is the same, also where float32 gradients are differences of large ones.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def randomized(model: nn.Module) -> nn.Module:
    """Norms that are no identities, and no dropout: what it draws depends on the layout."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [t for item in items for t in _tensors(item)]


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)((key, _mapped(item, function)) for key, item in value.items())
    return [_mapped(item, function) for item in value]


def _run(model: nn.Module, args: tuple[Any, ...]) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)  # stochastic depth's
    args = tuple(_mapped(a, lambda t: t.detach().clone().requires_grad_()) for a in args)
    outputs = _tensors(model(*args))
    sum(
        (o * torch.linspace(-1, 1, o.numel()).view(o.shape).to(o)).sum() for o in outputs
    ).backward()
    parameters = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    inputs = {str(i): t.grad for i, t in enumerate(_tensors(list(args))) if t.grad is not None}
    model.zero_grad()
    return {
        "output": {str(i): o.detach() for i, o in enumerate(outputs)},
        "gradient": {**parameters, **inputs},
        "buffer": {n: b.clone() for n, b in model.named_buffers()},
    }


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> None:
    assert got.keys() == expected.keys(), kind
    largest = max((float(t.abs().max()) for t in expected.values()), default=0.0)
    for name, b in expected.items():
        a = got[name]
        assert a.shape == b.shape, (kind, name)
        assert a.dtype == b.dtype, (kind, name)
        tolerance = _TOLERANCE.get(b.dtype, 0.0)  # of counts of batches none
        error = float((a - b).abs().max())
        assert error <= tolerance * largest, f"{kind} {name}: {error:.3g} of {largest:.3g}"


def _smooth(model: nn.Module) -> None:
    """SiLUs for ReLUs: of a whole network some value meets a ReLU so near 0 that a rounding turns
    its gradient on or off, the original's too."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.ReLU:
                setattr(module, name, nn.SiLU())


def assert_same_results(
    model: nn.Module, *args: Any, converted: str | None = None, is_deep: bool = False
) -> ConversionReport:
    """Converts a copy of a model, and compares: float64 and float32, train and eval, both layouts;
    outputs, gradients of inputs and parameters, buffers.

    Args:
        converted: the name of a module that must be converted.
        is_deep: whether it is a whole network, which in float32 is compared without ReLUs.
    """
    for dtype in (torch.float64, torch.float32):
        original = copy.deepcopy(model).to(dtype)
        if is_deep and dtype == torch.float32:
            _smooth(original)
        twin = copy.deepcopy(original)
        report = fastfuse.convert(twin)
        if converted is not None:
            assert converted in report.converted, str(report)
        assert list(twin.state_dict()) == list(original.state_dict())
        for training in (False, True):
            for layout in (torch.contiguous_format, torch.channels_last):

                def cast(t: Tensor, dtype: Any = dtype, layout: Any = layout) -> Tensor:
                    return t.to(dtype).contiguous(memory_format=layout)

                inputs = tuple(_mapped(a, cast) for a in args)
                expected = _run(original.train(training), inputs)
                got = _run(twin.train(training), inputs)
                for kind, tensors in expected.items():
                    if training and kind == "gradient" and dtype == torch.float32:
                        continue  # differences of large numbers, through norms of few values
                    _assert_close(got[kind], tensors, f"{dtype}, training={training}: {kind}")
    return report
