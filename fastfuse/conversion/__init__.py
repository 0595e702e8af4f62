"""Models of other libraries, made faster where they stand.

>>> import torch, fastfuse
>>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 7, padding=3, groups=8))
>>> print(fastfuse.convert(model))
1 module of 2 converted
  converted  torch.nn.modules.conv:Conv2d  0
>>> fastfuse.revert(model)
['0']
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

# A file for each library, which it does not import: a class is looked up where its library is.
from fastfuse.conversion import (  # noqa: F401
    mmsegmentation,
    segmentation_models_pytorch,
    timm,
    torch_nn,
    torchvision,
    transformers,
)
from fastfuse.conversion.pattern import (
    Pattern,
    is_converted,
    pattern_of,
    register_pattern,
)
from fastfuse.conversion.report import ConversionReport, Found
from fastfuse.conversion.traced import traced_pattern_of

__all__ = ["ConversionReport", "Pattern", "convert", "register_pattern", "revert"]


def _checked(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module; got {type(model).__name__}")


def convert(model: nn.Module, *, dry_run: bool = False) -> ConversionReport:
    """Runs what this package knows of a model by its kernels; parameters and keys stay.

    Of every module whose class has a pattern the ``forward`` is replaced, in place: parameters,
    buffers, names, hooks and classes are as before, and results are the same to rounding. Each call
    asks anew whether the module's children are what the kernels assume: what has hooks, adapters,
    parametrizations or another forward is called as before. Copies (``copy.deepcopy``) are
    converted too; what is pickled is the original, and needs no fastfuse.

    Args:
        model: any module; transformers, timm, torchvision and others' are known, as are plain
            convolutions.
        dry_run: True changes nothing, and only reports.

    Returns:
        What was converted, and what was recognized and left, with the reason. Converting twice is
        converting once.

    Raises:
        TypeError: no module.

    >>> import torch, fastfuse
    >>> model = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)
    >>> fastfuse.convert(model, dry_run=True).converted
    ['']
    """
    _checked("convert", model)
    found, planned, count = [], [], 0
    for name, module in model.named_modules():
        count += 1
        known = pattern_of(module) or traced_pattern_of(module)
        if known is None:
            continue
        pattern, reason = known
        if reason is None and not is_converted(module):
            reason = pattern.check(module)
        found.append(Found(name, pattern.target, reason))
        if reason is None and not is_converted(module):
            planned.append((module, pattern))
    if not dry_run:
        for module, pattern in planned:
            # A bound method: copied with its module, and pickled as the class's, by its name.
            module.forward = MethodType(pattern.forward, module)
    return ConversionReport(found, count)


def revert(model: nn.Module) -> list[str]:
    """Takes :func:`convert` back: every module's forward is its class's.

    Returns:
        Names of the modules that had been converted.

    Raises:
        TypeError: no module.
    """
    _checked("revert", model)
    reverted = []
    for name, module in model.named_modules():
        if is_converted(module):
            del module.forward
            reverted.append(name)
    return reverted
