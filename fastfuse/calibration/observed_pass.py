"""One pass of a model over images, observed, after which nothing of it is left.

Calibration makes one, a report two.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfuse.backends import DTYPES
from fastfuse.calibration.equalizers import find_fusions
from fastfuse.nn import ScaleEqualizer
from fastfuse.nn.level_fusion import LevelFusion
from fastfuse.ops.checks import check_ints, check_size

__all__ = ["FusionInput", "run_observed"]


@dataclass(frozen=True)
class FusionInput:
    """What a fusion, or an equalizer that stands alone, received in one call of its forward."""

    name: str
    module: nn.Module
    features: Sequence[Tensor]
    size: tuple[int, int] | None  # of the concatenation; None: features are of one size already
    align_corners: bool


def _encoder(caller: str, model: nn.Module, encoder: str | nn.Module | None) -> nn.Module | None:
    if encoder is None:
        return None
    if isinstance(encoder, nn.Module):
        if any(module is encoder for module in model.modules()):
            return encoder
        raise ValueError(f"{caller}: encoder must be a module of the model; got another module")
    with contextlib.suppress(AttributeError):
        return model.get_submodule(encoder)
    children = ", ".join(repr(name) for name, _ in model.named_children()) or "none"
    raise ValueError(
        f"{caller}: the model has no module {encoder!r}; give encoder= the name of its encoder "
        f"(the model's children: {children}), which stays in evaluation mode, or encoder=None "
        f"if it has none"
    )


@contextlib.contextmanager
def _modes(model: nn.Module, encoder: nn.Module | None) -> Iterator[None]:
    """BatchNorm outside the encoder in training mode, all else in evaluation mode; then as before.

    Buffers too are given back as they were, running statistics among them; those of equalizers
    are the callers'.
    """
    training = [(module, module.training) for module in model.modules()]
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        if not isinstance(module, ScaleEqualizer)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    inside = set(encoder.modules()) if encoder is not None else set()
    try:
        for module, _ in training:
            module.training = False
            if isinstance(module, _BatchNorm) and module not in inside:
                if isinstance(module, nn.SyncBatchNorm) and _distributed():
                    # In training mode it would wait for ranks that may have no batch left. Without
                    # running statistics it takes those of its own batch, as one process would.
                    module._buffers["running_mean"] = module._buffers["running_var"] = None
                else:
                    module.training = True
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for owner, name, buffer, value in buffers:
            buffer.copy_(value)
            owner[name] = buffer


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def _observed(model: nn.Module, observe: Callable[[FusionInput], None]) -> Iterator[None]:
    """Calls ``observe`` before each forward of a fusion or of an equalizer that stands alone."""
    inside = {id(fusion.equalizer) for fusion in find_fusions(model).values()}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before_fusion(fusion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = dict(zip(("features", "size"), args, strict=False)) | kwargs
            features = fusion._check_levels(arguments.get("features"))
            size = check_size(type(fusion).__name__, arguments.get("size"), features)
            observe(FusionInput(name, fusion, features, size, fusion.align_corners))

        def before_equalizer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            features = args[0] if args else kwargs["features"]
            if len(features) == module.num_levels:  # else its forward says what is wrong
                observe(FusionInput(name, module, list(features), None, False))

        hook = before_fusion if isinstance(module, LevelFusion) else before_equalizer
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    try:
        for name, module in model.named_modules():
            if isinstance(module, LevelFusion) or (
                isinstance(module, ScaleEqualizer) and id(module) not in inside
            ):
                watch(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_observed(
    caller: str,
    model: nn.Module,
    batches: Iterable[Any],
    observe: Callable[[FusionInput], None],
    *,
    encoder: str | nn.Module | None,
    max_batches: int | None,
    progress: bool,
) -> int:
    """Runs the model over the batches without gradients, ``observe`` called with every input of a
    fusion; returns the number of images."""
    if max_batches is not None:
        check_ints(caller, 1, max_batches=max_batches)
    encoder = _encoder(caller, model, encoder)
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # parts of the model may be compiled: hooks need eager
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_modes(model, encoder))
        stack.enter_context(_observed(model, observe))
        advance = stack.enter_context(_progress(caller, batches, max_batches, progress))
        count = 0
        for index, batch in enumerate(islice(batches, max_batches)):
            images = _images(caller, index, batch)
            model(images)
            count += len(images)
            advance(len(images))
    return count


def _images(caller: str, index: int, batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    where = f"{caller}: batch {index}"
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{where} must be a tensor of images or a tuple or list that begins with one; "
            f"got {type(images).__name__}"
        )
    if images.dim() != 4 or images.dtype not in DTYPES:
        raise ValueError(
            f"{where} must be floating-point images of shape (N, C, H, W); "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if len(images) < 2:
        raise ValueError(
            f"{where} must have at least 2 images; got {len(images)}. A globally pooled branch has "
            f"one value per image and channel, and BatchNorm, which calibration runs on batch "
            f"statistics, cannot normalize a single value. Use batches of 16 images or so, and "
            f"drop_last=True in the DataLoader"
        )
    return images


@contextlib.contextmanager
def _progress(
    caller: str, batches: Iterable[Any], max_batches: int | None, wanted: bool
) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal of stderr, if there is one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    console = Console(stderr=True)
    first = not _distributed() or torch.distributed.get_rank() == 0
    if not (wanted and console.is_terminal and first):
        yield lambda images: None
        return
    total = max_batches
    with contextlib.suppress(TypeError, NotImplementedError):
        length = len(batches)  # type: ignore[arg-type]
        total = length if total is None else min(total, length)
    speed = TextColumn("{task.fields[speed]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed)
    with Progress(*columns, Elapsed(), console=console) as bar:
        task = bar.add_task(f"{caller} (batches)", total=total, speed="")
        start, seen = time.perf_counter(), 0

        def advance(images: int) -> None:
            nonlocal seen
            seen += images
            speed = f"{seen / (time.perf_counter() - start):.1f} images/s"
            bar.update(task, advance=1, speed=speed)

        yield advance
