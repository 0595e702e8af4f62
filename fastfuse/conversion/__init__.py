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

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

# A file for each library, which it does not import: a class is looked up where its library is.
from fastfuse.conversion import (  # noqa: F401
    mmsegmentation,
    resnet,
    segformer,
    segmentation_models_pytorch,
    timm,
    torch_nn,
    torchvision,
    transformers,
)
from fastfuse.conversion.pattern import (
    Pattern,
    as_forward_of,
    is_converted,
    kinds_of_patterns,
    pattern_of,
    register_pattern,
)
from fastfuse.conversion.report import ConversionReport, Found
from fastfuse.conversion.traced import traced_pattern_of
from fastfuse.nn.composition import CONVERTED

__all__ = ["ConversionReport", "Pattern", "convert", "register_pattern", "revert"]

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def _checked(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module; got {type(model).__name__}")


def convert(
    model: nn.Module, *, dry_run: bool = False, inputs: Inputs | None = None
) -> ConversionReport:
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
        inputs: what the model is called with: a tensor, a tuple of arguments or a mapping of
            keywords. With these FLOPs are counted, from shapes: nothing is computed.

    Returns:
        What was converted, and what was recognized and left, with the reason. Converting twice is
        converting once.

    Raises:
        TypeError: no module.
        ValueError: the model does not take ``inputs``. As after any error, it is as it was.

    >>> import torch, fastfuse
    >>> model = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)
    >>> fastfuse.convert(model, dry_run=True).converted
    ['']
    """
    _checked("convert", model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    kinds, found = kinds_of_patterns(), []
    before = {module: _forward_of(module) for module in names}
    after = dict(before)
    for module, (name, *others) in names.items():
        known = pattern_of(module, kinds) or traced_pattern_of(module)
        if known is None:
            continue
        pattern, reason = known
        found.append(Found(name, pattern.target, reason, is_converted(module), others))
        if reason is None and not is_converted(module):
            forward = as_forward_of(type(module).forward, pattern.forward)
            CONVERTED.add(forward)
            # A bound method: copied with its module, and pickled as the class's, by its name.
            after[module] = MethodType(forward, module)
    flops = None
    try:
        if inputs is not None:
            _set_forwards({m: None if is_converted(m) else f for m, f in before.items()})
            original = _count_flops(model, inputs)
            _set_forwards(after)
            flops = (original, _count_flops(model, inputs))
        _set_forwards(before if dry_run else after)
    except BaseException:
        _set_forwards(before)
        raise
    return ConversionReport(found, len(names), flops)


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """Its own; None: its class's."""
    return module.__dict__.get("forward")


def _set_forwards(forwards: Mapping[nn.Module, Callable[..., Any] | None]) -> None:
    for module, forward in forwards.items():
        if forward is not _forward_of(module):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _count_flops(model: nn.Module, inputs: Inputs) -> int:
    args: Any = (inputs,) if isinstance(inputs, Tensor) else inputs
    with (
        _unchanged(model),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        torch.no_grad(),
    ):
        arguments = tree_map_only(Tensor, fake.from_tensor, args)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state: dict[str, Tensor] = {
            name: fake.from_tensor(tensor) for name, tensor in tensors.items()
        }
        args, kwargs = ((), arguments) if isinstance(args, Mapping) else (arguments, None)
        try:
            with FlopCounterMode(display=False) as counter:
                functional_call(model, state, args, kwargs)
        except Exception as error:
            raise ValueError(
                f"convert: inputs must be what the model takes; got {type(error).__name__}: {error}"
            ) from error
    return counter.get_total_flops()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever calls keep in the modules' attributes, and draw, is taken back."""
    held: list[Any] = [module.__dict__ for module in model.modules()]
    held += [v for state in held for v in state.values() if isinstance(v, (list, dict, set))]
    before = [(container, container.copy()) for container in held]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for container, was in before:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(was)


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
