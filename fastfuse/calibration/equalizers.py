"""A model's fusions and scale equalizers, and the statistics that these hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from fastfuse.nn import ScaleEqualizer
from fastfuse.nn.level_fusion import LevelFusion

__all__ = [
    "find_equalizers",
    "find_fusions",
    "identity_equalizers",
    "kept_statistics",
    "unwrap",
]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DataParallel's wrappers, whose names users know."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def find_fusions(model: nn.Module) -> dict[str, LevelFusion]:
    """Every fusion by its name in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LevelFusion)}


def find_equalizers(model: nn.Module) -> dict[str, ScaleEqualizer]:
    """Every scale equalizer by its name in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ScaleEqualizer)}


@contextlib.contextmanager
def kept_statistics(modules: Iterable[ScaleEqualizer], *, always: bool = False) -> Iterator[None]:
    """Equalizers get their statistics back if the body fails, or always."""
    before = [(m, m.mean.clone(), m.std.clone()) for m in modules]
    done = False
    try:
        yield
        done = not always
    finally:
        for module, mean, std in [] if done else before:
            module.mean.copy_(mean)
            module.std.copy_(std)


@contextlib.contextmanager
def identity_equalizers(modules: Iterable[ScaleEqualizer]) -> Iterator[None]:
    """Every equalizer the identity; if the body fails, they get their statistics back."""
    modules = list(modules)
    with kept_statistics(modules):
        for module in modules:
            module.mean.zero_()
            module.std.fill_(1)
        yield
